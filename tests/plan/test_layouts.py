"""Which layouts the planner tries, what it says of those that can't be, and which one it recommends."""

from __future__ import annotations

from typing import Any

from megazebra.config.schema import Config
from megazebra.plan.layouts import KEYS, Judgement, best, layouts, ranked
from megazebra.plan.memory import peak_memory
from megazebra.plan.profile import Profile, load_profile


def small(**changes: Any) -> Config:
    """Heads of 64, six of them: neither four nor eight tensor-parallel ranks can share them."""
    model = {"num_layers": 4, "hidden_size": 384, "ffn_hidden_size": 1024, "num_attention_heads": 6, "vocab_size": 512}
    train = {"global_batch_size": 8, "micro_batch_size": 1, "loss_chunk": 256}
    return Config.model_validate({"model": model, "train": train, "data": {"seq_len": 4096}, **changes})


def judged(config: Config, devices: int, profile: Profile | None = None, *pinned: str) -> list[Judgement]:
    return list(layouts(config, devices, profile or load_profile("h100"), pinned))


def sizes(judgement: Judgement) -> tuple[int, int, int]:
    return judgement.config.parallel.tensor, judgement.config.parallel.context, judgement.data_parallel


def test_every_split_of_the_devices_is_tried() -> None:
    found = judged(small(), 8)
    assert {sizes(each) for each in found} == {
        (1, 1, 8), (1, 2, 4), (1, 4, 2), (1, 8, 1), (2, 1, 4), (2, 2, 2), (2, 4, 1), (4, 1, 2), (4, 2, 1), (8, 1, 1)
    }  # fmt: skip
    assert {each.config.parallel.zero_stage for each in found} == {1, 2, 3}  # bf16 runs stage 0 as 1
    assert {each.config.parallel.sequence_parallel for each in found if each.config.parallel.tensor == 2} == {True}
    assert {each.config.train.micro_batch_size for each in found if sizes(each) == (1, 8, 1)} == {1, 2, 4, 8}


def test_what_was_asked_for_stays() -> None:
    config = small(parallel={"tensor": 2, "zero_stage": 0, "sequence_parallel": False})
    found = judged(config, 8, None, "parallel.tensor", "parallel.sequence_parallel", "train.recompute")
    assert {each.config.parallel.tensor for each in found} == {2}
    assert not any(each.config.parallel.sequence_parallel for each in found)
    assert {each.config.train.recompute for each in found} == {"none"}
    assert {each.config.parallel.context for each in found} == {1, 2, 4}


def test_reasons_name_what_is_in_the_way() -> None:
    refused = {sizes(each): each.refusal for each in judged(small(), 8) if not each.fits}
    reason = "model.num_attention_heads must be divisible by parallel.tensor=4; lower parallel.tensor"
    assert refused[4, 1, 2] == reason
    config = small(parallel={"context_global": "ulysses"})
    refused = {sizes(each): each.refusal for each in judged(config, 4) if not each.fits}
    assert "needs parallel.context=4 to divide the 6 query heads" in str(refused[1, 4, 1])


def test_memory_is_compared_with_the_devices() -> None:
    config = small()
    need = peak_memory(config, 1).total
    room = load_profile("h100").model_copy(update={"memory_bytes": need / 1e9 * 1e9, "memory_reserve": 0.0})
    keys = [*KEYS, "parallel.sequence_parallel"]
    (fits,) = judged(config, 1, room, *keys)
    assert fits.fits
    lacking = room.model_copy(update={"memory_bytes": need - 2.5e9})
    (refused,) = judged(config, 1, lacking, *keys)
    assert refused.refusal == "memory over by 2.5 GB"
    assert best([refused]) is None


def test_the_fastest_that_fits_is_recommended() -> None:
    found = judged(small(), 8)
    chosen = best(found)
    assert chosen is not None
    assert chosen.tokens_per_s == max(each.tokens_per_s for each in found if each.fits)
    rows = ranked(found)
    times = [each.time.total for each in rows if each.time is not None]
    assert times == sorted(times)
    assert rows[0].time == chosen.time
    # One row for every split, stage and recomputation: the best micro-batch size of each.
    assert len(rows) == 10 * 3 * 3


def test_context_parallelism_is_priced_by_the_window() -> None:
    keys = [*KEYS, "parallel.sequence_parallel"]
    short, long = (
        judged(small(parallel={"context": 4}, data={"seq_len": length}), 4, None, *keys)[0].received_by_group()
        for length in (2048, 4096)
    )
    assert short["cp local halo"] == long["cp local halo"]
    (grows,) = (name for name in short if name.startswith("cp global"))
    assert long[grows] > 1.9 * short[grows]
