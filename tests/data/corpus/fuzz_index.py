"""Open and read mutated indexes: python fuzz_index.py FOLDER MUTANTS SEED

Prints how many were refused and how many served. Anything else, a wrong answer, another exception, more memory than
the limit, ends the process with an error or a signal.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
from index_files import pack_idx, place

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.errors import CorpusError
from megazebra.data.index.order import Pieces

ALLOWED_BYTES = 64 * 2**20
BIN = bytes(range(48))
INDEXES = [
    pack_idx(1, [20, 28], [0, 20], [0, 1, 2]),
    pack_idx(8, [3, 1, 20], [0, 6, 8], [0, 0, 1, 1, 2, 3, 3]),
    pack_idx(8, [3, 1, 20], [0, 6, 8], [0, 2, 2, 3], modes=bytes(3)),
    pack_idx(4, [4, 0, 8], [32, 48, 0], [0, 1, 2, 3]),
    pack_idx(5, [1, 2, 3], [0, 8, 24], [0, 2, 3]),
]
HEADER_BYTES = 34
NUMBERS = [0, 1, 2, 3, 7, 48, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**61 + 1, 2**63 - 1, 2**63, 2**64 - 1]


def flip_bits(idx: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 3)):
        idx[chance.randrange(len(idx))] ^= 1 << chance.randrange(8)


def cut(idx: bytearray, chance: random.Random) -> None:
    del idx[chance.randrange(len(idx)) :]


def lengthen(idx: bytearray, chance: random.Random) -> None:
    idx += chance.randbytes(chance.randint(1, 40))


def set_number(idx: bytearray, chance: random.Random) -> None:
    """A length, offset or boundary, or a part of two of them."""
    at = HEADER_BYTES + 4 * chance.randrange((len(idx) - HEADER_BYTES) // 4)
    size = chance.choice((4, 8))
    idx[at : at + size] = chance.choice(NUMBERS).to_bytes(8, "little")[: min(size, len(idx) - at)]


def set_count(idx: bytearray, chance: random.Random) -> None:
    at = chance.choice((18, 26))
    idx[at : at + 8] = chance.choice(NUMBERS).to_bytes(8, "little")


def set_type(idx: bytearray, chance: random.Random) -> None:
    idx[17] = chance.randrange(10)


def swap_words(idx: bytearray, chance: random.Random) -> None:
    words = range(HEADER_BYTES, len(idx) - 3, 4)
    first, second = chance.choice(words), chance.choice(words)
    idx[first : first + 4], idx[second : second + 4] = idx[second : second + 4], idx[first : first + 4]


MUTATIONS = [flip_bits, cut, lengthen, set_number, set_count, set_type, swap_words]


def serves(corpus: Corpus) -> bool:
    """Whether all documents can be read, and what was promised is what comes; False when ids are refused."""
    lengths = corpus.document_lengths
    assert (lengths >= 0).all()
    assert corpus.tokens == int(lengths.sum()) > 0
    filled = np.flatnonzero(lengths)
    everything = Pieces(filled, np.zeros_like(filled), lengths[filled].astype(np.int64))
    try:
        read = [corpus.read(document) for document in range(corpus.documents)]
    except CorpusError:
        try:
            corpus.gather(everything)
        except CorpusError:
            return False
        raise AssertionError("what can't be read was gathered") from None
    assert [len(tokens) for tokens in read] == lengths.tolist()
    assert (corpus.gather(everything) == np.concatenate(read)).all()
    return True


def main(folder: Path, mutants: int, seed: int) -> None:
    chance = random.Random(seed)
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * page_bytes + ALLOWED_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcomes: Counter[str] = Counter(refused=0, unreadable=0, served=0)
    for _ in range(mutants):
        idx = bytearray(chance.choice(INDEXES))
        for mutate in chance.choices(MUTATIONS, k=chance.choice((1, 1, 2))):
            if len(idx) > HEADER_BYTES + 4:
                mutate(idx, chance)
        prefix = place(folder, bytes(idx), BIN[: chance.choice((48, 48, 48, 47, 0))])
        for by_sequence in (False, True):
            try:
                corpus = Corpus(prefix, vocab_size=chance.choice((None, 40)), by_sequence=by_sequence)
            except CorpusError:
                outcomes["refused"] += 1
                continue
            with closing(corpus):
                outcomes["served" if serves(corpus) else "unreadable"] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
