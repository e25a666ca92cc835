"""A stage of a run put together: corpora, model, engine, checkpoints, reports; and the processes that stages share."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megazebra import launch
from megazebra.checkpoint.manager import Checkpoints, Progress, has_checkpoint, stage_to_go_on_with
from megazebra.checkpoint.store import CheckpointError
from megazebra.checkpoint.weights import ReadOnDemand, Weights, open_weights
from megazebra.config import Config, save_config
from megazebra.config.keys import flat
from megazebra.config.schema import ParallelConfig
from megazebra.config.stages import Stage, leaves
from megazebra.context.choice import resolve_specs, sequence_multiple, strategy_table
from megazebra.data.batch import MicroBatch
from megazebra.data.errors import CorpusError
from megazebra.data.index import builder
from megazebra.data.loader import StepLoader, validation_batches
from megazebra.data.prefetch import PrefetchingLoader
from megazebra.data.sources import Source, TrainingData, open_training_data, open_validation_data
from megazebra.evaluate.cell import Cell
from megazebra.models.build import build_model, forward, model_runtime
from megazebra.parallel.collectives import gather_objects
from megazebra.parallel.mesh import ParallelMesh
from megazebra.plan.flops import parameter_count, training_flops_of
from megazebra.train.audit import append_start, device_name, gather_hosts, origin_of, surroundings
from megazebra.train.deepspeed_config import effective_zero_stage, user_additions
from megazebra.train.engine import TrainEngine, start_deepspeed
from megazebra.train.evaluation import evaluation_cells
from megazebra.train.reporter import Reporter
from megazebra.train.stopping import StopRequest
from megazebra.train.trackers import check_trackers
from megazebra.train.watchdog import Watchdog

# Dealing out samples by cost is worth the trouble where one long document costs this many times what short ones do.
WORTH_BALANCING = 1.05


class World:
    """The processes of a run. Stages under one layout share its process groups."""

    def __init__(self) -> None:
        self.device = own_device()
        self.stop = StopRequest()
        self.watchdog = Watchdog(launch.rank(), launch.world_size())
        self._meshes: dict[tuple[int, int], ParallelMesh] = {}

    def mesh(self, parallel: ParallelConfig) -> ParallelMesh:
        """Starts torch.distributed when it is first asked for."""
        start_deepspeed(self.device, parallel.timeout_s)
        if not self._meshes:
            self.stop.listen()
        sizes = (parallel.tensor, parallel.context)
        if sizes not in self._meshes:
            self._meshes[sizes] = ParallelMesh.build(parallel, self.device)
        return self._meshes[sizes]


@contextmanager
def open_world() -> Iterator[World]:
    """The processes of a run, until the `with` block ends. Raises ValueError when this one has no GPU of its own."""
    world = World()
    try:
        yield world
        # Without both, most runs end in an abort of a rank that found its peers gone.
        dist.barrier()
        dist.destroy_process_group()
    finally:
        world.watchdog.close()


@dataclass
class Session:
    """validation: for every held-out corpus, what gives this rank's micro-batches of it; the name of
    data.validation_path is ''. evaluation: the tasks beside. reporter is None on all ranks but 0.
    """

    stage: Stage
    config: Config
    device: torch.device
    mesh: ParallelMesh
    engine: TrainEngine
    loader: PrefetchingLoader
    data: TrainingData
    validation: dict[str, Callable[[], Iterator[MicroBatch]]]
    evaluation: list[Cell]
    checkpoints: Checkpoints
    progress: Progress
    stop: StopRequest
    watchdog: Watchdog
    reporter: Reporter | None


def stages_left(stages: Sequence[Stage], world: World) -> Sequence[Stage]:
    """Those that the run's checkpoints have not completed; the last one where all are.

    Raises ValueError (run folder), CorpusError and CheckpointError: what is wrong with a late stage's data should show
    now.
    """
    _check_run_folder(stages[0].config)  # here, since a stage finds the folder in use by the one before
    if len(stages) == 1:
        return stages
    for stage in stages:
        open_training_data(stage.config)
        evaluation_cells(stage.config, open_validation_data(stage.config))
    config = stages[0].config

    def find() -> tuple[int, str | None]:
        try:
            go_back = config.checkpoint.on_damage == "go_back"
            return stage_to_go_on_with(stages, Path(config.run.dir), go_back=go_back).number, None
        except CheckpointError as error:
            return 0, str(error)

    group = world.mesh(config.parallel).world
    number, error = gather_objects(find() if group.rank == 0 else None, group)[0]
    if error is not None:
        raise CheckpointError(error)
    return stages[number:]


@contextmanager
def open_session(run: Config, stage: Stage, world: World, deepspeed_config: dict[str, Any]) -> Iterator[Session]:
    """Everything a training loop needs for a stage of the run, resumed from the newest checkpoint where there is one.

    Raises ValueError (data, backend) and CheckpointError, before anything is written.
    """
    config, device = stage.config, world.device
    world.watchdog.watch(Path(config.run.dir), _hang_timeout(config))
    data, held_out = open_training_data(config), open_validation_data(config)
    evaluation = evaluation_cells(config, held_out)
    check_trackers(config)
    weights = _initial_weights(config)
    runtime = model_runtime(config, device)
    mesh = world.mesh(config.parallel)
    check_same_everywhere(mesh, data, held_out)
    if mesh.world.rank == 0:  # before the model is built, which takes its time
        if stage.name:
            print(f"\n{stage.describe()}: steps {stage.first_step + 1} to {stage.last_step}", flush=True)
        print(*_introduction(config, mesh, device, data, held_out, runtime.backend.reason), sep="\n", flush=True)
        if weights is not None:
            print(*_origin(config, weights), sep="\n", flush=True)
    engine = TrainEngine(
        config,
        mesh,
        device,
        deepspeed_config,
        lambda: build_model(config, mesh, runtime),
        forward,
        ReadOnDemand(weights) if weights is not None else None,
    )
    checkpoints = Checkpoints(config, engine, data.identity, stage)
    progress = checkpoints.resume()
    loader = PrefetchingLoader(
        StepLoader(
            data,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=mesh.dp.rank,
            dp_size=mesh.dp.size,
            document_mask=config.data.document_mask,
            cost=_attention_cost(config),
        ),
        stage=_staging(config, mesh, device),
    )
    reporter = None
    hosts = gather_hosts(mesh.world, device)
    if mesh.world.rank == 0:
        Path(config.run.dir).mkdir(parents=True, exist_ok=True)
        save_config(run, Path(config.run.dir) / "config.yaml")
        start = {
            **surroundings(),
            "stage": stage.name,
            "first_step": progress.step,
            "config": run.model_dump(mode="json"),
            "deepspeed_config": user_additions(config, mesh.dp.size, deepspeed_config),
            "seed": config.train.seed,
            "hosts": hosts,
            "data": data.identity,
            "held_out": {name: source.identity for name, source in held_out.items()},
            "init_from": origin_of(weights),
            "attention_backend": runtime.backend.name,
        }
        append_start(Path(config.run.dir), start)
        reporter = Reporter(stage, progress, device, device_name(device), _unigram_bars(held_out))
        if stage.name and progress.step == stage.first_step:
            reporter.begin_stage(progress.step, dict(leaves(run.stages[stage.name])))
        if progress.step > stage.first_step:
            reporter.message("\n  ".join([f"resumed  after step {progress.step}", *checkpoints.notes]))
        if progress.step >= stage.last_step:
            reporter.message(f"nothing to do: train.steps={config.train.steps} are made; raise it to go on")
    yield Session(
        stage=stage,
        config=config,
        device=device,
        mesh=mesh,
        engine=engine,
        loader=loader,
        data=data,
        validation={name: _validation(config, mesh, source) for name, source in held_out.items()},
        evaluation=evaluation,
        checkpoints=checkpoints,
        progress=progress,
        stop=world.stop,
        watchdog=world.watchdog,
        reporter=reporter,
    )
    engine.close()
    del engine, checkpoints  # the copies of its last state too
    gc.collect()  # DeepSpeed's objects know each other in circles, and the next stage needs their memory


def _hang_timeout(config: Config) -> float:
    given = config.train.hang_timeout_s
    return 0.8 * config.parallel.timeout_s if given is None else given


def own_device() -> torch.device:
    """This process's GPU, or the CPU with its share of the threads. Raises ValueError when it has none of the GPUs."""
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


