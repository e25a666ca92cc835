"""Files made wrong: bits and bytes anywhere, and fields of what the format knows."""

from __future__ import annotations

import json
from random import Random
from typing import Any

# What fields of files are wrong by: no number, no count, no index, beyond 32 or 64 bits, a way out of the folder.
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        3,
        7,
        255,
        2**16,
        2**31 - 1,
        2**31,
        2**32,
        2**60,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
    ),
    *(0.0, -0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        " ",
        "x",
        "0",
        "-1",
        "null",
        "nan",
        "\0",
        "\ud800",
        "é",
        "..",
        "../../escape",
        "/etc/passwd",
        "a" * 5000,
        "💥\n",
    ),
    *([], {}, [[]], [None], [-1, -1], [2**40, 2**40], {"": {}}, {"x": [1]}, [0] * 300),
]
WORDS = [
    b"",
    b"0",
    b"-1",
    b"1e999",
    b".nan",
    b"[]",
    b"{}",
    b"[[",
    b"}",
    b": :",
    b"&a",
    b"*a",
    b"!!python/object:os.system",
    b"!x",
    b"'",
    b'"',
    b"#",
    b"\t",
    b"\0",
    b"\xff\xfe",
    b"---\n",
    b"? a\n: b\n",
    b"[" * 3000,
    b"9" * 5000,
    b"stages:",
    b"train:",
]
NUMBERS = [0, 1, 2, -1, 127, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, -(2**63)]


def mutate(name: str, content: bytes, random: Random) -> bytes:
    """The content of a file of that name, made wrong in one or a few places."""
    if random.random() < 0.6:
        try:
            return _mutate_fields(name, content, random)
        except (ValueError, RecursionError):  # it has been made wrong before
            pass
    for _ in range(random.choice([1, 1, 1, 2, 5])):
        content = _mutate_bytes(content, random)
    return content


def _mutate_fields(name: str, content: bytes, random: Random) -> bytes:
    if name.endswith(".json"):
        return _dumped(_mutate_tree(json.loads(content), random))
    if name.endswith(".jsonl"):
        lines = content.splitlines()
        where = random.randrange(len(lines))
        lines[where] = _dumped(_mutate_tree(json.loads(lines[where]), random))
        return b"\n".join(lines) + b"\n"
    if name.endswith(".safetensors"):
        size = int.from_bytes(content[:8], "little")
        header = _dumped(_mutate_tree(json.loads(content[8 : 8 + size]), random))
        return len(header).to_bytes(8, "little") + header + content[8 + size :]
    if name.endswith((".yaml", ".txt")):
        return _mutate_words(content, random)
    return _mutate_number(content, random)


def _dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def _mutate_tree(tree: Any, random: Random) -> Any:
    """A copy with a value replaced, a key removed or renamed, or entries added, somewhere in it."""
    if random.random() < 0.02:
        return random.choice(VALUES)
    place = tree
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = random.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and random.random() < 0.85:
            place = place[key]
            continue
        action = random.random()
        if action < 0.7:
            place[key] = random.choice(VALUES)
        elif action < 0.8:
            del place[key]
        elif isinstance(place, dict):
            place[random.choice(["", "x", "../x", f"{key}|", str(key)[:-1], "\ud800"])] = place.pop(key)
        else:
            place.insert(key, random.choice(VALUES))
        return tree
    return random.choice(VALUES)


def _mutate_words(content: bytes, random: Random) -> bytes:
    """A line of text with a word or a number in place of another, doubled, or gone."""
    lines = content.split(b"\n")
    where = random.randrange(len(lines))
    action = random.random()
    if action < 0.6:
        start = random.choice([at for at, byte in enumerate(lines[where]) if byte in b" :=,["] or [0])
        value = random.choice([*WORDS, *(_dumped(value) for value in VALUES)])
        lines[where] = lines[where][: start + 1] + value + (lines[where][start + 2 :] if random.random() < 0.2 else b"")
    elif action < 0.8:
        lines.insert(where, lines[random.randrange(len(lines))])
    elif action < 0.9:
        lines[where] = b"  " + lines[where]
    else:
        del lines[where]
    return b"\n".join(lines)


def _mutate_number(content: bytes, random: Random) -> bytes:
    """Another number in a place where binary formats have theirs: often in the header."""
    width = random.choice([4, 8])
    last = max(0, min(len(content), 64) if random.random() < 0.6 else len(content))
    start = random.randrange(0, last + 1, width)
    number = random.choice(NUMBERS) % 2 ** (8 * width)
    return content[:start] + number.to_bytes(width, "little") + content[start + width :]


def _mutate_bytes(content: bytes, random: Random) -> bytes:
    start = random.randrange(len(content) + 1)
    action = random.choice(["flip", "flip", "cut", "insert", "remove", "repeat", "zero"])
    if action == "flip" and start < len(content):
        return content[:start] + bytes([content[start] ^ 1 << random.randrange(8)]) + content[start + 1 :]
    if action == "cut":
        return content[:start]
    if action == "insert":
        return content[:start] + random.choice([random.randbytes(8), *WORDS]) + content[start:]
    end = min(len(content), start + random.choice([1, 4, 8, 64]))
    if action == "remove":
        return content[:start] + content[end:]
    if action == "repeat":
        return content[:end] + content[start:end] * random.choice([1, 3]) + content[end:]
    return content[:start] + bytes(end - start) + content[end:]
