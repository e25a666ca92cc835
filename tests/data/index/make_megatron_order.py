"""Writes fixtures/megatron_order.npz: samples as megatron-core itself makes them. Run by hand, not by the tests.

    python tests/data/index/make_megatron_order.py

needs an environment with megatron-core; 0.16.1 made the file that is here. Every token of the corpora is its own
position, so that a sample's tokens say where they come from.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer
from numpy.typing import NDArray

FIXTURE = Path(__file__).parent / "fixtures" / "megatron_order.npz"

SHORT = np.random.default_rng(0).integers(1, 40, 300)  # 196 samples of 32; of a final epoch, 156 are the 80 %
EMPTY = np.where(SHORT % 5 == 0, 0, SHORT)
LONG = np.random.default_rng(1).integers(100, 400, 9)
TINY = np.array([3, 1, 4, 1, 5])
MANY = np.random.default_rng(2).integers(1, 4, 3000)

# name: sequence lengths, seq_len, seed, samples asked for, Megatron's --split
CASES = {
    "one_epoch": (SHORT, 32, 1234, 100, "100,0,0"),
    "final_epoch_apart": (SHORT, 32, 1234, 351, "100,0,0"),
    "final_epoch_together": (SHORT, 32, 1234, 352, "100,0,0"),
    "three_epochs": (SHORT, 64, 5, 200, "100,0,0"),
    "long_sequences": (LONG, 16, 0, 400, "100,0,0"),
    "tiny_many_epochs": (TINY, 8, 2**32 - 1, 200, "100,0,0"),
    "one_token_samples": (TINY, 1, 7, 30, "100,0,0"),
    "many_sequences": (MANY, 100, 42, 90, "100,0,0"),
    "empty_sequences": (EMPTY, 32, 1234, 200, "100,0,0"),
    "training_split": (SHORT, 32, 1234, 200, "80,20,0"),
}


def write_corpus(prefix: str, lengths: NDArray[np.int64]) -> None:
    """Two sequences to a document: Megatron's order knows sequences only."""
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    tokens = torch.arange(int(lengths.sum()), dtype=torch.int32)
    pieces = torch.split(tokens, lengths.tolist())
    for pair in range(0, len(pieces), 2):
        document = pieces[pair : pair + 2]
        builder.add_document(torch.cat(document), [len(piece) for piece in document])
    builder.finalize(prefix + ".idx")


def megatron_samples(prefix: str, seq_len: int, seed: int, num_samples: int, split: str) -> NDArray[np.int32]:
    """The samples of GPTDataset's training split, int32 [samples, seq_len + 1], as differences along each sample.

    Differences are mostly ones, which take little space.
    """
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_len,
        blend=([prefix], None),
        split=split,
        tokenizer=MegatronTokenizer.from_pretrained(metadata_path={"library": "null"}, vocab_size=2**20),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [num_samples, 0, 0]
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]
    samples = [dataset[i] for i in range(len(dataset))]
    tokens = np.array([[*sample["tokens"].tolist(), sample["labels"][-1].item()] for sample in samples])
    return np.diff(tokens, prepend=0).astype(np.int32)


def main() -> None:
    arrays = {}
    for name, (lengths, seq_len, seed, num_samples, split) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            prefix = str(Path(folder) / "corpus")
            write_corpus(prefix, lengths)
            arrays[f"{name}/samples"] = megatron_samples(prefix, seq_len, seed, num_samples, split)
        train_share, *rest = (float(share) for share in split.split(","))
        training = round(len(lengths) * train_share / (train_share + sum(rest)))
        arrays[f"{name}/lengths"] = lengths[:training].astype(np.int32)
        arrays[f"{name}/parameters"] = np.array([seq_len, seed, num_samples])
    np.savez_compressed(FIXTURE, **arrays)


if __name__ == "__main__":
    main()