def check_same_everywhere(mesh: ParallelMesh, data: TrainingData, held_out: dict[str, Source]) -> None:
    """Every node may have the corpora on a disk of its own: the copies have to be equal."""
    mine = {source.name: source.identity for source in data.sources}
    mine |= {f"held out {name}".rstrip(): source.identity for name, source in held_out.items()}
    digests = gather_objects(hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest(), mesh.world)
    if len(set(digests)) == 1:
        return
    everyone = gather_objects(mine, mesh.world)
    rank, theirs = next((rank, theirs) for rank, theirs in enumerate(everyone) if theirs != everyone[0])
    names = ", ".join(name for name, identity in everyone[0].items() if theirs.get(name) != identity)
    raise CorpusError(f"ranks 0 and {rank} read different data ({names}); copy the same files to every node")


def _attention_cost(config: Config) -> Callable[[list[int]], float] | None:
    """What a sample costs, by the windows of the layers; None where all samples cost about the same."""
    seq_len, cost = config.data.seq_len, training_flops_of(config.model)
    if not config.data.balance or not config.data.document_mask:
        return None
    return cost if cost([seq_len]) >= WORTH_BALANCING * cost([1] * seq_len) else None


def part_of(batch: MicroBatch, config: Config, mesh: ParallelMesh) -> MicroBatch:
    """What this rank holds of a micro-batch's sequences."""
    return batch.padded(sequence_multiple(config)).context_slice(mesh.cp.rank, mesh.cp.size)


