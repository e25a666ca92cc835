"""Tokens of a corpus as text, by the tokenizer its sidecar names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encoders.tokenizer import load_sentencepiece, load_tokenizer

ASSISTANT_BEGINS, ASSISTANT_ENDS = "⟦", "⟧"

Decode = Callable[[list[int]], str]


def open_decoder(path: str | Path) -> Decode:
    """What turns ids into text, special tokens included: a tokenizer.json, or a sentencepiece `.model`.

    Raises CorpusError when the file is missing, damaged, or the library that reads it is not installed.
    """
    if Path(path).suffix != ".model":
        tokenizer = load_tokenizer(path)
        return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    model = load_sentencepiece(path)
    size = model.get_piece_size()
    # It refuses ids beyond its vocabulary, where `tokenizers` leaves them out.
    return lambda ids: model.decode([token for token in ids if token < size])


def own_tokenizer(corpus: Corpus) -> Path | None:
    """The file of the tokenizer the corpus was made with; None where no sidecar names one or it is not there.

    Raises CorpusError when the file is another tokenizer by now.
    """
    recorded = corpus.meta.tokenizer if corpus.meta else None
    path = Path(os.path.dirname(corpus.prefix), recorded["path"]) if recorded else None
    if path is None or not path.is_file():
        return None
    assert recorded is not None
    if hashlib.sha256(path.read_bytes()).hexdigest() != recorded["fingerprint"]:
        raise CorpusError(f"{path} is not the tokenizer that {corpus.prefix} was made with; name that one")
    return path


def decode_document(corpus: Corpus, document: int, tokens: int, decode: Decode) -> str:
    """The first `tokens` tokens of a document; ⟦ and ⟧ stand around what the assistant said.

    An ellipsis says that it goes on. Characters that steer a terminal are escaped. Raises CorpusError where there is
    no such document.
    """
    if not 0 <= document < corpus.documents:
        raise CorpusError(f"{corpus.prefix} has no document {document}; its {corpus.documents} count from 0")
    ids = corpus.read(document, 0, min(tokens, int(corpus.document_lengths[document]))).tolist()
    text, end = "", 0
    for first, last in corpus.spans(document).clip(max=len(ids)).tolist() if corpus.document_spans else []:
        if first < last:
            text += decode(ids[end:first]) + ASSISTANT_BEGINS + decode(ids[first:last]) + ASSISTANT_ENDS
            end = last
    text += decode(ids[end:])
    if len(ids) < corpus.document_lengths[document]:
        text += " …"
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    return character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1]
