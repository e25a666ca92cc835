"""Measure the data pipeline against other people's, both sides in turns in this process.

    pip install -e '.[cpu,bench]'        # Megatron-core, OLMo-core and gigatoken, to compare with
    python tools/bench_data.py           # minutes; --quick takes less than one

CPU seconds, median over rounds; a ratio says how many times less ours takes. What is not installed is left out.
  index    the order of 20 M documents (lognormal lengths, median 400) in samples of 4,096 tokens
  sample   one whole sample with document masks (tokens, labels, positions, boundaries) from files in the page cache
  pack     best-fit packing of documents into sequences of 32,768 tokens
  encode   text to corpus with tools/preprocess_data.py's code, against the tokenizer's own encode_batch_fast
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from bench.measure import Row, command_line, interleaved, report
from numpy.typing import NDArray

from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.index import builder
from megazebra.data.index.best_fit import pack_best_fit
from megazebra.data.index.documents import Documents
from megazebra.data.index.megatron_order import MegatronOrder
from megazebra.data.index.order import SampleOrder
from megazebra.data.prepare.encoders.tokenizer import load_tokenizer, save_tokenizer, train_byte_level_bpe
from megazebra.data.prepare.inputs.files import gather_files
from megazebra.data.prepare.job import Preprocessing
from megazebra.data.prepare.open_encoder import EncoderOptions
from megazebra.data.prepare.preprocess import preprocess
from megazebra.data.samples import ChunkedSamples

SEED, EOD, VOCAB = 1234, 0, 32_000


def bench_index(quick: bool) -> Iterator[Row]:
    lengths = document_lengths(2_000_000 if quick else 20_000_000)
    seq_len = 4096
    samples = (int(lengths.sum(dtype=np.int64)) - 1) // seq_len

    def default_order() -> SampleOrder:
        order = SampleOrder(Documents(lengths), seq_len, SEED, "bench")
        order.locate(0)
        return order

    sides: dict[str, Callable[[], Any]] = {
        "default": default_order,
        "compat": lambda: MegatronOrder(lengths, seq_len, SEED, samples, source="bench"),
    }
    if megatron := _import("megatron.core.datasets.gpt_dataset"):
        sides["megatron"] = lambda: _megatron_index(megatron, lengths, seq_len, samples)
    seconds = interleaved(sides, rounds=3)
    yield "index_default_bytes", default_order().state_bytes, "bytes the default order holds beside the lengths"
    yield "index_default_ms", seconds["default"] * 1e3, f"ms to open the default order of {len(lengths):,} documents"
    yield "index_compat_s", seconds["compat"], "s to build Megatron's order"
    if megatron:
        _check_same_order(sides["compat"](), sides["megatron"](), samples)
        yield "index_megatron_s", seconds["megatron"], "s Megatron-core takes for it"
        yield "index_compat_vs_megatron", seconds["megatron"] / seconds["compat"], "Megatron / ours, the same order"
        yield "index_default_vs_megatron", seconds["megatron"] / seconds["default"], "Megatron / our default order"


def bench_sample(quick: bool) -> Iterator[Row]:
    megatron = _import("megatron.core.datasets.gpt_dataset")
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "corpus"
        write_corpus(prefix, tokens=20_000_000 if quick else 100_000_000)
        corpus = Corpus(prefix)
        for name, seq_len, count in (("4k", 4096, 400), ("128k", 131_072, 40)):
            order = SampleOrder(corpus.layout, seq_len, SEED, corpus.fingerprint)
            ours = ChunkedSamples(corpus, order, document_mask=True)
            turns = np.random.default_rng(SEED).integers(0, ours.samples_per_epoch, count).tolist()
            sides: dict[str, Callable[[], Any]] = {"ours": partial(_draw, ours, turns)}
            if megatron:
                theirs = _megatron_dataset(megatron, prefix, seq_len, Path(folder) / f"cache-{name}")
                sides["megatron"] = partial(_draw, theirs, turns)
            seconds = interleaved(sides, rounds=5)
            yield f"sample_{name}_us", seconds["ours"] / count * 1e6, f"us per sample of {seq_len:,} tokens"
            if megatron:
                yield f"sample_{name}_megatron_us", seconds["megatron"] / count * 1e6, "us Megatron-core takes"
                yield f"sample_{name}_vs_megatron", seconds["megatron"] / seconds["ours"], "Megatron / ours"


def bench_pack(quick: bool) -> Iterator[Row]:
    capacity = 32_768
    lengths = document_lengths(20_000 if quick else 200_000).clip(max=capacity).astype(np.int64)
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: pack_best_fit(lengths, capacity)}
    if olmo := _import("olmo_core.data.utils"):
        bounds = np.stack((lengths.cumsum() - lengths, lengths.cumsum()), axis=1)
        sides["olmo"] = lambda: olmo.InstancePacker(capacity).pack_documents(bounds)
    seconds = interleaved(sides, rounds=1 if quick else 3)
    bins = len(sides["ours"]().starts) - 1
    yield "pack_ns_per_document", seconds["ours"] / len(lengths) * 1e9, f"ns per document, {len(lengths):,} documents"
    yield "pack_padding", 1 - lengths.sum() / (bins * capacity), "share of padding"
    if olmo:
        theirs = len(sides["olmo"]()[0])
        if theirs != bins:
            raise SystemExit(f"OLMo-core packs {theirs} sequences, ours {bins}")
        yield "pack_vs_python", seconds["olmo"] / seconds["ours"], f"OLMo-core / ours, both {bins:,} sequences"


def bench_encode(quick: bool) -> Iterator[Row]:
    """The Python standard library's sources, repeated, with a byte-level BPE of 32,000 tokens; one core."""
    with tempfile.TemporaryDirectory() as folder:
        texts = [Path(file.path).read_bytes().decode(errors="replace") for file in gather_files(["stdlib"])]
        copies = 1 if quick else 4
        tokenizer_file = Path(folder) / "tokenizer.json"
        save_tokenizer(train_byte_level_bpe(texts, VOCAB), tokenizer_file)
        inputs = Path(folder) / "texts.jsonl"
        inputs.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * copies))
        tokenizer = load_tokenizer(tokenizer_file)

        def encoder_alone() -> None:
            for start in range(0, len(texts) * copies, 128):
                tokenizer.encode_batch_fast((texts * copies)[start : start + 128], add_special_tokens=False)

        def build(engine: Literal["tokenizers", "gigatoken"]) -> int:
            options = EncoderOptions(tokenizer=str(tokenizer_file), engine=engine)
            job = Preprocessing(inputs=(str(inputs),), output=f"{folder}/{engine}", encoder=options, force=True)
            report = preprocess(job)
            return report.train.tokens + (report.validation.tokens if report.validation else 0)

        sides: dict[str, Callable[[], Any]] = {"alone": encoder_alone, "tokenizers": partial(build, "tokenizers")}
        if _import("gigatoken"):
            sides["gigatoken"] = partial(build, "gigatoken")
        tokens = build("tokenizers")
        seconds = interleaved(sides, rounds=1 if quick else 3)
        yield "preprocess_tokens_per_cpu_s", tokens / seconds["tokenizers"], f"tokens per CPU second of {tokens:,}"
        yield "encoder_tokens_per_cpu_s", tokens / seconds["alone"], "of encode_batch_fast alone"
        yield "preprocess_vs_encoder", seconds["alone"] / seconds["tokenizers"], "whole job / encode_batch_fast alone"
        if "gigatoken" in sides:
            yield "preprocess_gigatoken_tokens_per_cpu_s", tokens / seconds["gigatoken"], "the same with gigatoken"


