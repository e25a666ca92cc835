"""Make fixtures/: corpora written by megatron-core's own IndexedDatasetBuilder, and what its own reader finds in them.

python tests/data/corpus/make_megatron_files.py

Run by hand, in an environment that has torch and megatron-core 0.16.1; the tests need neither.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import megatron.core
import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

FOLDER = Path(__file__).parent / "fixtures"

# Every document is a list of sequences; one without sequences is empty.
CORPORA: dict[str, tuple[type, list[list[list[int]]]]] = {
    "small_vocabulary": (np.uint16, [[], [[1, 2, 3]], [[65_499]], [], [], [[4, 0]], []]),
    "large_vocabulary": (np.int32, [[], [[70_000, 2]], [], [[3, 150_000, 65_536]], []]),
    "sequences": (np.uint16, [[[1, 2], [3]], [], [[4]], [[5], [], [6, 7, 8]], [[]]]),
    "bytes": (np.uint8, [[[0, 255]], [[7]]]),
    "signed_bytes": (np.int8, [[[0, 127]], [[7]]]),
    "short": (np.int16, [[[0, 32_767]], [[7]]]),
    "long": (np.int64, [[[0, 150_000]], [[7]]]),
    "largest_ids": (np.int64, [[[2**31 - 1, 2**31, 2**63 - 1]]]),
}
MULTIMODAL = [[[1, 2], [3]], [[4, 5, 6]]]
MODES = [[0, 1], [1]]


def write(name: str, dtype: type, documents: list[list[list[int]]], modes: list[list[int]] | None = None) -> None:
    builder = IndexedDatasetBuilder(str(FOLDER / f"{name}.bin"), dtype=dtype, multimodal=modes is not None)
    for number, sequences in enumerate(documents):
        for position, sequence in enumerate(sequences):
            builder.add_item(torch.tensor(sequence, dtype=torch.int64), modes[number][position] if modes else 0)
        builder.end_document()
    builder.finalize(str(FOLDER / f"{name}.idx"))


def found(name: str, multimodal: bool = False) -> dict[str, Any]:
    """What Megatron reads."""
    dataset = IndexedDataset(str(FOLDER / name), multimodal=multimodal)
    items = [dataset[i] for i in range(len(dataset))]
    return {
        "dtype": np.dtype(dataset.index.dtype).name,
        "sequences": [(item[0] if multimodal else item).tolist() for item in items],
        "boundaries": dataset.document_indices.tolist(),
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, (dtype, documents) in CORPORA.items():
        write(name, dtype, documents)
    write("multimodal", np.uint16, MULTIMODAL, MODES)
    merged = IndexedDatasetBuilder(str(FOLDER / "merged.bin"), dtype=np.uint16)
    for name in ("small_vocabulary", "sequences", "small_vocabulary"):
        merged.add_index(str(FOLDER / name))
    merged.finalize(str(FOLDER / "merged.idx"))
    corpora = {name: found(name, name == "multimodal") for name in (*CORPORA, "multimodal", "merged")}
    content = {"megatron-core": megatron.core.__version__, "corpora": corpora}
    (FOLDER / "megatron_files.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
