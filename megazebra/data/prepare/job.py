"""What a build is asked for and what it reads."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encode_task import Sizes
from megazebra.data.prepare.encoders.tokenizer import EOD_TOKEN
from megazebra.data.prepare.inputs.files import InputFile, gather_files, manifest_fingerprint
from megazebra.data.prepare.inputs.records import RecordOptions
from megazebra.data.prepare.inputs.tasks import Task, TextDocument, plan_tasks, text_documents, with_nearest_held_out
from megazebra.data.prepare.open_encoder import EncoderOptions


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What to build and from what.

    inputs: folders, files, or `stdlib`. output: folder for train.*, validation.* and the tokenizer.
    encoder: how records become tokens; its tokenizer stays empty where train_tokenizer, the vocabulary size of a new
    byte-level BPE, is given. globs: of file names. documents: whether a text file is a document, or all those of a
    directory. text_key: of records that are no conversations. skip_bad_records: instead of an error.
    validation_share: of text documents, by hash of their names, and of records, by hash of their content.
    workers: cores to use. force: replace what is in `output`. sizes: of the pieces of work.
    """

    inputs: tuple[str, ...]
    output: str
    encoder: EncoderOptions
    train_tokenizer: int | None = None
    globs: tuple[str, ...] = ()
    documents: Literal["file", "directory"] = "file"
    text_key: str = "text"
    skip_bad_records: bool = False
    validation_share: float = 0.02
    workers: int = 1
    force: bool = False
    sizes: Sizes = field(default_factory=Sizes)

    def check(self) -> None:
        """Raises CorpusError for options that are no use, alone or together."""
        if bool(self.encoder.tokenizer) == (self.train_tokenizer is not None):
            raise CorpusError("give either --train-tokenizer VOCAB or --tokenizer FILE")
        if self.encoder.chat and self.train_tokenizer is not None:
            raise CorpusError("conversations need the special tokens of a chat tokenizer; give one with --tokenizer")
        if self.encoder.chat and self.encoder.engine == "gigatoken":
            raise CorpusError("conversations are encoded by tokenizers alone; leave out --engine gigatoken")
        if not self.encoder.chat and (self.encoder.max_tokens is not None or self.encoder.overlong != "keep"):
            raise CorpusError(
                "--max-tokens and --overlong are for conversations; leave them out, or give --chat-template"
            )
        if self._is_in_folder_of_tokenizer():
            raise CorpusError(
                f"--output {self.output} is the folder of the tokenizer, whose files would be replaced; give another"
            )
        if not 0 <= self.validation_share < 1:
            raise CorpusError(
                f"--validation-share {self.validation_share} is outside [0, 1); give a share such as 0.02"
            )

    def _is_in_folder_of_tokenizer(self) -> bool:
        """Whether the output is to go beside the tokenizer, and no build has put that there."""
        tokenizer = Path(self.encoder.tokenizer)
        if not self.encoder.tokenizer or not tokenizer.exists() or Path(self.output, "train.meta.json").exists():
            return False
        folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
        return os.path.realpath(folder) == os.path.realpath(self.output)

    @property
    def encoder_here(self) -> EncoderOptions:
        """For this process, which has all cores."""
        return replace(self.encoder, threads=self.workers)

    @property
    def record_options(self) -> RecordOptions:
        return RecordOptions(
            text_key=None if self.encoder.chat else self.text_key,
            skip_bad_records=self.skip_bad_records,
            validation_share=self.validation_share,
        )


@dataclass(frozen=True)
class Sources:
    """The files to read. texts: those that are one text each, by document. records: those with many records."""

    files: list[InputFile]
    texts: list[TextDocument]
    records: list[InputFile]

    @classmethod
    def gather(cls, job: Preprocessing) -> Sources:
        """Raises CorpusError for inputs that are missing, or no conversations where those are asked for."""
        files = gather_files(job.inputs, job.globs, exclude=job.output)
        records = [file for file in files if file.holds_records]
        plain = [file for file in files if not file.holds_records]
        if plain and job.encoder.chat:
            raise CorpusError(
                f"{plain[0].path} holds no conversations; give .jsonl or .parquet files, or a --glob such as '*.jsonl'"
            )
        texts = text_documents(plain, job.documents, job.validation_share)
        if job.validation_share > 0 and not records:
            texts = with_nearest_held_out(texts)
        return cls(files, texts, records)

    def tasks(self, job: Preprocessing) -> list[Task]:
        """Raises CorpusError for .parquet files that cannot be read."""
        columns = () if job.encoder.chat else (job.text_key,)
        return plan_tasks(self.texts, self.records, columns, job.sizes.task)

    def described(self, *, validation: bool) -> dict[str, Any]:
        """What the sidecar of a corpus tells of the files that are in it."""
        texts = [document.files for document in self.texts if document.validation == validation]
        files = sorted([*self.records, *itertools.chain.from_iterable(texts)])
        return {
            "files": len(files),
            "bytes": sum(file.bytes for file in files),
            "manifest": manifest_fingerprint(files),
        }

    def request(self, job: Preprocessing, recipe: dict[str, Any] | None) -> dict[str, Any]:
        """Everything that decides the corpora's content, as the sidecars record it.

        recipe: of the encoder, None where its tokenizer is not learned yet. An option that changes nothing for these
        files is not part of it.
        """
        request: dict[str, Any] = {
            "files": len(self.files),
            "manifest": manifest_fingerprint(self.files),
            "validation_share": job.validation_share,
        }
        if recipe is None:
            request |= {
                "tokenizer": f"byte-level BPE of {job.train_tokenizer}",
                "eod": job.encoder.eod or EOD_TOKEN,
            }
        else:
            request |= recipe
        if self.texts and job.documents != "file":
            request["documents"] = job.documents
        if self.records and not job.encoder.chat:
            request["text_key"] = job.text_key
        if self.records and job.skip_bad_records:
            request["skip_bad_records"] = True
        return request