def document_lengths(count: int) -> NDArray[np.int32]:
    lengths = np.random.default_rng(SEED).lognormal(np.log(400), 1.0, count)
    return lengths.clip(1, 10_000_000).astype(np.int32)


def write_corpus(prefix: Path, tokens: int) -> None:
    random = np.random.default_rng(SEED)
    with CorpusWriter(prefix, vocab_size=VOCAB, eod_id=EOD) as writer:
        while writer.tokens < tokens:
            ids = random.integers(1, VOCAB, 4_000_000, dtype=np.int64)
            ends = np.cumsum(document_lengths(4_000))
            ids[ends[ends < len(ids)] - 1] = EOD
            writer.add_documents(np.split(ids, ends[ends < len(ids)]))


def _draw(samples: Any, indices: list[int]) -> None:
    for index in indices:
        _ = samples[index]


def _megatron_index(module: Any, lengths: NDArray[np.int32], seq_len: int, samples: int) -> Any:
    """Megatron-core's own builder on lengths in memory, its cache files left out."""
    dataset = module.GPTDataset.__new__(module.GPTDataset)
    dataset.config = SimpleNamespace(
        defer_npy_index_mmap=False,
        path_to_cache=None,
        mock=True,
        fast_cache_load=False,
        sequence_length=seq_len,
        add_extra_token_to_sequence=1,
        random_seed=SEED,
    )
    dataset.dataset = SimpleNamespace(sequence_lengths=lengths)
    dataset.indices = np.arange(len(lengths), dtype=np.int32)
    dataset.num_samples = samples
    dataset.index_split = module.Split.train
    return dataset._build_document_sample_shuffle_indices()


def _check_same_order(ours: MegatronOrder, theirs: Any, samples: int) -> None:
    document_index, sample_index, shuffle_index = theirs
    for i in np.linspace(0, samples - 1, 1000).astype(np.int64).tolist():
        first, offset = sample_index[shuffle_index[i]]
        pieces = ours.locate(i)
        if (pieces.documents[0], pieces.starts[0]) != (document_index[first], offset):
            raise SystemExit(f"sample {i} begins elsewhere in Megatron's order")


def _megatron_dataset(module: Any, prefix: Path, seq_len: int, cache: Path) -> Any:
    config = module.GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=seq_len,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=SimpleNamespace(eod=EOD, pad=-1, vocab_size=VOCAB, unique_identifiers={"class": "bench"}),
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    low_level = module.GPTDataset.build_low_level_dataset(str(prefix), config)
    indices = np.arange(len(low_level.sequence_lengths), dtype=np.int32)
    return module.GPTDataset(low_level, str(prefix), indices, None, module.Split.train, config)


def _import(name: str) -> Any:
    import importlib
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            print(f"  without {name}: {error}")
            return None


BENCHES = {"index": bench_index, "sample": bench_sample, "pack": bench_pack, "encode": bench_encode}


def main(arguments: list[str] | None = None) -> int:
    parsed = command_line(__doc__, BENCHES).parse_args(arguments)
    print(f"index builder: {builder.describe()}")
    report({name: partial(bench, parsed.quick) for name, bench in BENCHES.items()}, parsed.only, parsed.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
