"""The texts that tests of preprocess_data.py build corpora of, and what lies in the output folder then."""

from __future__ import annotations

import hashlib
from pathlib import Path

FILES = 40
ALL_FILES = {f"{name}.{suffix}" for name in ("train", "validation") for suffix in ("bin", "idx", "meta.json")}
ALL_FILES.add("tokenizer.json")


def text(n: int) -> str:
    return "".join(f"def function_{n}_{i}(x):\n    return x * {i}\n" for i in range(n + 1))


def write_texts(folder: Path) -> None:
    """FILES of them, an empty file, and one that is not UTF-8."""
    folder.mkdir()
    for n in range(FILES):
        (folder / f"{n:02}.txt").write_text(text(n))
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("größer".encode("latin-1"))


def content(folder: Path) -> dict[str, str]:
    """Hashes by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}
