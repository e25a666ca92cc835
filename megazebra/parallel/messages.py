"""Messages between ranks that are not the same for all: from one rank to another, and all-to-all. Counted."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from megazebra.parallel.mesh import Group

Message = tuple[int, Tensor]  # the peer's rank in the group, and a contiguous tensor to send or to fill


class Flight:
    """Messages on their way, posted together: receives first, and as one so that no rank waits for its turn."""

    def __init__(self, sends: Sequence[Message], receives: Sequence[Message], group: Group, label: str) -> None:
        self._group = group
        self._messages = [tensor for _, tensor in (*receives, *sends)]  # to be kept until they have arrived
        operations = [
            dist.P2POp(operation, tensor, group.ranks[peer], group.process_group)
            for operation, messages in ((dist.irecv, receives), (dist.isend, sends))
            for peer, tensor in messages
        ]
        if receives:
            group.traffic.record_received("message", group.name, sum(t.nbytes for _, t in receives), label)
        self._posted = time.perf_counter()
        self._pending = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        """Until everything has arrived: on a GPU the stream waits and not the host, and no time is measured."""
        if not self._pending:
            return
        began = time.perf_counter()
        with self._group.traffic.communicating(self._group.name):
            for pending in self._pending:
                pending.wait()
        if self._messages[0].device.type == "cpu":
            now = time.perf_counter()
            self._group.traffic.record_flight(now - self._posted, now - began)
        self._pending, self._messages = [], []


def all_to_all(
    outgoing: Tensor, sent: Sequence[int], arriving: Sequence[int], group: Group, *, label: str = ""
) -> Tensor:
    """Every rank sends every other a part of its own: flat tensors, in the order of ranks.

    outgoing: [sum(sent)], `sent[p]` elements for rank p. Gives [sum(arriving)], `arriving[p]` elements from rank p.
    """
    incoming = outgoing.new_empty(sum(arriving))
    received = (incoming.numel() - arriving[group.rank]) * incoming.element_size()
    group.traffic.record_received("all_to_all", group.name, received, label)
    with group.traffic.communicating(group.name):
        dist.all_to_all_single(incoming, outgoing, list(arriving), list(sent), group=group.process_group)
    return incoming
