"""The tokenizer that a run's corpora were made with, as files that travel with its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from megazebra.config.schema import Config
from megazebra.data.corpus.sidecar import CorpusMeta, read_meta
from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encoders.tokenizer import serialize
from megazebra.errors import UserError
from megazebra.hf import companions

_FILE, _SENTENCEPIECE, _CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"


@dataclass(frozen=True)
class RunTokenizer:
    """files: by name, none where there is no tokenizer. told: a line on which one was taken, or why none was."""

    files: dict[str, bytes]
    told: str


def find_tokenizer(config: Config, given: Path | None = None) -> RunTokenizer:
    """The tokenizer at `given`, a file or a Hugging Face model's folder; None: the one the run's corpora name.

    That has to be the very file they were encoded with, which their sidecars tell by its sha256. Beside it come what
    transformers needs to open it and, where documents end with a token, a generation_config.json: that token ends a
    text, and as GPT-2's begins one. Corpora are looked for where the configuration names them, relative to here.

    Raises UserError when `given` is no tokenizer.
    """
    metas, problem = _sidecars(config)
    if given is not None:
        files = _given_files(given)
        if metas and _fingerprints(files).isdisjoint(_recorded(meta).fingerprint for _, meta in metas):
            told = f"tokenizer of {given}, which is not the one that the run's corpora were made with"
            return RunTokenizer(_with_configs(files, config, end=None), told)
        return RunTokenizer(_with_configs(files, config, _end(metas)), f"tokenizer of {given}")
    if problem is not None:
        return RunTokenizer({}, f"no tokenizer: {problem}; --tokenizer PATH gives one")
    for path, meta in metas:
        recorded = _recorded(meta)
        file = path.parent / recorded.path
        if file.exists() and hashlib.sha256(content := file.read_bytes()).hexdigest() == recorded.fingerprint:
            files = {_SENTENCEPIECE if file.suffix == ".model" else _FILE: content}
            return RunTokenizer(_with_configs(files, config, _end(metas)), f"tokenizer {file}, of the run's corpus")
    told = f"no tokenizer: {file} is missing, or not the one its corpus was made with; --tokenizer PATH gives one"
    return RunTokenizer({}, told)


class _Recorded(NamedTuple):
    path: str
    fingerprint: str


def _recorded(meta: CorpusMeta) -> _Recorded:
    assert meta.tokenizer is not None
    return _Recorded(meta.tokenizer["path"], meta.tokenizer["fingerprint"])


def _end(metas: list[tuple[Path, CorpusMeta]]) -> int | None:
    """The token that ends the documents of all corpora."""
    ends = {meta.eod_id for _, meta in metas}
    return ends.pop() if len(ends) == 1 else None


def _sidecars(config: Config) -> tuple[list[tuple[Path, CorpusMeta]], str | None]:
    """Path and content of the sidecars that name a tokenizer, and what keeps them from telling which one."""
    data = config.data
    prefixes = [data.path] if data.path is not None else [source.path for source in data.sources.values()]
    found: list[tuple[Path, CorpusMeta]] = []
    for prefix in prefixes:
        path = Path(f"{prefix}.meta.json")
        try:
            meta = read_meta(path)
        except (CorpusError, OSError) as error:
            return found, str(error)
        if meta is not None and meta.tokenizer is not None:
            found.append((path, meta))
    if not found:
        return found, f"no sidecar of the run's corpora ({', '.join(map(str, prefixes)) or 'it has none'}) names one"
    if len({_recorded(meta).fingerprint for _, meta in found}) > 1:
        return found, f"the corpora {', '.join(prefixes)} were made with different ones"
    return found, None


def _given_files(given: Path) -> dict[str, bytes]:
    if given.is_dir():
        names = companions.tokenizer_files(given)
        if not {_FILE, _SENTENCEPIECE} & set(names):
            raise UserError(f"--tokenizer {given} has neither {_FILE} nor {_SENTENCEPIECE}; give another folder")
        names += [companions.GENERATION_NAME] * (given / companions.GENERATION_NAME).exists()
        return {name: (given / name).read_bytes() for name in names}
    if given.suffix not in (".json", ".model") or not given.is_file():
        raise UserError(f"--tokenizer {given} is no {_FILE}, {_SENTENCEPIECE}, or folder with one; give another path")
    return {_FILE if given.suffix == ".json" else _SENTENCEPIECE: given.read_bytes()}


def _fingerprints(files: Mapping[str, bytes]) -> set[str]:
    """As preprocessing takes them: of tokenizer.json what the library writes, whatever the file's spacing."""
    contents = [files[_SENTENCEPIECE]] if _SENTENCEPIECE in files else []
    if _FILE in files:
        contents.append(serialize(_opened(files[_FILE])))
    return {hashlib.sha256(content).hexdigest() for content in contents}


def _opened(content: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # the bindings raise bare Exception
        raise UserError(f"the tokenizer.json that --tokenizer gives is no tokenizer: {error}; give another") from error


def _with_configs(files: dict[str, bytes], config: Config, end: int | None) -> dict[str, bytes]:
    """The files, and what transformers needs beside them and is not there. end: id of the token that ends a text."""
    if end is not None and companions.GENERATION_NAME not in files:
        ids = {"bos_token_id": end, "eos_token_id": end}
        files = files | {companions.GENERATION_NAME: companions.as_json(ids)}
    if _FILE in files and _CONFIG not in files:
        # Without it transformers would open the file as the tokenizer that is usual for the model's class.
        fields: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.model.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
        if end is not None:
            token = _opened(files[_FILE]).id_to_token(end)
            fields |= {"bos_token": token, "eos_token": token}
        files = files | {_CONFIG: companions.as_json(fields)}
    return files
