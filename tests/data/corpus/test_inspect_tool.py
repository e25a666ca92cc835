"""tools/inspect_data.py from its command line."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.prepare.encoders.tokenizer import byte_tokenizer, save_tokenizer, serialize

TOOL = Path(__file__).parents[3] / "tools" / "inspect_data.py"
specification = importlib.util.spec_from_file_location("inspect_data", TOOL)
tool = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tool)

TEXTS = ["Zebras have stripes.", "", "x" * 100, "red \x1b[31m naïve\n\ttext"]
EOD = 256


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "corpus")


def write(prefix: Path, texts: list[str] = TEXTS, **spans) -> Path:
    tokenizer = byte_tokenizer()
    save_tokenizer(tokenizer, prefix.parent / "tokenizer.json")
    with CorpusWriter(prefix, vocab_size=257, eod_id=EOD, with_spans=bool(spans)) as writer:
        writer.add_documents([[*text.encode(), EOD] if text else [] for text in texts], **spans)
        writer.record(
            tokenizer={"path": "tokenizer.json", "fingerprint": hashlib.sha256(serialize(tokenizer)).hexdigest()}
        )
    return prefix


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = tool.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_text_tells_what_the_corpus_holds(prefix, capsys):
    code, out, err = run(capsys, prefix)
    assert (code, err) == (0, "")
    facts = {line[2:14].strip(): line[14:] for line in out.splitlines() if line.startswith("  ")}
    corpus = Corpus(prefix)
    assert facts["documents"] == "4"
    assert facts["tokens"] == f"{corpus.tokens}"
    assert facts["bytes"] == f"{2 * corpus.tokens} of uint16"
    assert facts["vocabulary"] == "257"
    assert facts["end token"] == "256 '<|endoftext|>'"
    assert facts["tokenizer"].startswith("tokenizer.json")
    assert facts["entropy"].startswith(f"{corpus.meta.unigram_entropy:.4f} nats")
    assert facts["longest"] == "document 2, 101 tokens"
    assert "64 to 127          1     101" in out


def test_json_is_the_same_in_numbers(prefix, capsys):
    code, out, _ = run(capsys, prefix, "--json", "--sample", 1, "--verify")
    facts = json.loads(out)
    assert code == 0
    assert (facts["documents"], facts["longest_length"], facts["longest_document"]) == (4, 101, 2)
    assert sum(bucket["tokens"] for bucket in facts["length_histogram"]) == facts["tokens"]
    assert facts["length_percentiles"]["50"] == 21
    assert facts["samples"] == {"1": ""}
    assert facts["verified"] is True
    assert facts["fingerprint"] == Corpus(prefix).fingerprint


def test_samples_are_text(prefix, capsys):
    _, out, _ = run(capsys, prefix, "--sample", 0, "--sample", 2, "--sample", 3)
    assert "document 0, 21 tokens:\n  | Zebras have stripes.<|endoftext|>\n" in out
    assert f"document 2, 101 tokens:\n  | {'x' * 80} …\n" in out
    assert "  | red \\x1b[31m naïve\n  | \ttext<|endoftext|>\n" in out


def test_what_the_assistant_says_is_marked(tmp_path, capsys):
    prefix = write(tmp_path / "chat", ["Hi! Hello. Bye", "y" * 90], spans=[[[4, 10], [10, 14]], [[70, 85], [86, 90]]])
    _, out, _ = run(capsys, prefix, "--sample", 0, "--sample", 1)
    assert "  | Hi! ⟦Hello.⟧⟦ Bye⟧<|endoftext|>\n" in out
    assert f"  | {'y' * 70}⟦{'y' * 10}⟧ …\n" in out
    assert "assistant   29 tokens, 27.4%" in out


def test_megatrons_corpora_have_no_sidecar(prefix, capsys):
    os.remove(f"{prefix}.meta.json")
    code, out, _ = run(capsys, prefix, "--sample", 0)
    assert code == 0
    assert "none: vocabulary, tokenizer and checksums are not known" in out
    assert "ids, since its tokenizer is not here" in out
    assert "  | 90 101 98 114 97 115 " in out
    _, out, _ = run(capsys, prefix, "--sample", 0, "--tokenizer", prefix.parent / "tokenizer.json")
    assert "  | Zebras have stripes.<|endoftext|>\n" in out
    code, _, err = run(capsys, prefix, "--verify")
    assert code == 1
    assert "no checksums to verify against" in err


def test_verifying_finds_damage(prefix, capsys):
    code, out, _ = run(capsys, prefix, "--verify")
    assert code == 0
    assert out.endswith("bytes of .bin match their checksums\n")
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[3] ^= 1
    Path(f"{prefix}.bin").write_bytes(content)
    code, out, err = run(capsys, prefix, "--verify")
    assert code == 1
    assert "match" not in out
    assert "corpus.bin does not match its checksum in block 0" in err


def test_picture_is_a_png(prefix, capsys):
    code, _, _ = run(capsys, prefix, "--lengths", prefix.parent / "lengths.png")
    assert code == 0
    assert (prefix.parent / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_another_tokenizer_under_the_old_name_is_noticed(prefix, capsys):
    (prefix.parent / "tokenizer.json").write_text("{}")
    code, out, err = run(capsys, prefix)
    assert code == 0
    assert err.startswith("note: ")
    assert "tokenizer.json is not the tokenizer that" in err
    assert "end token   256\n" in out
    code, out, err = run(capsys, prefix, "--sample", 0)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "tokenizer.json is not the tokenizer that" in err


def test_a_reader_that_has_had_enough_is_no_error(prefix):
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, str(TOOL), str(prefix)], env=environment, stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_sentencepiece_models_decode(prefix, capsys, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("zebras have stripes and stripes have zebras\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "pieces"), vocab_size=17, minloglevel=2
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "pieces.model"))
    with CorpusWriter(prefix, vocab_size=40) as writer:
        writer.add_document([*model.encode("zebras have stripes"), 39])  # an id beyond the model's vocabulary
    _, out, _ = run(capsys, prefix, "--sample", 0, "--tokenizer", tmp_path / "pieces.model")
    assert "  | zebras have stripes\n" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere/corpus"], "PREFIX='nowhere/corpus': nowhere/corpus.idx does not exist"),
        (["{prefix}", "--sample", "4"], "has no document 4; its 4 count from 0"),
        (["{prefix}", "--sample", "-1"], "has no document -1"),
        (["{prefix}", "--tokenizer", "nowhere.json"], "tokenizer 'nowhere.json' cannot be read"),
        (["{prefix}", "--tokenizer", "nowhere.model"], "nowhere.model"),
        (["{prefix}", "--lengths", "{prefix}/no/folder.png"], "folder.png"),
    ],
)
def test_mistakes_are_named(prefix, capsys, arguments, complaint):
    code, _, err = run(capsys, *(argument.format(prefix=prefix) for argument in arguments))
    assert code == 1
    assert err.startswith("error: ")
    assert complaint in err
