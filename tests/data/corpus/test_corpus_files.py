"""Writing and opening corpora: what appears, what is refused, and what survives threads, forks and pickles."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from index_files import pack_idx, place

from megazebra.data.corpus import corpus_writer, index_reader
from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.corpus.index_format import token_dtype
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.errors import CorpusError


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "corpus", [[1, 2, 3], [4], [], [5, 6]])


def write(prefix: Path, documents: list[list[int]], **options) -> Path:
    with CorpusWriter(prefix, **{"vocab_size": 10, **options}) as writer:
        writer.add_documents(documents)
    return prefix


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_appear_together_and_no_others(prefix):
    assert names(prefix.parent) == ["corpus.bin", "corpus.idx", "corpus.meta.json"]


def test_nothing_appears_when_the_block_fails(tmp_path):
    def fail_after_one_document():
        with CorpusWriter(tmp_path / "corpus", vocab_size=10) as writer:
            writer.add_document([1])
            assert names(tmp_path) == ["corpus.bin.partial"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_after_one_document()
    assert names(tmp_path) == []


def test_failing_replacement_leaves_the_old_corpus(prefix):
    before = Corpus(prefix).fingerprint
    with pytest.raises(CorpusError, match="outside the vocabulary"):
        write(prefix, [[1], [10]])
    assert Corpus(prefix).fingerprint == before


def test_no_index_is_visible_beside_files_of_another_build(prefix, monkeypatch):
    """Stop between the renames: the old .idx has to be gone by then."""
    monkeypatch.setattr(corpus_writer.os, "replace", lambda source, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(prefix, [[7]])
    with pytest.raises(CorpusError, match=r"corpus\.idx does not exist"):
        Corpus(prefix)


@pytest.mark.parametrize("bad", [-1, 10, 65_536 + 1, 2**32 + 1, 2**63 - 1])
def test_token_ids_outside_the_vocabulary_are_refused_not_wrapped(tmp_path, bad):
    with pytest.raises(CorpusError, match=f"document 1 has token id {bad} at position 2, outside the vocabulary of 10"):
        write(tmp_path / "corpus", [[1], [2, 3, bad]])


@pytest.mark.parametrize("bad", [[0.5], [[1]], ["a"], [None], [[1], [1, 2]], [True], [2**64]])
def test_documents_have_to_be_lists_of_integers(tmp_path, bad):
    with pytest.raises(CorpusError, match="integer token ids"):
        write(tmp_path / "corpus", [bad])


def test_type_too_small_for_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="uint8 cannot hold a vocabulary of 257 tokens"):
        CorpusWriter(tmp_path / "corpus", vocab_size=257, dtype=np.uint8)
    with pytest.raises(CorpusError, match="float32 is no token type"):
        CorpusWriter(tmp_path / "corpus", vocab_size=257, dtype=np.float32)


@pytest.mark.parametrize("eod_id", [-1, 10, 10**9])
def test_end_token_outside_the_vocabulary_is_refused(tmp_path, eod_id):
    with pytest.raises(CorpusError, match=f"eod_id={eod_id} is outside the vocabulary of 10;"):
        CorpusWriter(tmp_path / "corpus", vocab_size=10, eod_id=eod_id)


def test_default_type_is_megatrons():
    assert token_dtype(65_499) == np.uint16
    assert token_dtype(65_500) == np.int32


def test_corpus_without_tokens_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="no tokens were written"):
        write(tmp_path / "corpus", [[], []])
    assert names(tmp_path) == []


def test_documents_longer_than_a_sequence_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_writer, "LONGEST_SEQUENCE", 4)
    documents = [list(range(9)), [1], list(range(4))]
    corpus = Corpus(write(tmp_path / "corpus", documents))
    assert [corpus.read(i).tolist() for i in range(3)] == documents
    assert corpus.read(0, 3, 4).tolist() == [3, 4, 5, 6]


def test_sidecar_says_what_was_written(prefix):
    meta = Corpus(prefix).meta
    assert (meta.tokens, meta.documents, meta.vocab_size, meta.dtype, meta.eod_id) == (6, 4, 10, "uint16", None)
    assert meta.unigram_entropy == pytest.approx(np.log(6))


def test_missing_files_are_named_with_the_key(prefix):
    with pytest.raises(CorpusError) as raised:
        Corpus("nowhere/x")
    assert str(raised.value) == (
        "data.path='nowhere/x': nowhere/x.idx does not exist; "
        "build it with tools/preprocess_data.py or correct the path"
    )
    with pytest.raises(CorpusError, match=r"data\.validation_path=.* give the prefix without its suffix"):
        Corpus(f"{prefix}.idx", field="data.validation_path")
    os.remove(f"{prefix}.bin")
    with pytest.raises(CorpusError, match=r"corpus\.bin does not exist"):
        Corpus(prefix)


def test_slices_and_their_bounds(prefix):
    corpus = Corpus(prefix)
    assert corpus.read(0, 1).tolist() == [2, 3]
    assert corpus.read(0, 1, 1).tolist() == [2]
    assert corpus.read(0, 3).tolist() == []
    for outside in ((4,), (-1,), (0, 2, 2), (0, -1), (0, 0, -1)):
        with pytest.raises(IndexError):
            corpus.read(*outside)


def test_bin_truncated_after_opening_is_an_error(prefix):
    corpus = Corpus(prefix)
    os.truncate(f"{prefix}.bin", 9)
    assert corpus.read(0).tolist() == [1, 2, 3]
    with pytest.raises(CorpusError, match="ends at byte 9 although it had 12"):
        corpus.read(3)


def test_replaced_corpus_stays_readable_while_it_is_open(prefix):
    corpus = Corpus(prefix)
    write(prefix, [[9, 9, 9, 9]])
    assert corpus.read(0).tolist() == [1, 2, 3]


def test_closed_corpus_reads_nothing(prefix):
    corpus = Corpus(prefix)
    corpus.close()
    corpus.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        corpus.read(0)


def test_vocabulary_larger_than_the_models_is_refused(prefix):
    with pytest.raises(CorpusError, match=r"a vocabulary of 10 tokens, more than model\.vocab_size=9"):
        Corpus(prefix, vocab_size=9)
    os.remove(f"{prefix}.meta.json")
    corpus = Corpus(prefix, vocab_size=6)
    with pytest.raises(CorpusError, match="document 3 has token id 6 at position 1, outside the vocabulary"):
        corpus.read(3)


def test_fingerprint_follows_content_not_place(prefix, tmp_path):
    same = write(tmp_path / "elsewhere" / "copy", [[1, 2, 3], [4], [], [5, 6]])
    other_tokens = write(tmp_path / "tokens", [[1, 2, 3], [4], [], [5, 7]])
    other_lengths = write(tmp_path / "lengths", [[1, 2, 3], [4, 5], [], [6]])
    fingerprints = [Corpus(path).fingerprint for path in (prefix, same, other_tokens, other_lengths)]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3


def test_pickling_reopens_and_notices_a_replacement(prefix):
    pickled = pickle.dumps(Corpus(prefix))
    assert pickle.loads(pickled).read(3).tolist() == [5, 6]
    write(prefix, [[9]])
    with pytest.raises(CorpusError, match="has been replaced since"):
        pickle.loads(pickled)


def test_pickling_keeps_what_the_documents_are(prefix):
    corpus = Corpus(prefix, by_sequence=True)
    assert [each.document_lengths.tolist() for each in (corpus, pickle.loads(pickle.dumps(corpus)))] == [[3, 1, 2]] * 2


def test_memory_is_four_bytes_per_document(tmp_path, monkeypatch):
    """And eight while the index is read: the file's own arrays would take twenty."""
    monkeypatch.setattr(index_reader, "PIECE", 2**12)
    documents = 200_000
    idx = pack_idx(1, [1] * documents, range(documents), range(documents + 1))
    prefix = place(tmp_path, idx, bytes(documents))
    tracemalloc.start()
    try:
        table = index_reader.read_index(str(prefix), documents)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert table.documents == len(table.lengths) == documents
    assert 4 * documents <= held < 5 * documents
    assert peak < 10 * documents


def test_threads_share_one_corpus(tmp_path):
    documents = [[n % 10] * (n + 1) for n in range(50)]
    corpus = Corpus(write(tmp_path / "corpus", documents))
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda n: corpus.read(n % 50).tolist(), range(1000)))
    assert read == [documents[n % 50] for n in range(1000)]


def test_data_without_torch():
    """Preprocessing and inspection should start quickly."""
    program = "import sys, megazebra.data.prepare.preprocess, megazebra.data.samples; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
