"""A run put together: processes, corpora, model, engine, checkpoints, reports."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megazebra.checkpoint.manager import Checkpoints, Progress, has_checkpoint
from megazebra.config import Config, save_config
from megazebra.data.batch import MicroBatch
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.loader import StepLoader, validation_batches
from megazebra.data.prefetch import PrefetchingLoader
from megazebra.data.samples import CorpusSamples
from megazebra.models.build import build_model, forward, model_runtime
from megazebra.parallel.mesh import ParallelMesh
from megazebra.plan.flops import parameter_count
from megazebra.train.deepspeed_config import effective_zero_stage
from megazebra.train.engine import TrainEngine, start_deepspeed
from megazebra.train.reporter import Reporter
from megazebra.train.trackers import check_trackers


@dataclass
class Session:
    """validation() gives this rank's held-out micro-batches; reporter is None on all ranks but 0."""

    config: Config
    device: torch.device
    mesh: ParallelMesh
    engine: TrainEngine
    loader: PrefetchingLoader
    validation: Callable[[], list[MicroBatch]] | None
    checkpoints: Checkpoints
    progress: Progress
    reporter: Reporter | None


@contextmanager
def open_session(config: Config, deepspeed_config: dict[str, Any]) -> Iterator[Session]:
    """Everything a training loop needs, resumed from the newest checkpoint where there is one.

    Raises ValueError (data, backend, run folder) and CheckpointError, before anything is written.
    """
    device = _device()
    train_corpus, held_out, held_out_samples = _open_corpora(config)
    _check_run_folder(config)
    check_trackers(config)
    runtime = model_runtime(config, device)
    start_deepspeed(device, config.parallel.timeout_s)
    mesh = ParallelMesh.build(config.parallel)
    samples = CorpusSamples(train_corpus, config.data.seq_len, config.train.seed)
    if mesh.world.rank == 0:  # before the model is built, which takes its time
        print(*_introduction(config, mesh, device, train_corpus, samples, runtime.backend.reason), sep="\n", flush=True)
    engine = TrainEngine(config, mesh, device, deepspeed_config, lambda: build_model(config, mesh, runtime), forward)
    checkpoints = Checkpoints(config, engine, train_corpus.fingerprint)
    progress = checkpoints.resume()
    loader = PrefetchingLoader(
        StepLoader(
            samples,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=mesh.dp.rank,
            dp_size=mesh.dp.size,
            document_mask=config.data.document_mask,
        )
    )
    reporter = None
    if mesh.world.rank == 0:
        Path(config.run.dir).mkdir(parents=True, exist_ok=True)
        save_config(config, Path(config.run.dir) / "config.yaml")
        unigram = held_out.meta.unigram_cross_entropy if held_out and held_out.meta else None
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        reporter = Reporter(config, progress, device, device_name, unigram)
        if progress.step:
            reporter.message(f"resumed  after step {progress.step}")
        if progress.step >= config.train.steps:
            reporter.message(f"nothing to do: train.steps={config.train.steps} are made; raise it to go on")
    yield Session(
        config=config,
        device=device,
        mesh=mesh,
        engine=engine,
        loader=loader,
        validation=None if held_out_samples is None else _validation(config, mesh, held_out_samples),
        checkpoints=checkpoints,
        progress=progress,
        reporter=reporter,
    )
    # Without both, most runs end in an abort of a rank that found its peers gone.
    dist.barrier()
    dist.destroy_process_group()


def _device() -> torch.device:
    if torch.cuda.is_available():
        local_rank, visible = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if visible == 1:  # Slurm can give each task a GPU of its own, which is then the only one it sees
            local_rank = 0
        if local_rank >= visible:
            raise ValueError(f"local rank {local_rank} has no GPU: {visible} are visible; start one process per GPU")
        os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed reads it for itself
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    if "OMP_NUM_THREADS" not in os.environ:
        # torch's default is every core for each rank, which is slower than sharing them.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    return torch.device("cpu")


def _open_corpora(config: Config) -> tuple[Corpus, Corpus | None, CorpusSamples | None]:
    if config.data.path is None:
        raise ValueError("data.path is not set; give the prefix of a corpus that tools/preprocess_data.py has written")
    train = Corpus.open(config.data.path, vocab_size=config.model.vocab_size)
    if config.data.validation_path is None:
        return train, None, None
    held_out = Corpus.open(
        config.data.validation_path, vocab_size=config.model.vocab_size, field="data.validation_path"
    )
    return train, held_out, CorpusSamples(held_out, config.data.seq_len, shuffle=False)


def _validation(config: Config, mesh: ParallelMesh, samples: CorpusSamples) -> Callable[[], list[MicroBatch]]:
    return lambda: list(
        validation_batches(
            samples,
            config.validation.samples,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=mesh.dp.rank,
            dp_size=mesh.dp.size,
            document_mask=config.data.document_mask,
        )
    )


def _check_run_folder(config: Config) -> None:
    folder = Path(config.run.dir)
    if config.checkpoint.resume == "never" and ((folder / "metrics.jsonl").exists() or has_checkpoint(folder)):
        raise ValueError(
            f"run.dir={config.run.dir} already holds a run and checkpoint.resume=never; "
            "choose another run.dir, or resume=auto to continue it"
        )


def _introduction(
    config: Config,
    mesh: ParallelMesh,
    device: torch.device,
    corpus: Corpus,
    samples: CorpusSamples,
    backend: str,
) -> Iterator[str]:
    symbols = "".join("L" if spec.is_local else "G" for spec in config.model.attention_specs())
    millions = parameter_count(config.model) / 1e6
    stage = effective_zero_stage(config)
    because = "" if stage == config.parallel.zero_stage else f" (parallel.zero_stage=0 runs as {stage} in bf16)"
    sequence_parallel = "on" if config.parallel.sequence_parallel and mesh.tp.size > 1 else "off"
    steps, batch_size = config.train.steps, config.train.global_batch_size
    epochs = steps * batch_size / samples.samples_per_epoch
    yield f"run      {config.run.dir}"
    yield f"model    {millions:,.1f} M parameters, layers {symbols}, window {config.model.window}"
    yield (
        f"layout   {mesh.describe()}, ZeRO {stage}{because}, {config.train.precision}, "
        f"sequence parallel {sequence_parallel}, {device.type}"
    )
    yield f"kernels  {backend}"
    yield (
        f"data     {corpus.tokens:,} tokens in {corpus.documents:,} documents; {steps} steps of "
        f"{batch_size * config.data.seq_len:,} tokens are {epochs:.2f} epochs"
    )
