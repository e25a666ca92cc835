"""Measure a whole training step against a model without windows and against Hugging Face's, in turns.

    pip install -e '.[cpu,hf]'
    python tools/bench_train.py           # half an hour on two quiet cores with 16 GiB; --quick takes a minute

The same weights, tokens and torch.optim.AdamW (fused) on every side, in a plain loop of forward, backward and update:
models and kernels are compared, not engines (ours trains under DeepSpeed otherwise). One sequence per step, no
recomputation. The sides take turns, each turn a process of its own, so that no side needs memory beside another's: the
second step of a turn counts. Wall time, medians over rounds; a ratio says how many times more tokens per second ours
trains.
  ours          a ZebraModel as pretraining builds it
  full_pattern  the same model with a global attention in every layer, by the same kernel
  transformers  CwmForCausalLM with SDPA, its loss that of ours before anything is timed
In bf16 (--dtype bf16) weights and moments are bf16 on every side.
Peak memory is that of weights, optimizer and a step, each side in a process of its own, libraries not counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch
from bench.dtypes import DTYPES
from bench.measure import Row, command_line, in_fresh_process, machine, report, tune_allocator
from bench.train_sides import SIDES, Setting, Turn, peak_of_training, take_turn

from megazebra.plan.flops import parameter_count

# Relative difference of one model's losses by two programs: rounding, averaged over the tokens. Another pattern is
# several times 1e-4 away even with untrained weights.
SAME_LOSS = {"fp32": 2e-6, "bf16": 1e-4}
QUICK = {"seq_len": 4096, "layers": 4, "hidden": 256, "heads": 4, "rounds": 1}


def bench_speed(setting: Setting, rounds: int) -> Iterator[Row]:
    turns: dict[str, list[Turn]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name, taken in turns.items():
            taken.append(in_fresh_process(take_turn, name, setting))
        losses = {name: taken[-1].loss for name, taken in turns.items()}
        print("  loss " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()), flush=True)
        difference = abs(losses["ours"] / losses["transformers"] - 1)
        if difference > SAME_LOSS[setting.dtype]:
            raise SystemExit(f"ours and transformers are not the same model: their losses differ by {difference:.1e}")
    seconds = {name: statistics.median(turn.seconds for turn in taken) for name, taken in turns.items()}
    for name, each in seconds.items():
        yield f"tokens_per_s_{name}", setting.seq_len / each, f"{each:.2f} s per step"
    yield "vs_full_pattern", seconds["full_pattern"] / seconds["ours"], "ours / the same model without windows"
    yield "vs_transformers", seconds["transformers"] / seconds["ours"], "ours / CwmForCausalLM with SDPA"


def bench_memory(setting: Setting, rounds: int) -> Iterator[Row]:
    peaks = {}
    for name in SIDES:
        peaks[name] = in_fresh_process(peak_of_training, name, setting)
        yield f"peak_bytes_{name}", peaks[name], f"{peaks[name] / 2**30:.2f} GiB"
    yield "peak_memory_vs_transformers", peaks["transformers"] / peaks["ours"], "times less ours takes"


BENCHES = {"speed": bench_speed, "memory": bench_memory}


def main() -> None:
    parser = command_line(__doc__, BENCHES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--backend", default="auto", help="our attention: auto, or a name from megazebra/attention")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--pattern", default="GLLL")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--plain-allocator", action="store_true", help="leave glibc's allocator as it is")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    parsed = parser.parse_args()
    allocator = "as it is" if parsed.plain_allocator else tune_allocator()
    torch.set_num_threads(parsed.threads)
    names = ("seq_len", "layers", "hidden", "heads", "window", "vocab", "pattern", "dtype", "threads", "backend")
    setting = Setting(**{name: getattr(parsed, name) for name in names})
    print(f"machine    {machine()}, {parsed.threads} threads")
    print(f"allocator  {allocator}")
    model = setting.config().model
    print(
        f"model      {parameter_count(model) / 1e6:.1f} M parameters: {model.num_layers} layers {setting.pattern}, "
        f"window {model.window}, hidden {model.hidden_size}, {model.num_attention_heads} heads of {model.head_size}, "
        f"feed-forward {model.ffn_hidden_size}, vocabulary {model.vocab_size}"
    )
    print(f"step       {setting.seq_len} tokens, {setting.dtype}")
    report({name: partial(bench, setting, parsed.rounds) for name, bench in BENCHES.items()}, parsed.only, parsed.json)


if __name__ == "__main__":
    main()
