"""Choosing the encoder of a corpus: a Hugging Face tokenizer, sentencepiece, bytes, or chat over the first."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeGuard

from tokenizers import Tokenizer

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.chat.chat_encoder import ChatEncoder
from megazebra.data.prepare.chat.chat_template import open_chat_template
from megazebra.data.prepare.encoders.encoded import DocumentEncoder
from megazebra.data.prepare.encoders.engines import ByteEngine, HuggingFaceEngine, SentencePieceEngine
from megazebra.data.prepare.encoders.gigatoken_engine import GigatokenEngine
from megazebra.data.prepare.encoders.text_encoder import TextEncoder
from megazebra.data.prepare.encoders.tokenizer import (
    EOD_TOKEN,
    byte_tokenizer,
    eod_id,
    load_tokenizer,
    serialize,
    tokenizer_config,
    vocab_size,
)

BYTES = "bytes"
NO_EOD = "none"


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """How records become tokens; picklable, for worker processes.

    tokenizer: path of a tokenizer.json, of a folder that holds one (a Hugging Face model), of a sentencepiece
    .model, or the word `bytes`.
    eod: token that ends a document, `none` for no token. By default the tokenizer's own: `<|endoftext|>` or the
    eos_token its folder names, a sentencepiece model's end of sentence; conversations get one only if asked.
    engine: what encodes with a tokenizer.json; `auto` opens as tokenizers until `with_gigatoken` was tried.
    chat: None for text records, else a chat template: its built-in name, `tokenizer`, or a .jinja file.
    messages: key of a chat record's messages. max_tokens, overlong: what becomes of longer conversations.
    threads: that encode at a time, None for one per core; 1 inside worker processes.
    """

    tokenizer: str
    eod: str | None = None
    engine: Literal["auto", "tokenizers", "gigatoken"] = "auto"
    chat: str | None = None
    messages: str = "messages"
    max_tokens: int | None = None
    overlong: Literal["keep", "drop", "truncate", "error"] = "keep"
    threads: int | None = None


def open_encoder(options: EncoderOptions) -> DocumentEncoder:
    """The encoder the options describe.

    Sets the environment variables in which the tokenizers library looks for its number of threads.
    Raises CorpusError for a missing or unusable tokenizer, template, EOD token or engine.
    """
    if options.threads is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = str(options.threads > 1).lower()
        os.environ["RAYON_NUM_THREADS"] = str(options.threads)
    path = None if options.tokenizer == BYTES else _tokenizer_file(Path(options.tokenizer))
    if path is not None and path.suffix != ".model":
        tokenizer = load_tokenizer(path)
        return _chat_encoder(options, path, tokenizer) if options.chat else _text_encoder(options, path, tokenizer)
    if options.chat or options.engine == "gigatoken":
        purpose = "chat" if options.chat else "gigatoken"
        raise CorpusError(f"{purpose} needs a tokenizer.json, not {options.tokenizer!r}; give another --tokenizer")
    return _byte_encoder(options) if path is None else _sentencepiece_encoder(options, path)


def has_choice_of_engines(encoder: DocumentEncoder) -> TypeGuard[TextEncoder]:
    """Whether `with_gigatoken` can be tried on it."""
    return isinstance(encoder, TextEncoder) and isinstance(encoder.engine, HuggingFaceEngine)


def with_gigatoken(encoder: TextEncoder, threads: int | None) -> TextEncoder:
    """The same encoder of a tokenizer.json, faster. Raises GigatokenError where the library is missing or unfit."""
    return encoder.with_engine(
        GigatokenEngine(encoder.content, encoder.eod_id, reference=encoder.engine, threads=threads)
    )


def _tokenizer_file(given: Path) -> Path:
    if not given.is_dir():
        return given
    for name in ("tokenizer.json", "tokenizer.model"):
        if (given / name).is_file():
            return given / name
    raise CorpusError(f"tokenizer {str(given)!r} is a folder without tokenizer.json; give the path of one")


def _text_encoder(options: EncoderOptions, path: Path, tokenizer: Tokenizer) -> TextEncoder:
    end = _end_id(options.eod or _default_end(tokenizer, path.parent), tokenizer)
    engine, content = HuggingFaceEngine(tokenizer, end), serialize(tokenizer)
    encoder = TextEncoder(engine, content, "tokenizer.json", vocab_size=vocab_size(tokenizer), eod_id=end)
    return with_gigatoken(encoder, options.threads) if options.engine == "gigatoken" else encoder


def _chat_encoder(options: EncoderOptions, path: Path, tokenizer: Tokenizer) -> ChatEncoder:
    assert options.chat is not None
    return ChatEncoder(
        tokenizer,
        open_chat_template(options.chat, path.parent),
        eod_id=_end_id(options.eod or NO_EOD, tokenizer),
        messages=options.messages,
        max_tokens=options.max_tokens,
        overlong=options.overlong,
    )


def _byte_encoder(options: EncoderOptions) -> TextEncoder:
    tokenizer = byte_tokenizer()
    end = _end_id(options.eod or EOD_TOKEN, tokenizer)
    return TextEncoder(
        ByteEngine(end), serialize(tokenizer), "tokenizer.json", vocab_size=vocab_size(tokenizer), eod_id=end
    )


def _sentencepiece_encoder(options: EncoderOptions, path: Path) -> TextEncoder:
    engine = SentencePieceEngine(path, threads=options.threads)
    end = None if options.eod == NO_EOD else engine.end_documents_with(options.eod)
    return TextEncoder(engine, path.read_bytes(), "tokenizer.model", vocab_size=engine.vocab_size, eod_id=end)


def _end_id(token: str, tokenizer: Tokenizer) -> int | None:
    return None if token == NO_EOD else eod_id(tokenizer, token)


def _default_end(tokenizer: Tokenizer, folder: Path) -> str:
    if tokenizer.token_to_id(EOD_TOKEN) is not None:
        return EOD_TOKEN
    return tokenizer_config(folder).get("eos_token") or EOD_TOKEN
