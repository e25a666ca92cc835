"""Megatron's order of samples, bit for bit: that of megatron-core's GPTDataset for the training split of one corpus.

All epochs' documents are shuffled as one list, laid end to end and cut every seq_len tokens, and the samples are
shuffled. When less than 80 % of the last epoch is needed, its documents and its samples are shuffled apart and come
last. Both shuffles are those of numpy.random.RandomState(seed), one after the other.

Hence the number of samples asked for decides the order: a lengthened run sees other samples from its start on. The
default order of order.py has no such tie.

Memory: 4 bytes per document and epoch, 4 per sample. Nothing is written, so ranks can't race for a file.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megazebra.data.errors import CorpusError
from megazebra.data.index.builder import native
from megazebra.data.index.documents import Documents, end_to_end
from megazebra.data.index.order import Pieces, count_samples, cut_pieces

FINAL_EPOCH_SHARE = 0.80
BLOCK_DOCUMENTS = 64  # between two remembered positions: 2 bits per document, and a search of one block
GATHERED_DOCUMENTS = 2**20
MAX_DOCUMENTS = 2**31 - 1  # Megatron's int32
MAX_SAMPLES = 2**32 - 2  # beyond, Megatron draws 64 bits at a time


class MegatronOrder:
    """The samples of a Megatron run over one corpus.

    sequence_lengths: integers [S], of the .idx; with Megatron's `--split` those of its training part, which comes
    first. seq_len: L; a sample has L + 1 tokens. num_samples: how many Megatron was asked for (None: one epoch); it
    may make more. source: what errors call the corpus.

    num_samples: how many there are. samples_per_epoch: the whole samples of one epoch.

    Raises CorpusError when the corpus has fewer than L + 1 tokens, for a seed outside [0, 2^32) and for more
    documents or samples than Megatron can number.
    """

    def __init__(
        self,
        sequence_lengths: NDArray[np.integer],
        seq_len: int,
        seed: int = 0,
        num_samples: int | None = None,
        *,
        source: str = "the corpus",
    ) -> None:
        self.seq_len = seq_len
        sequences = Documents(sequence_lengths)
        self._lengths, tokens = sequences.lengths, sequences.tokens
        self.samples_per_epoch = count_samples(tokens, seq_len, source)
        wanted = num_samples or self.samples_per_epoch
        epochs = -(-(wanted * seq_len + 1) // tokens)
        self.num_samples = (epochs * tokens - 1) // seq_len
        _check_limits(seed, len(self._lengths) * epochs, self.num_samples, source)
        samples_before_final = ((epochs - 1) * tokens - 1) // seq_len
        enough = int(FINAL_EPOCH_SHARE * self.samples_per_epoch)
        separate_final = epochs > 1 and wanted - samples_before_final < enough

        builder = native()
        state = np.random.RandomState(seed) if builder is None else builder.RandomState(seed)
        self._documents = np.tile(np.arange(len(self._lengths), dtype=np.int32), epochs)
        cut = len(self._lengths) * (epochs - 1) if separate_final else len(self._documents)
        state.shuffle(self._documents[:cut])
        state.shuffle(self._documents[cut:])
        self._turns = np.arange(self.num_samples, dtype=np.uint32)
        cut = samples_before_final if separate_final else self.num_samples
        state.shuffle(self._turns[:cut])
        state.shuffle(self._turns[cut:])
        if builder is None:
            self._starts = _block_starts(self._lengths, self._documents)
        else:
            self._starts = builder.listed_block_starts(self._lengths, self._documents, BLOCK_DOCUMENTS)

    @property
    def state_bytes(self) -> int:
        """What the order keeps in memory beside the sequences' lengths."""
        return self._documents.nbytes + self._turns.nbytes + self._starts.nbytes

    def locate(self, index: int) -> Pieces:
        """The pieces of sample `index`, in order; their lengths add up to seq_len + 1. Documents are sequences.

        Raises IndexError outside [0, num_samples).
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        position, length = int(self._turns[index]) * self.seq_len, self.seq_len + 1
        if (builder := native()) is not None:
            return Pieces(
                *builder.locate_listed(self._lengths, self._documents, self._starts, BLOCK_DOCUMENTS, position, length)
            )
        first = int(np.searchsorted(self._starts, position, side="right")) - 1
        last = int(np.searchsorted(self._starts, position + length, side="left"))
        documents = self._documents[first * BLOCK_DOCUMENTS : last * BLOCK_DOCUMENTS]
        return cut_pieces(documents, self._lengths[documents], position - int(self._starts[first]), length)


def _block_starts(lengths: NDArray[np.integer], documents: NDArray[np.int32]) -> NDArray[np.int64]:
    """Token positions of every BLOCK_DOCUMENTS-th entry of `documents`, and the end of the last."""
    sums = []
    for first in range(0, len(documents), GATHERED_DOCUMENTS):
        gathered = lengths[documents[first : first + GATHERED_DOCUMENTS]]
        sums.append(np.add.reduceat(gathered, np.arange(0, len(gathered), BLOCK_DOCUMENTS), dtype=np.int64))
    return end_to_end(np.concatenate(sums))


def _check_limits(seed: int, documents: int, samples: int, source: str) -> None:
    if not 0 <= seed < 2**32:
        raise CorpusError(f"seed={seed} is outside 0 to 2^32 - 1, which Megatron's order takes; choose another")
    for count, limit, things in (
        (documents, MAX_DOCUMENTS, "documents over all epochs"),
        (samples, MAX_SAMPLES, "samples"),
    ):
        if count > limit:
            raise CorpusError(f"{source} makes {count} {things}, Megatron's order numbers {limit}; take the default")
