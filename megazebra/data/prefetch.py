"""The next steps' micro-batches, made by a background thread while the current step computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from megazebra.data.batch import MicroBatch
from megazebra.data.loader import StepLoader


class PrefetchingLoader:
    """A StepLoader that works ahead.

    Steps are asked for in order; another step than the next one is made on the spot and the work ahead
    starts over from there, so what comes out never depends on what was prefetched. An error of the thread
    (a damaged corpus) is raised by the call that needs the step. One thread is enough: the compiled kernels that
    locate and read samples release the interpreter.

    depth: steps kept ready. stage: what the thread does with every micro-batch besides, such as slicing it and
    pinning its memory. wait_s: how long the last `next_step` waited for data, in seconds.
    """

    def __init__(
        self, loader: StepLoader, depth: int = 2, stage: Callable[[MicroBatch], MicroBatch] | None = None
    ) -> None:
        self.loader = loader
        self.stage = stage
        self.depth = depth
        self.wait_s = 0.0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: deque[tuple[int, Future[list[MicroBatch]]]] = deque()

    def next_step(self, consumed_samples: int) -> list[MicroBatch]:
        """As `StepLoader.next_step`."""
        started = time.perf_counter()
        if not self._ahead or self._ahead[0][0] != consumed_samples:
            self._forget()
            self._request(consumed_samples)
        _, step = self._ahead.popleft()
        try:
            batches = step.result()
        except BaseException:
            self._forget()
            raise
        while len(self._ahead) < self.depth:
            last = self._ahead[-1][0] if self._ahead else consumed_samples
            self._request(last + self.loader.global_batch_size)
        self.wait_s = time.perf_counter() - started
        return batches

    def close(self) -> None:
        """Stop the thread; what it prepared is dropped."""
        self._forget()
        self._thread.shutdown()

    def _request(self, consumed_samples: int) -> None:
        self._ahead.append((consumed_samples, self._thread.submit(self._make, consumed_samples)))

    def _make(self, consumed_samples: int) -> list[MicroBatch]:
        batches = self.loader.next_step(consumed_samples)
        return batches if self.stage is None else [self.stage(batch) for batch in batches]

    def _forget(self) -> None:
        for _, step in self._ahead:
            step.cancel()
        self._ahead.clear()
