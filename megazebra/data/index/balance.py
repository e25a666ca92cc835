"""Which samples of a step each data-parallel rank takes, so that none waits long for another."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from megazebra.data.index.builder import native


def balance(costs: NDArray[np.floating], ranks: int, micro_batch_size: int) -> NDArray[np.int64]:
    """Deals a step's samples: int64 [ranks, n / ranks], positions in `costs`, micro-batch after micro-batch.

    costs: [n], what each sample costs, in any unit. All ranks get the same number of samples. The dearest
    ranks * micro_batch_size samples make the first micro-batch of all ranks, the next ones the second: under ZeRO-3
    ranks wait for each other in every micro-batch, and similar samples keep that short. Inside a micro-batch the
    dearest sample goes to the rank with the least total so far that still has room (longest processing time first,
    Graham 1969). Equal costs are dealt by position, equal totals by rank.

    With micro-batches of one sample, no deal has a smaller sum of the micro-batches' maxima, and the ranks' totals
    differ by no more than the costs within a micro-batch do: by less than the dearest sample.

    Raises ValueError when the samples can't be dealt evenly or a cost is not a finite number.
    """
    chunk = ranks * micro_batch_size
    if len(costs) % chunk:
        raise ValueError(
            f"{len(costs)} samples can't be dealt to {ranks} data-parallel ranks in micro-batches of "
            f"{micro_batch_size}; make train.global_batch_size a multiple of {chunk}"
        )
    costs = np.ascontiguousarray(costs, dtype=np.float64)
    strange = np.flatnonzero(~np.isfinite(costs))
    if strange.size:
        raise ValueError(f"sample {strange[0]} costs {costs[strange[0]]}; costs have to be finite numbers")
    if (builder := native()) is not None:
        return builder.balance(costs, ranks, micro_batch_size)
    order = np.argsort(-costs, kind="stable").tolist()
    totals = [0.0] * ranks
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for first in range(0, len(order), chunk):
        with_room = [(total, rank) for rank, total in enumerate(totals)]
        heapq.heapify(with_room)
        for sample in order[first : first + chunk]:
            _, rank = heapq.heappop(with_room)
            dealt[rank].append(sample)
            totals[rank] += float(costs[sample])
            if len(dealt[rank]) % micro_batch_size:
                heapq.heappush(with_room, (totals[rank], rank))
    return np.array(dealt, dtype=np.int64).reshape(ranks, -1)
