"""Training, loading and saving tokenizers; everything else sees token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encoders.encoded import is_unicode
from megazebra.durable import write_atomically

EOD_TOKEN = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte, and EOD


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer (Sennrich et al. 2016; Radford et al. 2019) learned from `texts`.

    EOD_TOKEN has id 0. The same texts give the same tokenizer. The vocabulary comes out smaller than asked where
    the text has no more pairs that occur twice. Raises CorpusError below 257 tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise CorpusError(
            f"a byte-level vocabulary has at least {SMALLEST_VOCABULARY} tokens (256 bytes and {EOD_TOKEN}), "
            f"not {vocab_size}; ask for a larger one"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _for_documents(tokenizer)


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 is EOD_TOKEN; no merges."""
    # The byte-level alphabet (Radford et al. 2019): bytes that print stand for themselves, the others for 256 and up.
    printable = {byte for first, last in ("!~", "¡¬", "®ÿ") for byte in range(ord(first), ord(last) + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    characters = {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({characters.get(byte, chr(byte)): byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOD_TOKEN])
    return _for_documents(tokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer.json at `path`, set up to encode whole documents. Raises CorpusError where there is none."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CorpusError(
            f"tokenizer {str(path)!r} cannot be read ({error.strerror}); give the path of a tokenizer.json"
        ) from error
    try:
        return _for_documents(Tokenizer.from_str(content.decode()))
    except Exception as error:  # the bindings raise bare Exception
        raise CorpusError(
            f"{str(path)!r} is no tokenizer ({error}); give a tokenizer.json of the tokenizers library"
        ) from error


def load_sentencepiece(path: str | Path) -> Any:
    """The SentencePieceProcessor of a .model. Raises CorpusError without the library, and where the file is none."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise CorpusError(
            f"{path} needs the sentencepiece library ({error}); install megazebra[sentencepiece]"
        ) from error
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CorpusError(f"{path} is no sentencepiece model ({error}); give another --tokenizer") from error


def save_tokenizer(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write tokenizer.json in one step."""
    write_atomically(path, serialize(tokenizer))


def serialize(tokenizer: Tokenizer) -> bytes:
    """The content of tokenizer.json."""
    return tokenizer.to_str(pretty=True).encode()


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id, added tokens included (ids may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def eod_id(tokenizer: Tokenizer, token: str = EOD_TOKEN) -> int:
    """The id of the token that ends documents. Raises CorpusError naming the candidates where it is missing."""
    found = tokenizer.token_to_id(token)
    if found is None:
        special = added_tokens(tokenizer, special_only=True)
        raise CorpusError(
            f"the tokenizer has no token {token!r} to end documents with; name one of its special tokens "
            f"({', '.join(special[:20]) or 'it has none'}) with --eod"
        )
    return int(found)


def added_tokens(tokenizer: Tokenizer, *, special_only: bool = False) -> list[str]:
    """Tokens that are found in text as a whole, before the model splits it."""
    added = tokenizer.get_added_tokens_decoder().values()
    return [token.content for token in added if token.special or not special_only]


def tokenizer_config(folder: str | Path) -> dict[str, Any]:
    """The tokenizer_config.json of a Hugging Face model's folder, empty where there is none.

    Tokens are given as their text. Raises CorpusError where the file is no JSON object, or a token is no text.
    """
    path = Path(folder, "tokenizer_config.json")
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{path} is not JSON ({error}); restore it, or remove it to go without") from error
    if not isinstance(config, dict):
        raise CorpusError(f"{path} is no JSON object; restore it, or remove it to go without")
    config = {
        name: value["content"] if isinstance(value, dict) and "content" in value else value
        for name, value in config.items()
    }
    for name, value in config.items():
        is_text = value is None or (isinstance(value, str) and is_unicode(value))
        if name.endswith("_token") and not name.startswith("add_") and not is_text:  # add_bos_token is a switch
            raise CorpusError(f"{path}: {name}={value!r} is no text; restore it, or remove it to go without")
    return config


def _for_documents(tokenizer: Tokenizer) -> Tokenizer:
    """Encode whatever stands in a document, all of it, as text: also what looks like a special token."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
