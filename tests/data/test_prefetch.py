"""Working ahead changes when steps are made, never which."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from megazebra.data.batch import MicroBatch
from megazebra.data.errors import CorpusError
from megazebra.data.prefetch import PrefetchingLoader

GLOBAL_BATCH = 4


class CountingLoader:
    """Stands for a StepLoader: a step is named by where it begins."""

    global_batch_size = GLOBAL_BATCH

    def __init__(self) -> None:
        self.made: list[int] = []
        self.threads: set[str] = set()
        self.broken_at: int | None = None
        self.pause_s = 0.0

    def next_step(self, consumed_samples: int) -> list[MicroBatch]:
        self.threads.add(threading.current_thread().name)
        time.sleep(self.pause_s)
        self.made.append(consumed_samples)
        if consumed_samples == self.broken_at:
            raise CorpusError("short read")
        return [consumed_samples]  # type: ignore[list-item]


@pytest.fixture
def source() -> CountingLoader:
    return CountingLoader()


@pytest.fixture
def loader(source: CountingLoader) -> Iterator[PrefetchingLoader]:
    prefetching = PrefetchingLoader(source, depth=2)  # type: ignore[arg-type]
    yield prefetching
    prefetching.close()


def wait_until_made(source: CountingLoader, steps: int) -> None:
    deadline = time.monotonic() + 10
    while len(source.made) < steps and time.monotonic() < deadline:
        time.sleep(0.001)


def test_steps_come_in_order_and_two_are_ready_beforehand(source: CountingLoader, loader: PrefetchingLoader) -> None:
    for step in range(5):
        assert loader.next_step(step * GLOBAL_BATCH) == [step * GLOBAL_BATCH]
    wait_until_made(source, 7)
    assert source.made == [step * GLOBAL_BATCH for step in range(7)], "each step once"
    assert len(source.threads) == 1
    assert threading.current_thread().name not in source.threads


def test_a_wait_is_measured(source: CountingLoader, loader: PrefetchingLoader) -> None:
    source.pause_s = 0.05
    loader.next_step(0)
    assert loader.wait_s >= 0.05


def test_the_thread_stages_every_micro_batch(source: CountingLoader) -> None:
    staged_by: list[str] = []

    def stage(batch: MicroBatch) -> MicroBatch:
        staged_by.append(threading.current_thread().name)
        return -batch  # type: ignore[operator, return-value]

    loader = PrefetchingLoader(source, stage=stage)  # type: ignore[arg-type]
    assert loader.next_step(4) == [-4]
    loader.close()
    assert set(staged_by) == source.threads


def test_another_step_than_the_next_is_made_on_the_spot(source: CountingLoader, loader: PrefetchingLoader) -> None:
    assert loader.next_step(0) == [0]
    assert loader.next_step(100) == [100]
    assert loader.next_step(104) == [104]
    assert loader.next_step(0) == [0]


def test_an_error_comes_with_the_step_it_belongs_to(source: CountingLoader, loader: PrefetchingLoader) -> None:
    source.broken_at = 8
    assert loader.next_step(0) == [0]
    assert loader.next_step(4) == [4]
    with pytest.raises(CorpusError, match="short read"):
        loader.next_step(8)
    source.broken_at = None
    assert loader.next_step(8) == [8], "mended, it goes on"


def test_closing_stops_the_thread(source: CountingLoader) -> None:
    loader = PrefetchingLoader(source)  # type: ignore[arg-type]
    loader.next_step(0)
    loader.close()
    assert not any(thread.name in source.threads for thread in threading.enumerate())
