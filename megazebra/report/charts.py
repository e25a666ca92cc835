"""Curves over the steps of a run, as SVG that needs nothing beside it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

from megazebra.report.html import Html

COLORS = ("#1f3a5f", "#c8553d", "#3f7d5a", "#8e44ad", "#d68910", "#16a085")
FAINT = "#c3c9d1"
Points = Sequence[tuple[float, float]]
# More would make the page heavy and show nothing: a curve is some 700 pixels wide.
MOST_POINTS = 1500


def curves(
    title: str,
    unit: str,
    lines: Mapping[str, Points],
    *,
    faint: frozenset[str] = frozenset(),
    styles: Mapping[str, str] | None = None,
    stages: Mapping[str, int] | None = None,
    zero: bool = False,
) -> Html:
    """A chart of lines by name, x being steps; nothing where none has a point beside zero.

    faint: names of lines in the background. styles: matplotlib's formats by name, where a point is to be seen as one.
    stages: names and the step each begins with. zero: the axis begins at zero.
    """
    lines = {name: thinned(points) for name, points in lines.items() if any(y for _, y in points)}
    if not lines:
        return Html("")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    # ids of the picture's parts follow from its title: the same run gives the same page, and charts don't share ids.
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.0))
        figure.subplots_adjust(left=0.12, right=0.98, top=0.91, bottom=0.15)
        for number, (name, points) in enumerate(lines.items()):
            color = FAINT if name in faint else COLORS[number % len(COLORS)]
            style = (styles or {}).get(name, "-" if len(points) > 1 else "o")
            label = name.replace("$", r"\$")  # no formula
            (line,) = axes.plot(
                *zip(*points, strict=True), style, color=color, linewidth=1.3, markersize=3.5, label=label
            )
            line.set_gid(f"curve-{number}")
        for name, step in (stages or {}).items():
            axes.axvline(step, color="#8a8577", linewidth=0.8, linestyle="--")
            axes.annotate(
                name.replace("$", r"\$"), (step, 0), (2, 4), xycoords=("data", "axes fraction"),
                textcoords="offset points", rotation=90, va="bottom", fontsize=7.5, color="#6b6558", clip_on=True,
            )  # fmt: skip
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel(unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        highest = max(y for points in lines.values() for _, y in points)
        if highest >= 1000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
        if zero:
            axes.set_ylim(0, 1.08 * highest)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        pyplot.close(figure)
    return _inline(picture.getvalue(), title)


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most about MOST_POINTS of them; of each run of neighbours the lowest and the highest, so that spikes stay."""
    size = -(-2 * len(points) // MOST_POINTS)
    if size <= 2:
        return list(points)
    kept = []
    for start in range(0, len(points), size):
        run = points[start : start + size]
        kept += sorted({min(run, key=lambda point: point[1]), max(run, key=lambda point: point[1])})
    return kept


def _inline(svg: str, title: str) -> Html:
    """The <svg> element alone, its ids its own within the page, scaled to the room there is."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2)
    svg = svg.replace("xlink:href", "href")
    own = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'id="([^"]+)"', rf'id="{own}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{own}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{own}-\1)", svg)
    return Html(re.sub(r'width="[^"]*pt" ?', "", re.sub(r'height="[^"]*pt" ?', "", svg, count=1), count=1))
