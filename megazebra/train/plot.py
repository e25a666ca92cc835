"""loss.png: training and validation loss over tokens."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle
from pathlib import Path

from megazebra.durable import write_atomically
from megazebra.train.metrics import loss_of, read_metrics

HELD_OUT_COLORS = ("#c0392b", "#2980b9", "#27ae60", "#8e44ad", "#d68910", "#16a085")


def plot_loss(metrics: Path, target: Path, unigram: Mapping[str, float]) -> None:
    """Draw the losses of a metrics.jsonl; `unigram`: losses of a unigram model by held-out corpus, in nats."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(metrics)
    tokens_at = {row["step"]: row["tokens"] for row in rows if row["kind"] == "train"}
    train = [(row["tokens"], row["loss"]) for row in rows if row["kind"] == "train" and row["loss"] is not None]
    validation: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["kind"] == "validation":
            validation.setdefault(row["source"], []).append((tokens_at[row["step"]], loss_of(row)))
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    if train:
        tokens, losses = zip(*train, strict=True)
        axes.plot(tokens, losses, color="#c8c8c8", linewidth=0.8, label="training, each step")
        axes.plot(tokens, _running_mean(losses), color="#333333", linewidth=1.3, label="training, running mean")
    for (source, points), color in zip(validation.items(), cycle(HELD_OUT_COLORS), strict=False):
        name = f"validation {source}".rstrip()
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=name)
        if source in unigram:
            axes.axhline(unigram[source], color=color, linestyle="--", linewidth=1, label=f"unigram model ({name})")
    for row in (row for row in rows if row["kind"] == "stage"):
        start = tokens_at.get(row["step"], 0)
        axes.axvline(start, color="#999999", linestyle=":", linewidth=1)
        axes.annotate(
            row["name"], (start, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points",
            fontsize=8, color="#666666",
        )  # fmt: skip
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    pyplot.close(figure)
    write_atomically(target, picture.getvalue())


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean of the last twentieth of the run at every step."""
    width = max(1, len(values) // 20)
    sums = [0.0, *accumulate(values)]
    starts = [max(0, end - width) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]
