"""Generation is the plain loop of whole forward passes, in batches, streams and on several ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.hf_models import load_theirs, save_ours
from models.zebras import make_model, random_tokens, small_config
from support.distributed import run_distributed
from torch import Tensor

from megazebra.config import ParallelConfig
from megazebra.generate.cache import KVCache
from megazebra.generate.generator import Generator
from megazebra.generate.loading import load_model
from megazebra.generate.sampling import Sampling
from megazebra.hf.exporting import HuggingFaceExport
from megazebra.models.initialization import full_weights
from megazebra.models.zebra import ZebraModel
from megazebra.parallel.mesh import ParallelMesh

LENGTHS = (23, 4, 11, 1)
NEW = 14  # two windows and more


def some_prompts(model: ZebraModel) -> list[list[int]]:
    tokens, _ = random_tokens(model.model.config, len(LENGTHS), max(LENGTHS))
    return [row[:length].tolist() for row, length in zip(tokens, LENGTHS, strict=True)]


@torch.no_grad()
def plain_loop(model: ZebraModel, prompt: list[int], new: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_is_the_plain_loop() -> None:
    model = make_model(small_config(), dtype=torch.float64)
    prompts = some_prompts(model)
    expected = [plain_loop(model, prompt, NEW) for prompt in prompts]
    for chunk in (2, 5, 100):
        assert Generator(model).generate(prompts, NEW, chunk=chunk) == expected


def test_rows_end_with_eos() -> None:
    model = make_model(small_config(), dtype=torch.float64)
    prompts = some_prompts(model)[:3]
    whole = Generator(model).generate(prompts, NEW)
    eos = {whole[0][4], whole[1][0]}
    expected = [row[: 1 + next((i for i, token in enumerate(row) if token in eos), NEW)] for row in whole]
    assert len(expected[0]) <= 5
    assert len(expected[1]) == 1
    generation = Generator(model).start(prompts, NEW, eos_ids=eos)
    steps = list(generation)
    assert generation.tokens == expected
    assert len(steps) == max(map(len, expected))
    for row, tokens in enumerate(expected):
        assert [step[row] for step in steps] == tokens + [None] * (len(steps) - len(tokens))
    assert generation.decoded_tokens == sum(map(len, expected)) - 3


def test_tokens_come_one_by_one_and_the_clock_stops_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(small_config())
    ticks = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    generation = Generator(model).start([[1, 2, 3]], 4)
    for step, (token,) in enumerate(generation, 1):
        assert generation.tokens[0][-1] == token
        assert len(generation.tokens[0]) == step
        next(ticks)  # the caller's time
    assert (generation.prefill_s, generation.decode_s) == (1, 3)
    assert torch.is_grad_enabled()


def test_drawn_tokens_do_not_depend_on_the_batch() -> None:
    model = make_model(small_config(), dtype=torch.float64)
    prompts = some_prompts(model)
    sampling = Sampling(temperature=1.2, top_p=0.95, seed=5)
    together = Generator(model).generate(prompts, NEW, sampling)
    alone = [list(Generator(model).start([prompt], NEW, sampling, first_row=i)) for i, prompt in enumerate(prompts)]
    assert [[token for (token,) in steps] for steps in alone] == together
    assert together != Generator(model).generate(prompts, NEW, Sampling(temperature=1.2, top_p=0.95, seed=6))


def test_only_the_last_position_meets_the_output_layer() -> None:
    model = make_model(small_config())
    met: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: met.append(inputs[0]))
    Generator(model).generate(some_prompts(model), 3, chunk=10)
    assert {hidden.shape[:2] for hidden in met} == {(len(LENGTHS), 1)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1), "every prompt needs a token"),
        (([[1], []], 1), "every prompt needs a token"),
        (([[1, 61]], 1), "prompt 0 has tokens from 1 to 61, the model's go from 0 to 60"),
        (([[1], [-1, 5]], 1), "prompt 1 has tokens from -1 to 5"),
        (([[1]], 0), "max_new_tokens=0 and chunk=2048"),
    ],
)
def test_arguments_without_meaning_are_named(arguments: tuple[Any, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Generator(make_model(small_config())).start(*arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {},  # Cwm
        {"pattern": "G", "tie_word_embeddings": True},  # Llama
        {"qk_norm": True, "head_dim": 16, "num_kv_heads": 1},  # Qwen3
    ],
)
def test_transformers_generates_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    save_ours(tmp_path / "model", **changes)
    HuggingFaceExport(tmp_path / "model", {"bos_token_id": 1, "eos_token_id": 2}).write(tmp_path / "hf")
    theirs = load_theirs(tmp_path / "hf")
    ours = load_model(tmp_path / "model", "cpu", torch.float32)
    prompts = some_prompts(ours)
    new = Generator(ours).generate(prompts, NEW, eos_ids={2})
    for prompt, tokens in zip(prompts, new, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
        assert expected[0, len(prompt) :].tolist() == tokens


def _on_two_ranks(folder: Path) -> dict[str, Any]:
    two = ParallelMesh.build(ParallelConfig(tensor=2))
    model = load_model(folder, "cpu", torch.float64, mesh=two)
    found: dict[str, Any] = {"weights": full_weights(model, two.tp)}
    prompts = some_prompts(model)
    generator = Generator(model)
    two.traffic.reset()
    found["greedy"] = generator.generate(prompts, NEW, chunk=6)
    found["token bytes"] = two.traffic.tallies["tp", "broadcast", "token"].bytes
    found["drawn"] = generator.generate(prompts, NEW, Sampling(1.0, 0.9, seed=3), eos_ids={7})
    cache = KVCache.of(model, [0], 20)
    found["cache bytes"] = cache.nbytes
    with torch.no_grad():
        found["logits"] = [model(part, cache=cache) for part in torch.tensor([prompts[0][:20]]).split([9, 10, 1], 1)]
    return found


def test_two_ranks_are_as_one(tmp_path: Path) -> None:
    model = save_ours(tmp_path / "model", attention_sinks="all", tie_word_embeddings=True).double()
    first, second = run_distributed(_on_two_ranks, 2, tmp_path / "model")
    prompts = some_prompts(model)
    assert all(torch.equal(first["weights"][name], weight) for name, weight in model.named_parameters())
    assert first["greedy"] == second["greedy"] == Generator(model).generate(prompts, NEW)
    drawn = Generator(model).generate(prompts, NEW, Sampling(1.0, 0.9, seed=3), eos_ids={7})
    assert first["drawn"] == second["drawn"] == drawn
    assert first["token bytes"] == NEW * len(prompts) * 8
    cache = KVCache.of(model, [0], 20)
    assert first["cache bytes"] == second["cache bytes"] == cache.nbytes // 2
    with torch.no_grad():
        expected = model(torch.tensor([prompts[0][:20]]))
    for found in (first, second):
        # float64, some thousand operations deep, in another order.
        torch.testing.assert_close(torch.cat(found["logits"], 1), expected, rtol=0, atol=1e-12 * expected.abs().max())
