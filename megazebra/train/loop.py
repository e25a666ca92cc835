"""The training loop: data, step, report, validate, save."""

from __future__ import annotations

import time

import torch

from megazebra.checkpoint.manager import Progress
from megazebra.checkpoint.store import Saving
from megazebra.data.batch import MicroBatch
from megazebra.parallel.collectives import all_reduce
from megazebra.parallel.traffic import overlap_share
from megazebra.plan.flops import training_flops
from megazebra.train.guard import TrainingDivergedError
from megazebra.train.session import Session


def train(session: Session) -> None:
    """Train from where the session stands to the last step of its stage.

    Raises TrainingDivergedError (too many bad updates in a row) and CheckpointError (cannot save), on all ranks.
    """
    try:
        progress = _train(session)
    except BaseException as error:
        if isinstance(error, TrainingDivergedError):  # on all ranks at once: what is being saved is needed now
            report(session, session.checkpoints.completed(wait=True))
        if session.reporter is not None:
            session.reporter.abandon()
        raise
    finally:
        session.loader.close()
    if session.reporter is not None:
        session.reporter.finish(progress, session.engine.guard.total_skips)


def _train(session: Session) -> Progress:
    config, engine, mesh, progress = session.config, session.engine, session.mesh, session.progress
    stage, batch_size = session.stage, config.train.global_batch_size
    if 0 < progress.step == stage.first_step:  # what the weights of the stage before do under this one's conditions
        validate(session, progress.step)
    while progress.step < stage.last_step:
        started = time.perf_counter()
        mesh.traffic.reset()
        batches = [batch.to(session.device) for batch in session.loader.next_step(progress.samples)]
        samples = f"samples {progress.samples} to {progress.samples + batch_size - 1}"
        result = engine.train_step(batches, progress.step - stage.first_step)
        progress = Progress(
            progress.step + 1, progress.samples + batch_size, progress.tokens + batch_size * config.data.seq_len
        )
        seconds = time.perf_counter() - started
        data_wait_s, halo_overlap = longest_wait(session), overlap(session)
        if session.reporter is not None:
            session.reporter.step(
                progress,
                result,
                seconds=seconds,
                data_wait_s=data_wait_s,
                halo_overlap=halo_overlap,
                device_flops=device_flops(batches, session),
                traffic=mesh.traffic,
                samples=samples,
            )
        if result.skipped is not None:
            engine.guard.check(result.skipped, samples)
        if _due(progress.step, config.validation.interval, stage.last_step):
            validate(session, progress.step)
        report(session, session.checkpoints.completed())
        if _due(progress.step, config.checkpoint.interval, stage.last_step):
            save(session, progress)
    report(session, session.checkpoints.completed(wait=True))
    return progress


def validate(session: Session, step: int) -> None:
    for name, batches in session.validation.items():
        started = time.perf_counter()
        loss = session.engine.evaluate(batch.to(session.device) for batch in batches())
        if session.reporter is not None:
            session.reporter.validation(step, name, loss, time.perf_counter() - started)


def save(session: Session, progress: Progress) -> None:
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


def longest_wait(session: Session) -> float:
    """How long the slowest rank waited for this step's data, in seconds: the others waited for that rank."""
    wait = torch.tensor([session.loader.wait_s], device=session.device)
    return all_reduce(wait, session.mesh.world, maximum=True, label="data_wait").item()


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
