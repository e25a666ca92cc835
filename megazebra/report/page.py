"""The page about a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megazebra import __version__
from megazebra.report import html, sections
from megazebra.report.evaluations import Evaluation
from megazebra.report.html import Html
from megazebra.report.run import Run

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #222; background: #fff;
  max-width: 1240px; margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 0; }
h2 { font-size: 19px; margin: 36px 0 12px; border-bottom: 1px solid #ddd; padding-bottom: 4px; }
h3 { font-size: 15px; margin: 20px 0 8px; }
.path, .note { color: #666; margin: 2px 0 12px; overflow-wrap: anywhere; }
.warning { background: #fdf3e1; border-left: 4px solid #d68910; padding: 8px 12px; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 13.5px; margin: 0 0 12px; }
th, td { text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid #eee; vertical-align: top; }
thead th { border-bottom: 1px solid #bbb; font-weight: 600; }
.facts th { font-weight: 400; color: #666; white-space: nowrap; }
.facts td, td.long { overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.facts td.number { text-align: left; }
.scroll { overflow-x: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 16px; align-items: start; }
.charts svg { width: 100%; height: auto; }
.charts img { max-width: 100%; height: auto; }
summary { cursor: pointer; color: #1f3a5f; margin: 6px 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { .charts { grid-template-columns: 1fr 1fr; } body { max-width: none; } }
"""


def page(run: Run, evaluations: Sequence[Evaluation]) -> str:
    """The whole HTML document; it refers to nothing outside itself."""
    title = run.folder.resolve().name
    body = [
        html.element("h1", title),
        html.element("p", run.folder, class_="path"),
        *(html.element("p", warning, class_="warning") for warning in _warnings(run)),
        html.section("Summary", html.facts(sections.summary(run))),
        html.section("Training", sections.charts(run)),
        html.section("Stages", sections.stages(run)),
        html.section("Validation", sections.validation(run)),
        html.section("Evaluation while training", sections.evaluation(run)),
        html.section("Skipped updates", sections.skipped(run)),
        html.section("Communication", sections.communication(run)),
        html.section("Checkpoints", sections.checkpoints(run)),
        html.section("Data", sections.epochs(run)),
        *(html.section(f"Evaluation: {each.path.parent.name}", each.shown()) for each in evaluations),
        html.section("Configuration", sections.configuration(run)),
        html.section("Environment", html.facts(sections.environment(run))),
        html.element("p", f"Made by MegaZebra {__version__}.", class_="note"),
    ]
    head = html.joined(
        [
            Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
            html.element("title", f"{title}: training report"),
            html.element("style", Html(STYLE)),
        ]
    )
    content = html.joined([html.element("head", head), html.element("body", *body)])
    return f"<!DOCTYPE html>\n{html.element('html', content, lang='en')}\n"


def _warnings(run: Run) -> Iterator[str]:
    if run.damaged:
        yield f"{run.damaged} lines of metrics.jsonl are damaged and left out."
    if run.config is None:
        yield f"The configuration cannot be shown: {run.config_problem}"
    if not run.of_kind("train"):
        yield "The run has not made a step yet."
