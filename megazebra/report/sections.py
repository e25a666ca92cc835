"""The parts of the page about a run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from megazebra.config.stages import stages_of
from megazebra.plan.flops import parameter_count
from megazebra.report import html
from megazebra.report.charts import Points, curves
from megazebra.report.evaluations import alike, row_table
from megazebra.report.html import Html, amount, number
from megazebra.report.run import Run

FINAL_MEAN_STEPS = 20  # at most; a tenth of a short run, as the console has it


def summary(run: Run) -> dict[str, Any]:
    """The run in a dozen lines."""
    train, config = run.of_kind("train"), run.config
    facts: dict[str, Any] = {}
    if config is not None:
        stages = stages_of(config)
        model = stages[-1].config.model  # as the run leaves it
        layers = "".join("L" if spec.is_local else "G" for spec in model.attention_specs())
        facts["model"] = f"{parameter_count(model) / 1e6:,.1f} M parameters, layers {layers}, window {model.window}"
    if train:
        last = train[-1]
        of = f" of {stages[-1].last_step:,}" if config is not None else ""
        facts["steps"] = f"{last['step']:,}{of}"
        facts["tokens"] = last.get("tokens")
        losses = [row["loss"] for row in train if row.get("loss") is not None]
        if losses:
            count = max(1, min(FINAL_MEAN_STEPS, len(losses) // 10))
            mean = statistics.fmean(losses[-count:])
            facts["training loss"] = f"{mean:.4f} (mean of the last {count} steps; began at {losses[0]:.4f})"
    for source, row in {row.get("source", ""): row for row in run.of_kind("validation")}.items():
        facts[f"validation loss {source}".rstrip()] = f"{number(row.get('loss'))} (step {row['step']:,})"
    if train:
        facts |= _speed(train)
    return facts


def _speed(train: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians leave out the first step, in which much is done for the first time."""
    steady = train[1:] or train
    time = sum(row.get("step_time_s") or 0 for row in train)
    waited = sum(row.get("data_wait_s") or 0 for row in train)
    mfu = _median(steady, "mfu")
    skipped = sum("skipped" in row for row in train)
    return {
        "time in steps": f"{time / 3600:.2f} h" if time >= 3600 else f"{time:,.1f} s",
        "tokens per second": f"{number(_median(steady, 'tokens_per_s'))} (median)",
        "model operations": f"{amount(_median(steady, 'flops_per_s'), 'FLOP/s')} per device (median)"
        + ("" if mfu is None else f", MFU {mfu:.1%}"),
        "peak memory": amount(max((row.get("peak_memory_bytes") or 0 for row in train), default=None), "B"),
        "received per step": f"{amount(_median(steady, 'comm_bytes'), 'B')} by rank 0 (median)",
        "waited for data": f"{waited / time:.1%} of the time" if time else "–",
        "skipped updates": skipped,
    }


def charts(run: Run) -> Html:
    """Curves of everything that is measured in every step."""
    train = run.of_kind("train")
    stages = {str(row.get("name", number)): row["step"] for number, row in enumerate(run.of_kind("stage"), 1)}
    losses = _points(train, "loss")
    held_out: dict[str, list[tuple[float, float]]] = {}
    for row in run.of_kind("validation"):
        if row.get("loss") is not None:
            name = f"validation {row.get('source', '')}".rstrip()
            held_out.setdefault(name, []).append((row["step"], row["loss"]))
    loss_lines = {"each step": losses, "running mean": _running_mean(losses), **held_out}
    skips = [row for row in train if "skipped" in row]

    def simple(title: str, unit: str, key: str, *, zero: bool = False) -> Html:
        return curves(title, unit, {title: _points(train, key)}, stages=stages, zero=zero)

    drawn = [
        curves(
            "Loss", "nats per token", loss_lines,
            faint=frozenset({"each step"}), styles=dict.fromkeys(held_out, "o-"), stages=stages,
        ),
        simple("Learning rate", "", "lr", zero=True),
        curves(
            "Gradient norm before clipping", "",
            {"gradient norm": _points(train, "grad_norm"), "update skipped": _points(skips, "grad_norm")},
            styles={"update skipped": "x"}, stages=stages, zero=True,
        ),
        simple("Throughput", "tokens/s", "tokens_per_s", zero=True),
        simple("Model FLOPs utilization", "share of the device's peak", "mfu", zero=True),
        simple("Model operations of a device", "FLOP/s", "flops_per_s", zero=True),
        curves(
            "Time of a step", "seconds",
            {"step": _points(train, "step_time_s"), "waiting for data": _points(train, "data_wait_s")},
            stages=stages, zero=True,
        ),
        simple("Peak memory of rank 0", "bytes", "peak_memory_bytes", zero=True),
        simple("Received by rank 0 in a step", "bytes", "comm_bytes", zero=True),
        simple("Halo traffic hidden behind computation", "share", "halo_overlap", zero=True),
    ]  # fmt: skip
    return html.element("div", *drawn, class_="charts") if any(drawn) else Html("")


