"""The training loop: data, step, report, validate, save."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import torch

from megazebra.checkpoint.manager import Progress
from megazebra.checkpoint.store import Saving
from megazebra.data.batch import MicroBatch
from megazebra.evaluate.scoring import evaluate_model
from megazebra.parallel.collectives import all_reduce
from megazebra.parallel.traffic import overlap_share
from megazebra.plan.flops import training_flops
from megazebra.train.guard import TrainingDivergedError
from megazebra.train.profiler import Profiler
from megazebra.train.session import Session
from megazebra.train.stragglers import StepTimes
from megazebra.train.watchdog import FILES_PATIENCE


def train(session: Session) -> signal.Signals | None:
    """Train from where the session stands to the last step of its stage.

    Returns the signal that asked some rank to stop earlier, once the step is made and saved; None at the end. Raises
    TrainingDivergedError (too many bad updates in a row) and CheckpointError (cannot save), on all ranks.
    """
    try:
        progress, stopped_by = _train(session)
    except BaseException as error:
        if isinstance(error, TrainingDivergedError):  # on all ranks at once: what is being saved is needed now
            report(session, session.checkpoints.completed(wait=True))
        if session.reporter is not None:
            session.reporter.abandon()
        raise
    finally:
        session.loader.close()
    if session.reporter is not None:
        if stopped_by is None:
            session.reporter.finish(progress, session.engine.guard.total_skips)
        else:
            session.reporter.stop(progress, stopped_by)
    return stopped_by


def _train(session: Session) -> tuple[Progress, signal.Signals | None]:
    config, engine, mesh, progress = session.config, session.engine, session.mesh, session.progress
    stage, batch_size = session.stage, config.train.global_batch_size
    stopped_by = None
    if progress.step < stage.last_step:  # a signal may have come while this was put together
        stopped_by = session.stop.anywhere(mesh.world, session.device)
    if stopped_by is None and 0 < progress.step == stage.first_step:
        # What the weights of the stage before do under this one's conditions.
        validate(session, progress.step)
        evaluate(session, progress.step)
    profiler = Profiler(session)
    while progress.step < stage.last_step and stopped_by is None:
        session.watchdog.phase(f"step {progress.step + 1}")
        profiler.before(progress.step + 1)
        started = time.perf_counter()
        mesh.traffic.reset()
        mesh.waits.reset()
        batches = [batch.to(session.device) for batch in session.loader.next_step(progress.samples)]
        samples = f"samples {progress.samples} to {progress.samples + batch_size - 1}"
        result = engine.train_step(batches, progress.step - stage.first_step)
        progress = Progress(
            progress.step + 1, progress.samples + batch_size, progress.tokens + batch_size * config.data.seq_len
        )
        seconds = time.perf_counter() - started
        profiler.after(progress.step)
        times, halo_overlap = step_times(session, seconds), overlap(session)
        if session.reporter is not None:
            session.reporter.step(
                progress,
                result,
                seconds=seconds,
                times=times,
                halo_overlap=halo_overlap,
                device_flops=device_flops(batches, session),
                traffic=mesh.traffic,
                samples=samples,
            )
        if result.skipped is not None:
            engine.guard.check(result.skipped, samples)
        if _due(progress.step, config.validation.interval, stage.last_step):
            validate(session, progress.step)
        if _due(progress.step, config.evaluation.interval, stage.last_step):
            evaluate(session, progress.step)
        report(session, session.checkpoints.completed())
        if progress.step < stage.last_step:  # at its end everything is done anyway
            stopped_by = session.stop.anywhere(mesh.world, session.device)
        if stopped_by is not None or _due(progress.step, config.checkpoint.interval, stage.last_step):
            save(session, progress)
    profiler.close()
    session.watchdog.phase(f"waiting for the checkpoint of step {progress.step}", patience=FILES_PATIENCE)
    report(session, session.checkpoints.completed(wait=True))
    return progress, stopped_by


def validate(session: Session, step: int) -> None:
    for name, batches in session.validation.items():
        started = time.perf_counter()
        loss = session.engine.evaluate(_watched(session, batches(), f"validation after step {step}"))
        if session.reporter is not None:
            session.reporter.validation(step, name, loss, time.perf_counter() - started)


def _watched(session: Session, batches: Iterator[MicroBatch], phase: str) -> Iterator[MicroBatch]:
    for batch in batches:
        session.watchdog.phase(phase)
        yield batch.to(session.device)


def evaluate(session: Session, step: int) -> None:
    if not session.evaluation:
        return
    started = time.perf_counter()
    session.watchdog.phase(f"evaluation after step {step}")
    # Through DeepSpeed's engine: under ZeRO-3 weights are gathered only then.
    rows = evaluate_model(
        session.engine.deepspeed,
        session.mesh,
        session.device,
        session.evaluation,
        on_cell=lambda rows: session.watchdog.phase(f"evaluation after step {step}, behind {rows[0].task}"),
    )
    if session.reporter is not None:
        session.reporter.evaluation(step, rows, time.perf_counter() - started)


def save(session: Session, progress: Progress) -> None:
    session.watchdog.phase(f"saving step {progress.step}", patience=FILES_PATIENCE)
    started = time.perf_counter()
    complete = session.checkpoints.save(progress)
    if session.reporter is not None:
        session.reporter.stalled(progress.step, time.perf_counter() - started)
        session.reporter.epochs(progress.step, session.data.epochs(progress.samples))
    report(session, complete)


def report(session: Session, complete: list[Saving]) -> None:
    for saving in complete:
        if session.reporter is not None:
            session.reporter.checkpoint(saving)


def step_times(session: Session, seconds: float) -> StepTimes:
    """What this step took of every rank; `seconds` is what it took here."""
    world = session.mesh.world
    times = torch.zeros(1 + world.size, device=session.device)
    times[0] = session.loader.wait_s  # the longest one counts: the others waited for that rank
    # Every rank has a place of its own beside it, so that one collective does for both.
    times[1 + world.rank] = max(0.0, seconds - session.mesh.waits.seconds())
    data_wait_s, *work_s = all_reduce(times, world, maximum=True, label="step_times").tolist()
    return StepTimes(data_wait_s, work_s)


def overlap(session: Session) -> float | None:
    """Share of the time that halos were under way in which ranks computed; None where that is not measured."""
    mesh = session.mesh
    if mesh.cp.size == 1:
        return None
    seconds = torch.tensor([mesh.traffic.in_flight_s, mesh.traffic.waited_s], device=session.device)
    return overlap_share(*all_reduce(seconds, mesh.world, label="overlap").tolist())


def device_flops(batches: list[MicroBatch], session: Session) -> float:
    """Model operations of this rank's share of the step."""
    lengths: list[int] = []
    for batch in batches:
        for row in batch.document_lengths or [[session.config.data.seq_len]] * batch.tokens_BS.shape[0]:
            lengths += row
    mesh = session.mesh
    return training_flops(session.config.model, lengths) / (mesh.tp.size * mesh.cp.size)


def _due(step: int, interval: int, last: int) -> bool:
    return step == last or (interval > 0 and step % interval == 0)
