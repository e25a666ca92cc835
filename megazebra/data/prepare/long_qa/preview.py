"""A conversation as a person would read it."""

from __future__ import annotations

from typing import Any

AROUND = 160


def preview(conversation: dict[str, Any]) -> str:
    """The text around the facts that are asked for, those in >>> arrows <<<, then questions and answers."""
    about = conversation["long_qa"]
    content = conversation["messages"][0]["content"]
    evidence = [fact for question in about["questions"] for fact in question["evidence"]]
    facts = sorted((fact["start"], fact["start"] + len(fact["sentence"])) for fact in evidence)
    question_start = len(content) - len(about["questions"][0]["question"])
    text, shown = "", 0
    for start, end in _merged([(0, 0), *facts, (question_start, len(content))], len(content)):
        text += f" [... {start - shown:,} characters ...] " if start > shown else ""
        text += _marked(content, start, end, facts)
        shown = end
    lines = [f"{about['length']:,} of {about['target']:,} {about['unit']}", "", f"user: {text}"]
    lines += [f"{message['role']}: {message['content']}" for message in conversation["messages"][1:]]
    lines.append("")
    for question in about["questions"]:
        places = [f"depth {fact['depth']:.2f} distance {fact['distance']:,}" for fact in question["evidence"]]
        lines.append(f"{question['kind']}: {', '.join(places) or 'no fact'}")
    return "\n".join(lines)


def _merged(spans: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The spans, in their order, widened by what is around them, overlapping ones as one."""
    merged: list[tuple[int, int]] = []
    for start, end in ((max(0, start - AROUND), min(size, end + AROUND)) for start, end in spans):
        if merged and start <= merged[-1][1]:
            start, end = merged[-1][0], max(end, merged.pop()[1])
        merged.append((start, end))
    return merged


def _marked(content: str, start: int, end: int, facts: list[tuple[int, int]]) -> str:
    text, done = "", start
    for first, last in facts:
        if start <= first < end:
            text += f"{content[done:first]}>>> {content[first:last]} <<<"
            done = last
    return text + content[done:end]
