"""One picture of a run for a terminal of any width, by rich."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megazebra.monitor.plot import blocks, braille
from megazebra.monitor.state import RunState, number_in
from megazebra.report.html import amount, number

WIDE = 130  # columns from which tables stand side by side
_HIGHEST_PLOT, _LOWEST_PLOT = 14, 4  # lines
_BESIDE_PLOT = 34  # lines that everything else takes
_SPARK = 12
_LONGEST_BAR = 120
_EVALUATED = ("exact_match", "loss")


def frame(state: RunState, name: str, silent_for: float | None, width: int, height: int) -> RenderableType:
    """name: of the run. silent_for: seconds for which the run has been suspiciously still; None where it has not."""
    parts: list[RenderableType] = [_header(state, name, silent_for)]
    if state.last is None:
        return Group(*parts, Text("No step is made yet: the run is starting, or it has ended before its first.\n"))
    parts.append(_progress(state, width))
    plot_height = max(_LOWEST_PLOT, min(_HIGHEST_PLOT, height - _BESIDE_PLOT))
    if len(state.losses):
        parts.append(_plot(state, width, plot_height))
    left = [_numbers(state)]
    right = [
        table for table in (_validation(state), _evaluations(state), _communication(state), _saved(state)) if table
    ]
    if width >= WIDE:
        columns = Table.grid(padding=(0, 3))
        columns.add_row(Group(*left), Group(*right))
        parts.append(columns)
    else:
        parts += [*left, *right]
    return Group(*parts)


def _header(state: RunState, name: str, silent_for: float | None) -> Text:
    status, style = _status(state, silent_for)
    header = Text.assemble((printable(name), "bold"))
    if state.stage is not None:
        header.append(f"  stage {printable(str(state.stage.get('name', '')))}")
    return header.append("  ").append(status, style=style)


def _status(state: RunState, silent_for: float | None) -> tuple[str, str]:
    if state.finished():
        return "finished", "bold green"
    if silent_for is not None:
        return f"nothing written for {duration(silent_for)}: stopped, hanging or waiting?", "bold red"
    return ("starting", "yellow") if state.last is None else ("running", "green")


def _progress(state: RunState, width: int) -> RenderableType:
    total, left = state.plan.total_steps, state.seconds_left()
    text = f"step {state.step:,}" + (f" of {total:,} ({state.step / total:.1%})" if total else "")
    if left is not None and not state.finished():
        text += f", {duration(left)} left at this speed" if left else ", the last checkpoint is being saved"
    if not total:
        return Text(text)
    length = min(width, _LONGEST_BAR)
    done = length * min(state.step, total) // total
    return Group(Text(text), Text.assemble(("━" * done, "green"), ("╌" * (length - done), "dim"), no_wrap=True))


def _plot(state: RunState, width: int, height: int) -> Panel:
    labels = 9
    lines, lowest, highest = braille(state.losses, max(8, min(width, 160) - labels - 5), height)
    margins = [f"{highest:.4g}", *[""] * (height - 2), f"{lowest:.4g}"]
    body = "\n".join(f"{margin:>{labels - 1}} {line}" for margin, line in zip(margins, lines, strict=True))
    first, last = state.losses.steps[0], state.losses.steps[-1]
    return Panel(Text(body, no_wrap=True), title=f"loss, steps {first:,} to {last:,}", box=box.ROUNDED, expand=False)


def _numbers(state: RunState) -> Table:
    assert state.last is not None
    last = state.last
    table = _table("", "now", f"median of {len(state.recent)}", f"last {_SPARK}")

    def add(title: str, name: str, unit: str = "", form: str = "") -> None:
        values = state.recent_values(name)
        if values:
            now = number_in(last, name)
            shown = [_formatted(value, unit, form) for value in (now, state.median(name))]
            table.add_row(title, *shown, blocks(values, _SPARK))

    add("loss", "loss", form=".4f")
    add("gradient norm", "grad_norm")
    add("learning rate", "lr", form=".3e")
    add("throughput", "tokens_per_s", "tok/s")
    add("each device", "flops_per_s", "FLOP/s")
    add("MFU", "mfu", form=".1%")
    add("step", "step_time_s", "s")
    add("waiting for data", "data_wait_s", "s")
    add("spread of ranks", "step_spread_s", "s")
    add("halos hidden", "halo_overlap", form=".0%")
    add("peak memory, rank 0", "peak_memory_bytes", "B")
    for title, text in _remarks(state):
        table.add_row(title, text, "", "")
    return table


def _remarks(state: RunState) -> Iterator[tuple[str, str]]:
    assert state.last is not None
    yield "tokens", number(state.last.get("tokens"))
    if (straggler := state.usual_straggler()) is not None:
        yield "mostly the slowest", f"rank {straggler[0]} ({straggler[1]:.0%})"
    skipped = f"{state.skipped:,}"
    if state.last_skipped is not None:
        skipped += f" (step {state.last_skipped['step']:,})"
    yield "skipped updates", skipped


def _validation(state: RunState) -> Table | None:
    if not any(map(len, state.validation.values())):
        return None
    table = _table("validation loss", "now", "before", "step")
    for source, series in state.validation.items():
        if len(series):
            before = f"{series.values[-2]:.4f}" if len(series) > 1 else "–"
            table.add_row(printable(source) or "held out", f"{series.values[-1]:.4f}", before, f"{series.steps[-1]:,}")
    return table


def _evaluations(state: RunState) -> Table | None:
    """Means over the depths of an answer, or the spans of a text."""
    if not state.evaluations:
        return None
    table = _table("evaluation", "length", "exact", "worst", "loss", "step")
    for (task, length), by_place in sorted(state.evaluations.items()):
        rows = by_place.values()
        measured = {name: [x for row in rows if (x := number_in(row, name)) is not None] for name in _EVALUATED}
        means = {name: statistics.fmean(values) if values else None for name, values in measured.items()}
        table.add_row(
            printable(task),
            f"{length:,}",
            _formatted(means["exact_match"], "", ".1%"),
            _formatted(min(measured["exact_match"], default=None), "", ".1%"),
            _formatted(means["loss"], "", ".3f"),
            f"{max(row['step'] for row in rows):,}",
        )
    return table


def _communication(state: RunState) -> Table | None:
    assert state.last is not None
    by_group: dict[str, list[float]] = {}
    tallies = state.last.get("comm")
    for name, tally in tallies.items() if isinstance(tallies, dict) else ():
        counted = by_group.setdefault(name.partition(".")[0], [0, 0])
        if isinstance(tally, dict):
            counted[0] += number_in(tally, "calls") or 0
            counted[1] += number_in(tally, "bytes") or 0
    if not by_group:
        return None
    table = _table("received by rank 0", "calls", "bytes in a step")
    for group, (calls, received) in sorted(by_group.items(), key=lambda item: -item[1][1]):
        table.add_row(printable(group), f"{calls:,.0f}", amount(received, "B"))
    return table


def _saved(state: RunState) -> Table | None:
    if not state.checkpoints:
        return None
    table = _table(f"checkpoints: {state.checkpoint_count:,}", "size", "stall", "written in")
    for row in state.checkpoints:
        seconds = [_formatted(number_in(row, name), "s", "") for name in ("stall_s", "seconds")]
        table.add_row(f"step {row['step']:,}", amount(number_in(row, "bytes"), "B"), *seconds)
    if state.epochs:
        gone_through = ", ".join(f"{source} {number(count)}" for source, count in state.epochs.items())
        table.caption = printable(f"epochs: {gone_through}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", caption_justify="left")
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _formatted(value: float | None, unit: str, form: str) -> str:
    if value is None:
        return "–"
    if unit:
        return amount(value, unit) if value >= 1 or value == 0 or unit != "s" else f"{1e3 * value:.3g} ms"
    return format(value, form) if form else number(value)


def duration(seconds: float) -> str:
    """3 d 4 h, 2 h 5 min, 7 min 3 s, 12 s."""
    whole = round(seconds)
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {smaller_unit}"
    return f"{whole} s"


def printable(text: str) -> str:
    """Without characters that would drive the terminal: files may come from anywhere."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
