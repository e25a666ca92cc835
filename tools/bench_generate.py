"""Measure a decoding step at a long context: a Zebra model against the same model with global attention everywhere.

    pip install -e '.[cpu]'
    python tools/bench_generate.py          # minutes on two quiet cores, 2 GiB; --quick takes less than one

Both sides are the same code, weights and token; only the pattern differs. The sides take turns in one process, wall
time, medians over rounds of a few steps; a ratio says how many times faster ours is, or smaller. The caches are filled
with random keys and values in place of a prompt that is read: a step's time does not depend on the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from bench.dtypes import DTYPES
from bench.measure import Row, command_line, interleaved, machine, report, wall_seconds

from megazebra.attention.backend import resolve_backend
from megazebra.config.schema import ModelConfig, ParallelConfig
from megazebra.generate.cache import KVCache
from megazebra.models.initialization import initialize
from megazebra.models.runtime import ModelRuntime
from megazebra.models.zebra import ZebraModel
from megazebra.parallel.mesh import ParallelMesh
from megazebra.plan.flops import parameter_count

SEED = 1234
STEPS = 4  # of one turn
QUICK = {"layers": 4, "hidden": 256, "heads": 4, "vocab": 1024, "rounds": 3}


@dataclass(frozen=True)
class Setting:
    """The model and the batch; `context` is the number of tokens before the first step."""

    context: int
    batch: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int | None
    window: int
    vocab: int
    pattern: str
    dtype: str

    def config(self) -> ModelConfig:
        return ModelConfig(
            num_layers=self.layers,
            hidden_size=self.hidden,
            # Llama's 8/3 of the width, in multiples of 32.
            ffn_hidden_size=-(-self.hidden * 8 // 3 // 32) * 32,
            num_attention_heads=self.heads,
            num_kv_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=2 * self.context,
            pattern=self.pattern,
            window=self.window,
        )


class Side:
    """A model in the middle of a generation, whose steps go on from there."""

    def __init__(self, setting: Setting, steps: int) -> None:
        config, dtype = setting.config(), DTYPES[setting.dtype]
        specs, device = config.attention_specs(), torch.device("cpu")
        backend = resolve_backend("auto", specs, head_dim=config.head_size, dtype=dtype, device=device)
        self.model = ZebraModel(config, ParallelMesh.build(ParallelConfig()), ModelRuntime(backend))
        initialize(self.model, config, SEED, self.model.mesh.tp)
        self.model.to(dtype)
        self.tokens_B1 = torch.ones(setting.batch, 1, dtype=torch.int64)
        self.cache = KVCache.of(self.model, [0] * setting.batch, setting.context + steps)
        self.cache.begin(setting.context)
        for layer in self.cache.layers:
            layer.keys_BGTD.normal_()
            layer.values_BGTD.normal_()

    @torch.no_grad()
    def step(self) -> None:
        self.model(self.tokens_B1, cache=self.cache, last_only=True)

    def turn(self) -> None:
        for _ in range(STEPS):
            self.step()


def bench_decode(setting: Setting, rounds: int) -> Iterator[Row]:
    steps = STEPS * (rounds + 1)  # the first turn warms up
    sides = {"zebra": Side(setting, steps), "full": Side(replace(setting, pattern="G"), steps)}
    seconds = interleaved({name: side.turn for name, side in sides.items()}, rounds, wall_seconds)
    for name, turn in seconds.items():
        yield f"step_ms_{name}", 1000 * turn / STEPS, f"{STEPS * setting.batch / turn:,.1f} tokens/s"
    at = f"decode_vs_full_{setting.context // 1024}k"
    yield at, seconds["full"] / seconds["zebra"], "ours / the same model without windows"
    sizes = {name: side.cache.nbytes for name, side in sides.items()}
    for name, size in sizes.items():
        yield f"cache_bytes_{name}", size, f"{size / 2**20:,.1f} MiB"
    yield "cache_bytes_vs_full", sizes["full"] / sizes["zebra"], "times less ours takes"


BENCHES = {"decode": bench_decode}


def main() -> None:
    parser = command_line(__doc__, BENCHES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each side")
    parser.add_argument("--pattern", default="GLLL")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--context", type=int, default=16384, help="tokens before the first step")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="(default: as many as heads)")
    parser.add_argument("--vocab", type=int, default=8192)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    names = ("context", "batch", "layers", "hidden", "heads", "kv_heads", "window", "vocab", "pattern", "dtype")
    setting = Setting(**{name: getattr(parsed, name) for name in names})
    model = setting.config()
    print(f"machine  {machine()}, {parsed.threads} threads")
    print(
        f"model    {parameter_count(model) / 1e6:.1f} M parameters: {model.num_layers} layers {setting.pattern}, "
        f"window {model.window}, hidden {model.hidden_size}, {model.num_attention_heads} heads of {model.head_size} "
        f"({model.kv_heads} for keys and values), feed-forward {model.ffn_hidden_size}, vocabulary {model.vocab_size}"
    )
    print(f"step     {setting.batch} x 1 token after {setting.context:,} random ones, {setting.dtype}")
    report({name: partial(bench, setting, parsed.rounds) for name, bench in BENCHES.items()}, parsed.only, parsed.json)


if __name__ == "__main__":
    main()