def _staging(config: Config, mesh: ParallelMesh, device: torch.device) -> Callable[[MicroBatch], MicroBatch]:
    """What the data thread does with a micro-batch after it is put together."""

    def stage(batch: MicroBatch) -> MicroBatch:
        part = part_of(batch, config, mesh)
        if device.type != "cuda":
            return part
        torch.cuda.set_device(device)  # of this thread: pinning on another GPU would take memory there
        return part.pinned()

    return stage


def _validation(config: Config, mesh: ParallelMesh, source: Source) -> Callable[[], Iterator[MicroBatch]]:
    return lambda: (
        part_of(batch, config, mesh)
        for batch in validation_batches(
            source.samples,
            config.validation.samples,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=mesh.dp.rank,
            dp_size=mesh.dp.size,
            document_mask=config.data.document_mask,
        )
    )


def _unigram_bars(held_out: dict[str, Source]) -> dict[str, float]:
    """Losses of a unigram model, where the corpora's sidecars know them. Theirs are over all tokens, so there is none
    for conversations, of which only a part is learned."""
    metas = {name: source.corpus.meta for name, source in held_out.items() if not source.corpus.has_spans}
    return {
        name: meta.unigram_cross_entropy
        for name, meta in metas.items()
        if meta is not None and meta.unigram_cross_entropy is not None
    }


def _check_run_folder(config: Config) -> None:
    folder = Path(config.run.dir)
    if config.checkpoint.resume == "never" and ((folder / "metrics.jsonl").exists() or has_checkpoint(folder)):
        raise ValueError(
            f"run.dir={config.run.dir} already holds a run and checkpoint.resume=never; "
            "choose another run.dir, or resume=auto to continue it"
        )


def _initial_weights(config: Config) -> Weights | None:
    """The weights to begin with; None where the run resumes or begins with random ones.

    Raises CheckpointError when there are none at checkpoint.init_from.
    """
    path = config.checkpoint.init_from
    return None if path is None or has_checkpoint(Path(config.run.dir)) else open_weights(path)


def _origin(config: Config, weights: Weights) -> Iterator[str]:
    """Where the weights come from, and in what the model they were made for differs from this one."""
    yield f"weights  {weights.folder}"
    theirs, ours = (flat(model.model_dump(mode="json")) for model in (weights.model, config.model))
    for key in ours:
        if theirs.get(key) != ours[key]:
            yield f"  model.{key} was {theirs.get(key)}, is {ours[key]} now"


def _introduction(
    config: Config,
    mesh: ParallelMesh,
    device: torch.device,
    data: TrainingData,
    held_out: dict[str, Source],
    backend: str,
) -> Iterator[str]:
    symbols = "".join("L" if spec.is_local else "G" for spec in config.model.attention_specs())
    millions = parameter_count(config.model) / 1e6
    stage = effective_zero_stage(config)
    because = "" if stage == config.parallel.zero_stage else f" (parallel.zero_stage=0 runs as {stage} in bf16)"
    sequence_parallel = "on" if config.parallel.sequence_parallel and mesh.tp.size > 1 else "off"
    yield f"run      {config.run.dir}"
    yield f"model    {millions:,.1f} M parameters, layers {symbols}, window {config.model.window}"
    yield (
        f"layout   {mesh.describe()}, ZeRO {stage}{because}, {config.train.precision}, "
        f"sequence parallel {sequence_parallel}, {device.type}"
    )
    yield f"kernels  {backend}"
    if mesh.cp.size > 1:
        yield from strategy_table(config, resolve_specs(config))
    steps, batch_size = config.train.steps, config.train.global_batch_size
    epochs = data.epochs(steps * batch_size)
    yield f"data     {steps} steps of {batch_size * config.data.seq_len:,} tokens; index builder: {builder.describe()}"
    for source, share in zip(data.sources, data.shares, strict=True):
        drawn = "" if len(data.sources) == 1 else f"{share:.1%} of the samples, "
        yield f"  {source.name}: {drawn}{epochs[source.name]:.2f} epochs of {_contents(source, config)}"
    for name, source in held_out.items():
        yield f"  {f'held out {name}'.rstrip()}: {_contents(source, config)}"


def _contents(source: Source, config: Config) -> str:
    kind = "conversations" if source.corpus.has_spans else "documents"
    text = f"{source.tokens:,} tokens in {source.documents:,} {kind}"
    if source.padding:
        text += f", {source.padding:.2%} padding"
    if source.too_long:
        done = "left out" if config.data.overlong == "drop" else "cut"
        text += f"; {source.too_long:,} longer than data.seq_len are {done}"
    return text
