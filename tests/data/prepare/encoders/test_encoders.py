"""Encoders: the ids of each library's own call, EOD at the end, and text that looks like a token stays text."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encoders import gigatoken_engine
from megazebra.data.prepare.encoders.encoded import EncodedDocument, Refused
from megazebra.data.prepare.encoders.gigatoken_engine import GigatokenError
from megazebra.data.prepare.encoders.tokenizer import EOD_TOKEN, load_tokenizer, save_tokenizer, train_byte_level_bpe
from megazebra.data.prepare.open_encoder import EncoderOptions, has_choice_of_engines, open_encoder, with_gigatoken

TRAINED_ON = [f"def function_{n}(argument):\n    return argument + {n}\n" for n in range(200)]
TEXTS = ["größer 日本 \x00\t\r\n  def f(): 🦓", "", f"a{EOD_TOKEN}b", "  two\n\n\nlines ", "function_7(argument)" * 50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder: tokenizer.json with an added token that is not special."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_byte_level_bpe(TRAINED_ON, 400)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    prefix = tmp_path_factory.mktemp("sentencepiece") / "m"
    trainer.train(
        sentence_iterator=iter(TRAINED_ON), model_prefix=str(prefix), vocab_size=300, byte_fallback=True, minloglevel=2
    )
    return prefix.with_suffix(".model")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """Opening an encoder sets variables; put them back."""
    for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def encode(records=TEXTS, **options):
    return open_encoder(EncoderOptions(**{"threads": 1, **options})).encode(list(records))


def ids(documents):
    assert all(isinstance(document, EncodedDocument) for document in documents)
    return [document.tokens.tolist() for document in documents]


@pytest.mark.parametrize("engine", ["tokenizers", "gigatoken"])
@pytest.mark.parametrize("given", ["", "tokenizer.json"])
def test_tokenizer_json(folder, engine, given):
    if engine == "gigatoken":
        pytest.importorskip("gigatoken")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    expected = [[*tokenizer.encode(text, add_special_tokens=False).ids, 0] for text in TEXTS]
    assert ids(encode(tokenizer=str(folder / given), engine=engine)) == expected
    assert ids(encode(tokenizer=str(folder / given), engine=engine, eod="none")) == [each[:-1] for each in expected]
    assert expected[2].count(0) == 1


def test_sentencepiece(sentencepiece_model):
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(sentencepiece_model))
    encoder = open_encoder(EncoderOptions(tokenizer=str(sentencepiece_model)))
    assert (encoder.vocab_size, encoder.eod_id) == (300, 2)
    assert ids(encoder.encode(TEXTS)) == [[*model.encode(text), 2] for text in TEXTS]
    assert ids(encode(tokenizer=str(sentencepiece_model), eod="<s>")) == [[*model.encode(text), 1] for text in TEXTS]
    with pytest.raises(CorpusError, match=r"no piece '<end>' .* --eod none"):
        encode(tokenizer=str(sentencepiece_model), eod="<end>")


def test_sentencepiece_without_end_of_sentence(sentencepiece_model, tmp_path):
    from sentencepiece import SentencePieceTrainer

    options = {"vocab_size": 300, "byte_fallback": True, "minloglevel": 2, "eos_id": -1}
    SentencePieceTrainer.train(sentence_iterator=iter(TRAINED_ON), model_prefix=str(tmp_path / "m"), **options)
    with pytest.raises(CorpusError, match="no end of sentence to end documents with"):
        encode(tokenizer=str(tmp_path / "m.model"))
    assert ids(encode([""], tokenizer=str(tmp_path / "m.model"), eod="none")) == [[]]


@given(st.text())
def test_bytes_are_the_ids(text):
    assert ids(encode([text], tokenizer="bytes")) == [[*text.encode(), 256]]


def test_bytes_saved_as_tokenizer_json(tmp_path):
    encoder = open_encoder(EncoderOptions(tokenizer="bytes"))
    encoder.save(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    texts = [*TEXTS, "".join(map(chr, range(0x250)))]
    assert ids(encoder.encode(texts)) == ids(encode(texts, tokenizer=str(tmp_path), engine="tokenizers"))
    assert [tokenizer.decode(tokens[:-1]) for tokens in ids(encoder.encode(texts))] == texts
    assert tokenizer.decode([256], skip_special_tokens=False) == EOD_TOKEN
    assert {token for tokens in ids(encoder.encode(texts)) for token in tokens} <= set(range(257))


@pytest.mark.parametrize("kind", ["bytes", "folder", "sentencepiece_model"])
def test_what_is_saved_and_recorded(kind, tmp_path, request):
    given = "bytes" if kind == "bytes" else str(request.getfixturevalue(kind))
    encoder = open_encoder(pickle.loads(pickle.dumps(EncoderOptions(tokenizer=given))))
    encoder.save(tmp_path)
    content = (tmp_path / encoder.file_name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [encoder.file_name]
    assert encoder.fingerprint == hashlib.sha256(content).hexdigest()
    assert encoder.recipe == {"tokenizer": encoder.fingerprint, "eod_id": encoder.eod_id}
    again = open_encoder(EncoderOptions(tokenizer=str(tmp_path / encoder.file_name)))
    assert ids(again.encode(TEXTS)) == ids(encoder.encode(TEXTS))
    assert again.fingerprint == encoder.fingerprint


@pytest.mark.parametrize("kind", ["bytes", "folder", "sentencepiece_model"])
def test_half_a_surrogate_pair_is_refused_alone(kind, request):
    given = "bytes" if kind == "bytes" else str(request.getfixturevalue(kind))
    first, second, third = encode(["a", json.loads('"\\ud83e"'), "b"], tokenizer=given)
    assert second == Refused("holds half a surrogate pair")
    assert ids([first, third]) == ids(encode(["a", "b"], tokenizer=given))
    assert encode([], tokenizer=given) == []


def test_default_end_of_documents(tmp_path):
    tokenizer = train_byte_level_bpe(TRAINED_ON, 300)
    tokenizer.add_special_tokens(["</s>"])
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}}))
    assert open_encoder(EncoderOptions(tokenizer=str(tmp_path))).eod_id == 0
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace(EOD_TOKEN, "<|other|>"))
    assert open_encoder(EncoderOptions(tokenizer=str(tmp_path))).eod_id == 300
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CorpusError, match=r"no token '<\|endoftext\|>' .* with --eod"):
        open_encoder(EncoderOptions(tokenizer=str(tmp_path)))


def test_unusable_tokenizers_are_named(folder, tmp_path):
    (tmp_path / "broken.model").write_bytes(b"no model")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    save_tokenizer(train_byte_level_bpe(TRAINED_ON, 300), tmp_path / "other.json")
    (tmp_path / "other.json").write_text((tmp_path / "other.json").read_text().replace(EOD_TOKEN, "<|other|>"))
    for options, complaint in (
        ({"tokenizer": str(tmp_path / "nowhere.json")}, "cannot be read"),
        ({"tokenizer": str(tmp_path)}, "a folder without tokenizer.json"),
        ({"tokenizer": str(tmp_path / "other.json")}, "tokenizer_config.json is no JSON object"),
        ({"tokenizer": "bytes", "engine": "gigatoken"}, "gigatoken needs a tokenizer.json, not 'bytes'"),
        ({"tokenizer": "bytes", "chat": "chatml"}, "chat needs a tokenizer.json, not 'bytes'"),
        ({"tokenizer": "bytes", "eod": "</s>"}, "no token '</s>'"),
        ({"tokenizer": str(folder), "eod": "</s>"}, "no token '</s>'"),
    ):
        with pytest.raises(CorpusError, match=complaint):
            open_encoder(EncoderOptions(**options))
    pytest.importorskip("sentencepiece")
    with pytest.raises(CorpusError, match="is no sentencepiece model"):
        open_encoder(EncoderOptions(tokenizer=str(tmp_path / "broken.model")))


@pytest.mark.parametrize(("module", "options"), [("gigatoken", {"engine": "gigatoken"}), ("sentencepiece", {})])
def test_missing_libraries_are_named_with_their_extra(module, options, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.model").touch()
    given = str(folder if module == "gigatoken" else tmp_path / "a.model")
    with pytest.raises(CorpusError, match=rf"install megazebra\[{module}\]"):
        open_encoder(EncoderOptions(tokenizer=given, **options))


def test_which_encoders_have_a_choice_of_engines(folder, sentencepiece_model):
    open_with_defaults = [open_encoder(EncoderOptions(tokenizer=str(given))) for given in (folder, sentencepiece_model)]
    assert [*map(has_choice_of_engines, open_with_defaults)] == [True, False]
    assert open_with_defaults[0].description == "tokenizers"
    assert not has_choice_of_engines(open_encoder(EncoderOptions(tokenizer="bytes")))
    assert not has_choice_of_engines(open_encoder(EncoderOptions(tokenizer=str(folder), chat="chatml")))


@pytest.mark.parametrize("wrong", ["<think>", "two"])
def test_difference_at_the_beginning(folder, install_faulty_gigatoken, wrong):
    """In what the tokenizer adds, seen when it is opened, or in the first batch."""
    install_faulty_gigatoken(wrong)
    with pytest.raises(GigatokenError, match=rf"gigatoken encodes '.*{wrong}.*'.* from token 0 on \[5, .*--engine tok"):
        encode(tokenizer=str(folder), engine="gigatoken")


def test_difference_in_a_later_batch_is_an_error_too(folder, install_faulty_gigatoken):
    install_faulty_gigatoken("late")
    encoder = open_encoder(EncoderOptions(tokenizer=str(folder), engine="gigatoken"))
    assert ids(encoder.encode(TEXTS)) == ids(encode(tokenizer=str(folder), engine="tokenizers"))
    with pytest.raises(GigatokenError, match="encodes 'late'"):
        encoder.encode(["late"])


def test_faster_encoder_is_the_same_but_for_its_engine(folder, install_faulty_gigatoken):
    install_faulty_gigatoken("late")
    encoder = open_encoder(EncoderOptions(tokenizer=str(folder)))
    faster = with_gigatoken(encoder, threads=1)
    assert (encoder.description, faster.description[:9]) == ("tokenizers", "gigatoken")
    assert (faster.recipe, faster.vocab_size, faster.eod_id) == (encoder.recipe, encoder.vocab_size, encoder.eod_id)
    assert ids(faster.encode(TEXTS)) == ids(encoder.encode(TEXTS))


def test_only_a_sample_is_compared(folder, install_faulty_gigatoken, monkeypatch):
    """Comparing everything would be slower than not to use it."""
    install_faulty_gigatoken("late")
    monkeypatch.setattr(gigatoken_engine, "FIRST_TEXTS", 2)
    monkeypatch.setattr(gigatoken_engine, "COMPARED_CHARACTERS", 3)
    assert encode(["a", "b  late", "late"], tokenizer=str(folder), engine="gigatoken")[2].tokens[0] == 5


@given(texts=st.lists(st.text() | st.text("a1 's\n\r\u00a0<|endoftxhk>"), min_size=1))
def test_gigatoken_gives_the_same_tokens(folder, texts):
    pytest.importorskip("gigatoken")
    fast, slow = (encode(texts, tokenizer=str(folder), engine=engine) for engine in ("gigatoken", "tokenizers"))
    assert ids(fast) == ids(slow)


def test_gigatoken_does_not_know_every_tokenizer(tmp_path):
    pytest.importorskip("gigatoken")
    tokenizer = train_byte_level_bpe(TRAINED_ON, 300)
    tokenizer.normalizer = normalizers.Lowercase()
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    with pytest.raises(CorpusError, match=r"^gigatoken cannot load this tokenizer \(.+\); use --engine tokenizers$"):
        encode(tokenizer=str(tmp_path), engine="gigatoken")


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_threads_change_nothing(folder, threads):
    assert ids(encode(tokenizer=str(folder), threads=threads)) == ids(encode(tokenizer=str(folder)))