def stages(run: Run) -> Html:
    """The rows that say where a stage begins, with all they say."""
    return row_table([_cells(row) for row in run.of_kind("stage")])


def validation(run: Run) -> Html:
    """A line for each step, a column for each held-out corpus."""
    rows = run.of_kind("validation")
    sources = list(dict.fromkeys(row.get("source", "") for row in rows))
    losses = {(row["step"], row.get("source", "")): row.get("loss") for row in rows}
    steps = sorted({row["step"] for row in rows})
    columns = ["step", *(f"loss {source}".rstrip() for source in sources)]
    return html.table(columns, ([step, *(losses.get((step, source)) for source in sources)] for step in steps))


def evaluation(run: Run) -> Html:
    """A table for each kind of task, a line for each step and cell."""
    return html.joined(row_table(group) for group in alike([_cells(row) for row in run.of_kind("evaluation")]))


def skipped(run: Run) -> Html:
    """Updates that the guard refused."""
    rows = [row for row in run.of_kind("train") if "skipped" in row]
    return html.table(["step", "why", "samples"], ([row["step"], row["skipped"], row.get("samples")] for row in rows))


def communication(run: Run) -> Html:
    """Means over the steps, by group and kind, and by what context parallelism does."""
    train = run.of_kind("train")

    def means(key: str) -> Iterator[list[Any]]:
        names = sorted({name for row in train for name in row.get(key) or {}})
        for name in names:
            tallies = [(row.get(key) or {}).get(name, {}) for row in train]
            calls, received = (sum(tally.get(what, 0) for tally in tallies) / len(train) for what in ("calls", "bytes"))
            yield [name, calls, received]

    return html.joined(
        html.table([first, "calls per step", "bytes received per step"], means(key))
        for first, key in (("group and kind", "comm"), ("context parallelism", "context"))
    )


def checkpoints(run: Run) -> Html:
    """Those that were completed, and which of them are still there."""
    rows = []
    for row in run.of_kind("checkpoint"):
        name = f"step_{row['step']:08}"
        state = "on disk" if name in run.checkpoints else "deleted"
        state += ", latest" if name == run.latest else ""
        rows.append([row["step"], amount(row.get("bytes"), "B"), row.get("stall_s"), row.get("seconds"), state])
    return html.table(["step", "size", "training stood still (s)", "until complete (s)", "state"], rows)


def epochs(run: Run) -> Html:
    """How often each source was gone through, by the last checkpoint."""
    rows = run.of_kind("data")
    return html.table(["source", "epochs"], (rows[-1].get("epochs") or {}).items()) if rows else Html("")


def configuration(run: Run) -> Html:
    """What was set, beside the defaults; then the whole file."""
    differences = run.config_differences()
    changed = html.table(
        ["not at its default", "value", "default"],
        ([key, _shown(value), _shown(default)] for key, (default, value) in differences.items()),
    )
    path = run.folder / "config.yaml"
    whole = html.element("pre", path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else ""
    return html.joined([changed, html.details("The whole configuration", whole)])


def environment(run: Run) -> dict[str, Any]:
    """As the newest checkpoint has recorded it."""
    if not run.checkpoints:
        return {}
    index = run.checkpoints.get(run.latest) or run.checkpoints[max(run.checkpoints)]
    layout = {f"layout: {name.replace('_', ' ')}": size for name, size in index.get("layout", {}).items()}
    return index.get("versions", {}) | layout


def _points(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _running_mean(points: Points) -> list[tuple[float, float]]:
    """Mean of the last twentieth of the run at every step."""
    width = max(1, len(points) // 20)
    sums = [0.0, *accumulate(value for _, value in points)]
    return [
        (step, (sums[end] - sums[max(0, end - width)]) / (end - max(0, end - width)))
        for end, (step, _) in enumerate(points, start=1)
    ]


def _median(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(values) if values else None


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    """The row as cells of a table."""
    cells = {name: value for name, value in row.items() if name != "kind"}
    return {name: _shown(value) if isinstance(value, dict | list) else value for name, value in cells.items()}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
