"""What reads files that others may have made: how they are written, and read as far as a program of ours would."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from megazebra.checkpoint.model_folder import CHECKSUMS_NAME, ModelFolderWriter
from megazebra.checkpoint.store import read_latest, write_index
from megazebra.checkpoint.weights import open_weights
from megazebra.config import Config, ConfigError, load_config, save_config
from megazebra.config.stages import stages_of
from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.errors import CorpusError
from megazebra.data.index.order import Pieces
from megazebra.data.prepare.chat.chat_encoder import ChatEncoder
from megazebra.data.prepare.chat.chat_template import BUILT_IN
from megazebra.data.prepare.inputs.files import gather_files
from megazebra.data.prepare.inputs.records import RecordOptions, read_items
from megazebra.data.prepare.inputs.tasks import JsonLinesTask
from megazebra.data.prepare.open_encoder import EncoderOptions, open_encoder
from megazebra.data.sources import open_training_data, open_validation_data
from megazebra.durable import file_crc32
from megazebra.foreign.torch_files import read_structure
from megazebra.hf.companions import generation_config
from megazebra.hf.config_reading import model_config, read_fields
from megazebra.launch import is_users
from megazebra.report.evaluations import Evaluation
from megazebra.report.page import page
from megazebra.report.run import Run
from megazebra.train.audit import read_starts
from megazebra.train.deepspeed_config import build_deepspeed_config
from megazebra.train.metrics import MetricsFile

EXAMPLES = Path(__file__).parents[2] / "examples"
VOCABULARY = 50
MODEL = {
    "num_layers": 2,
    "hidden_size": 8,
    "ffn_hidden_size": 16,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "pattern": "GL",
    "window": 4,
    "max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Target:
    """write: sound files into an empty folder. read: them, as far as possible; a folder that is read is not changed.

    seal: put checksums right again, so that what they protect is read, too.
    """

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], None]
    seal: Callable[[Path], None] | None = None


def tiny_config(folder: Path) -> Config:
    data = {
        "path": str(folder / "text"),
        "validation_path": str(folder / "chat"),
        "seq_len": 32,
        "overlong": "truncate",
    }
    return Config.model_validate({"run": {"dir": str(folder)}, "model": MODEL, "data": data})


# --- configuration


def write_config(folder: Path) -> None:
    for number, name in enumerate(("tiny_cpu.yaml", "lcat_tiny_cpu.yaml")):
        shutil.copyfile(EXAMPLES / name, folder / f"{number}.yaml")
    overrides = [
        "--train.steps=5",
        "--model.pattern=[G, 128, L, L]",
        "--data.sources.a={path: x, weight: 2}",
        "--optimizer.betas=[0.9, 0.95]",
        "--stages.long.data.seq_len=64",
        "--data.sources.b.path=y",
    ]
    (folder / "overrides.txt").write_text("\n".join(overrides))
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 1, "overlap_comm": True}}))


def read_config(folder: Path) -> None:
    overrides = (folder / "overrides.txt").read_text(errors="surrogateescape").split("\n")
    for file in (folder / "0.yaml", folder / "1.yaml"):
        attempts: list[list[str]] = [[], overrides]
        for more in attempts:
            try:
                config = load_config(file, more)
            except ConfigError:
                continue
            save_config(config, folder / "saved")
            assert load_config(folder / "saved") == config
            for stage in stages_of(config):
                stage.config.model.attention_specs()
    build_deepspeed_config(Config.model_validate({"train": {"global_batch_size": 8}}), 2, folder / "deepspeed.json")


# --- corpora


def write_corpus(folder: Path) -> None:
    random = np.random.default_rng(0)
    with CorpusWriter(folder / "text", vocab_size=VOCABULARY) as writer:
        writer.add_documents([random.integers(0, VOCABULARY, length) for length in (40, 1, 0, 70, 33)])
    with CorpusWriter(folder / "chat", vocab_size=VOCABULARY, with_spans=True) as writer:
        documents = [random.integers(0, VOCABULARY, length) for length in (12, 20, 6)]
        writer.add_documents(documents, [[[2, 5], [7, 9]], [[1, 20]], []])


def read_corpus(folder: Path) -> None:
    for name in ("text", "chat"):
        for by_sequence in (False, True):
            corpus = Corpus(folder / name, vocab_size=VOCABULARY, by_sequence=by_sequence)
            for document in {0, corpus.documents // 2, corpus.documents - 1}:
                corpus.read(document)
                whole = np.array([document]), np.array([0]), corpus.document_lengths[[document]].astype(np.int64)
                corpus.gather(Pieces(*whole))
                if corpus.document_spans is not None:
                    corpus.spans(document)
            corpus.close()
    config = tiny_config(folder)
    data = open_training_data(config)
    for index in (0, 3, 10**9):
        data[index]
    for source in open_validation_data(config).values():
        source.samples[0]
    Corpus(folder / "text").verify()


def seal_corpus(folder: Path) -> None:
    """As if the files had been written so: without a sidecar nothing is compared."""
    (folder / "text.meta.json").unlink(missing_ok=True)
    meta = folder / "chat.meta.json"
    try:
        fields = json.loads(meta.read_bytes())
        fields["spans_crc32"] = file_crc32(folder / "chat.spans")
        meta.write_text(json.dumps(fields))
    except (ValueError, TypeError, RecursionError):
        pass


# --- checkpoints and models


def write_checkpoint(folder: Path) -> None:
    step = folder / "checkpoints" / "step_00000002"
    step.mkdir(parents=True)
    parameters: dict[str, Any] = {
        "a": {"shape": [6, 4], "partition_dim": 0},
        "b": {"shape": [5], "partition_dim": None},
    }
    files = {}
    for rank in range(2):
        tensors = {"a|0|master": torch.arange(8.0), "a|8|master": torch.arange(4.0), "a|0|exp_avg": torch.zeros(12)}
        tensors |= {"b|0|master": torch.ones(5), "a|0|step": torch.tensor(2.0), "b|0|step": torch.tensor(2.0)}
        path = step / f"tp_{rank:03d}_dp_000_00.safetensors"
        save_file(tensors, path)
        pieces = [["a", 0, 8], ["a", 8, 4], ["b", 0, 5]]
        files[path.name] = {
            "bytes": path.stat().st_size,
            "crc32": file_crc32(path),
            "tensor_rank": rank,
            "pieces": pieces,
        }
    index = {
        "format": 3,
        "progress": {"step": 2, "samples": 8, "tokens": 256},
        "parameters": parameters,
        "files": files,
        "layout": {"data": 1, "context": 1, "tensor": 2, "zero_stage": 1},
        "stage": {"name": "", "number": 0},
        "config": tiny_config(folder).model_dump(mode="json"),
    }
    write_index(step, index)
    (folder / "checkpoints" / "latest").write_text("step_00000002\n")


def seal_checkpoint(folder: Path) -> None:
    step = folder / "checkpoints" / "step_00000002"
    try:
        index = json.loads((step / "index.json").read_bytes())
        index.pop("crc32", None)
        for name, entry in index["files"].items():
            if (step / name).is_file():
                entry |= {"bytes": (step / name).stat().st_size, "crc32": file_crc32(step / name)}
        text = json.dumps(index, sort_keys=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return
    (step / "index.json").write_text(json.dumps({**index, "crc32": zlib.crc32(text.encode())}))


def write_model(folder: Path) -> None:
    model = folder / "model"
    with ModelFolderWriter(model, tiny_config(folder).model, max_file_bytes=300) as writer:
        for name, shape in (("a.weight", (6, 4)), ("b.weight", (30,)), ("c.weight", ())):
            writer.write(name, torch.ones(shape))


def seal_model(folder: Path) -> None:
    model = folder / "model"
    try:
        content = json.loads((model / CHECKSUMS_NAME).read_bytes())
        for name, entry in content["files"].items():
            if (model / name).is_file():
                entry |= {"bytes": (model / name).stat().st_size, "crc32": file_crc32(model / name)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return
    (model / CHECKSUMS_NAME).write_text(json.dumps(content))


def read_weights(folder: Path) -> None:
    model = folder / "model"
    weights = open_weights(model if model.exists() else folder)
    for name in weights.names:
        weights.shape(name)
        weights.dtype(name)
        weights.tensor(name)
    weights.verify(lambda _: None)
    if (states := getattr(weights, "states", None)) is not None:
        read_latest(folder / "checkpoints")
        for name in weights.names:
            for state in states(name):
                weights.tensor(name, state)  # type: ignore[call-arg]
            weights.scalars(name)  # type: ignore[attr-defined]


def write_hugging_face(folder: Path) -> None:
    common = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "vocab_size": 99,
        "max_position_embeddings": 256,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
    }
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 1e4,
    }
    kinds = {
        "llama": {"rope_scaling": scaling, "rope_theta": 1e4},
        "mistral": {"sliding_window": 32},
        "qwen3": {
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 8,
            "use_sliding_window": True,
        },
        "smollm3": {"no_rope_layer_interval": 2, "rope_theta": 1e4, "use_sliding_window": True, "sliding_window": 8},
        "cwm": {
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 8,
            "rope_parameters": scaling,
        },
    }
    for kind, fields in kinds.items():
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps({"model_type": kind, **common, **fields}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "bos_token_id": 0}))


def read_hugging_face(folder: Path) -> None:
    generation_config(folder)
    for config in sorted(folder.glob("*/config.json")):
        model_config(read_fields(config.parent)).attention_specs()


def write_torch_file(folder: Path) -> None:
    torch.save({"module": {"w": torch.ones(3, 4)}, "step": 3, "list": [torch.zeros(2), "x"]}, folder / "model.pt")


def read_torch_file(folder: Path) -> None:
    for stored in _stored(read_structure(folder / "model.pt")):
        stored.read(0, int(np.prod(stored.shape)))


def _stored(tree: Any) -> list[Any]:
    if isinstance(tree, dict | list):
        return [found for value in (tree.values() if isinstance(tree, dict) else tree) for found in _stored(value)]
    return [tree] if hasattr(tree, "position") else []


# --- conversations and text to prepare


def write_records(folder: Path) -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hé"},
        {"role": "assistant", "content": "ho"},
    ]
    records: list[Any] = [
        {"messages": turns},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "p", "response": "r", "system": "s"},
        {"instruction": "i", "input": "more", "output": "o"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, turns[2]]},
        {"text": "plain", "meta": {"text": "nested"}},
    ]
    content = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    (folder / "chats.jsonl").write_bytes(content)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))


def read_records(folder: Path) -> None:
    encoders = [ChatEncoder(_tokenizer(), BUILT_IN[name], eod_id=0) for name in BUILT_IN]
    for file in gather_files([str(folder)]):
        half = file.bytes if file.is_compressed else file.bytes // 2
        for task in (JsonLinesTask(file, 0, half), JsonLinesTask(file, half, file.bytes)):
            if task.bytes == 0:
                continue
            for key in (None, "text", "meta.text"):
                options = RecordOptions(text_key=key, skip_bad_records=True, validation_share=0.5)
                records = [item.record for item in read_items(task, options) if item.record is not None]
                if key is None:
                    for encoder in encoders:
                        encoder.encode(records)
            try:
                list(read_items(task, RecordOptions(text_key=None)))
            except CorpusError:
                continue


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    tokenizer = _tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m['content'] | trim }}"
        "{% generation %}{{ eos_token }}{% endgeneration %}{% endfor %}"
    )
    (folder / "template.jinja").write_text(template)
    fields = {
        "eos_token": {"content": "<|im_end|>"},
        "bos_token": "<|im_start|>",
        "model_max_length": 10**30,
        "chat_template": [{"name": "default", "template": template}, {"name": "other", "template": ""}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def read_tokenizer(folder: Path) -> None:
    turns = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "ho"}]
    open_encoder(EncoderOptions(tokenizer=str(folder), threads=1)).encode(["text", ""])
    for template in ("chatml", "tokenizer", str(folder / "template.jinja")):
        open_encoder(EncoderOptions(tokenizer=str(folder), chat=template, threads=1)).encode([{"messages": turns}])


# --- what a run leaves behind


def write_run(folder: Path) -> None:
    train = {
        "kind": "train",
        "tokens": 256,
        "loss": 3.5,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "step_time_s": 0.5,
        "data_wait_s": 0.1,
        "tokens_per_s": 512.0,
        "flops_per_s": 1e9,
        "mfu": None,
        "comm_bytes": 100,
        "peak_memory_bytes": 10**9,
        "comm": {"tp.all_reduce": {"calls": 2, "bytes": 100}},
        "context": {"local.halo": {"calls": 1, "bytes": 50}},
        "halo_overlap": 0.5,
    }
    rows: list[dict[str, Any]] = [{**train, "step": step} for step in range(1, 5)]
    rows += [
        {"kind": "validation", "step": 4, "source": "", "loss": 3.0, "seconds": 1.0},
        {"kind": "data", "step": 4, "epochs": {"corpus": 0.5}},
        {"kind": "checkpoint", "step": 4, "bytes": 1000, "stall_s": 0.1, "seconds": 1.0},
        {"kind": "stage", "step": 4, "name": "long", "number": 2, "config": {"data.seq_len": 64}},
        {**train, "step": 5, "skipped": "loss is nan", "samples": "samples 0 to 3", "loss": None, "stage": "long"},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_config(tiny_config(folder), folder / "config.yaml")
    (folder / "run.json").write_text(
        json.dumps([{"first_step": 0, "config": tiny_config(folder).model_dump(mode="json")}])
    )
    write_checkpoint(folder)
    evaluation = {"columns": {"length": "tokens"}, "results": [{"length": 32, "score": 0.5}], "model": {"path": "x"}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))


def read_run(folder: Path) -> None:
    """Each file by a reader of its own: a program that stops at one would not read the next."""
    readers: list[Callable[[], Any]] = [
        lambda: read_starts(folder),
        lambda: MetricsFile(folder / "metrics.jsonl", 3, "long").close(),
        lambda: watch(folder),
    ]
    for reader in readers:
        try:
            reader()
        except Exception as error:
            if not is_users(error):
                raise


def watch(folder: Path) -> None:
    if importlib.util.find_spec("rich") is None:
        return
    from rich.console import Console

    from megazebra.monitor.watching import Monitor

    with Monitor(folder) as monitor:
        monitor.poll()
        Console(file=io.StringIO(), width=80, height=30).print(monitor.frame(80, 30))


def read_report(folder: Path) -> None:
    page(Run.open(folder), [Evaluation.open(folder)])


TARGETS = {
    target.name: target
    for target in (
        Target("config", write_config, read_config),
        Target("corpus", write_corpus, read_corpus, seal_corpus),
        Target("checkpoint", write_checkpoint, read_weights, seal_checkpoint),
        Target("model", write_model, read_weights, seal_model),
        Target("hugging_face", write_hugging_face, read_hugging_face),
        Target("torch_file", write_torch_file, read_torch_file),
        Target("records", write_records, read_records),
        Target("tokenizer", write_tokenizer, read_tokenizer),
        Target("run", write_run, read_run),
        Target("report", write_run, read_report),  # draws charts: a second each
    )
}
