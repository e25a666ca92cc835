"""The tokenizer of a run's corpus: from text to a corpus, a checkpoint, a merged model, an exported one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hf_models import save_ours
from support.training import tiny_config
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megazebra.checkpoint.model_folder import ModelFolder, ModelFolderWriter
from megazebra.config.schema import Config
from megazebra.data.prepare.encoders.tokenizer import EOD_TOKEN
from megazebra.data.prepare.job import Preprocessing
from megazebra.data.prepare.open_encoder import EncoderOptions
from megazebra.data.prepare.preprocess import preprocess
from megazebra.errors import UserError
from megazebra.hf.exporting import HuggingFaceExport
from megazebra.hf.run_tokenizer import find_tokenizer

TEXT = "def zebra(stripes):\n    return [stripe for stripe in stripes if stripe]\n"
FOREIGN = "  Zébras — naïve\t日本\n\n" + TEXT


def build_corpus(folder: Path, text: str = TEXT) -> Path:
    """The prefix of a corpus with a tokenizer of its own."""
    source = folder.with_name(f"{folder.name}.txt")
    source.write_text(text * 20)
    preprocess(
        Preprocessing(
            inputs=(str(source),), output=str(folder), encoder=EncoderOptions(tokenizer=""), train_tokenizer=300,
            validation_share=0.0, workers=1,
        )
    )  # fmt: skip
    return folder / "train"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    build_corpus(folder / "one")
    build_corpus(folder / "other", "pandas see no stripes\n")
    return folder


@pytest.fixture
def data(corpora: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(corpora, tmp_path / "data"))


def config_of(*prefixes: Path) -> Config:
    sources = {prefix.parent.name: {"path": str(prefix), "weight": 1.0} for prefix in prefixes}
    return tiny_config(data__sources=sources)


@pytest.mark.parametrize("options", [{}, {"attention_softcap": 3.0}], ids=["Cwm", "remote code"])
def test_transformers_opens_it_and_encodes_as_the_corpus_was(
    data: Path, tmp_path: Path, options: dict[str, float]
) -> None:
    found = find_tokenizer(tiny_config(data__path=str(data / "one" / "train")))
    assert found.told == f"tokenizer {data / 'one' / 'tokenizer.json'}, of the run's corpus"
    save_ours(tmp_path / "weights", **options)
    weights = ModelFolder.open(tmp_path / "weights")
    with ModelFolderWriter(tmp_path / "model", weights.config) as writer:
        for name in weights.names:
            writer.write(name, weights.tensor(name))
        for name, content in {**found.files, "training.json": b"{}"}.items():
            writer.add_file(name, content)
    # Cwm asks for the ids that begin and end a text.
    HuggingFaceExport(tmp_path / "model", remote_code=bool(options)).write(tmp_path / "hf")
    assert not (tmp_path / "hf" / "training.json").exists()

    original = Tokenizer.from_file(str(data / "one" / "tokenizer.json"))
    opened = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=bool(options))
    assert opened(FOREIGN)["input_ids"] == original.encode(FOREIGN).ids
    assert opened.decode(opened(FOREIGN)["input_ids"]) == FOREIGN
    assert (opened.eos_token, opened.eos_token_id) == (EOD_TOKEN, original.token_to_id(EOD_TOKEN))
    assert opened.model_max_length == tiny_config().model.max_position_embeddings
    end = {"bos_token_id": opened.eos_token_id, "eos_token_id": opened.eos_token_id}
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == end
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {name: fields[name] for name in end} == end


def test_another_file_than_the_corpus_was_made_with_is_not_taken(data: Path) -> None:
    config = config_of(data / "one" / "train")
    file = data / "one" / "tokenizer.json"
    shutil.copy(data / "other" / "tokenizer.json", file)
    found = find_tokenizer(config)
    assert found.files == {}
    assert found.told == (
        f"no tokenizer: {file} is missing, or not the one its corpus was made with; --tokenizer PATH gives one"
    )
    file.unlink()
    assert find_tokenizer(config).told == found.told


def test_why_there_is_none_is_told(data: Path) -> None:
    both = find_tokenizer(config_of(data / "one" / "train", data / "other" / "train"))
    assert both.told.startswith("no tokenizer: the corpora ")
    assert "were made with different ones; --tokenizer PATH gives one" in both.told
    assert find_tokenizer(tiny_config()).told.startswith("no tokenizer: no sidecar of the run's corpora (it has none)")
    meta = data / "one" / "train.meta.json"
    meta.write_text("{")
    assert f"no tokenizer: {meta} is not JSON" in find_tokenizer(config_of(data / "one" / "train")).told
    meta.unlink()
    assert "names one; --tokenizer" in find_tokenizer(config_of(data / "one" / "train")).told


def test_a_given_one_is_taken_and_told_when_it_is_another(data: Path, tmp_path: Path) -> None:
    config = config_of(data / "one" / "train")
    own, other = data / "one" / "tokenizer.json", data / "other" / "tokenizer.json"
    # As a Hugging Face folder has it: laid out otherwise, with its own settings.
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(own.read_text())))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    found = find_tokenizer(config, folder)
    assert found.told == f"tokenizer of {folder}"
    assert found.files == {path.name: path.read_bytes() for path in folder.iterdir()}

    found = find_tokenizer(config, other)
    assert found.told == f"tokenizer of {other}, which is not the one that the run's corpora were made with"
    assert found.files.keys() == {"tokenizer.json", "tokenizer_config.json"}, "whose end of text is not known"

    with pytest.raises(UserError, match=f"--tokenizer {data} has neither tokenizer.json nor tokenizer.model"):
        find_tokenizer(config, data)
    with pytest.raises(UserError, match=r"is no tokenizer.json, tokenizer.model, or folder with one"):
        find_tokenizer(config, data / "one" / "train.bin")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="that --tokenizer gives is no tokenizer"):
        find_tokenizer(config, folder)
