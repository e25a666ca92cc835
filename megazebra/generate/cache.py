"""Keys and values of the tokens before: all of them in global layers, the last `window` in local ones.

With capacity S, window w and one global layer in a group of L, that takes 1/L + (1 - 1/L) min(S, w)/S of what full
attention takes.

The rows of a batch end together: shorter ones begin with padding, which no token sees. A column is an index into such
padded rows; a row's positions count from its own first token.

Legend: B batch, S tokens of one forward pass, T keys, H query heads and G key/value heads of this tensor-parallel rank,
D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megazebra.attention.backend import BackendChoice
from megazebra.attention.packing import Packing
from megazebra.generate.decode_attention import attend_to_cache
from megazebra.models.zebra import ZebraModel
from megazebra.pattern import AttentionSpec


class KVCache:
    """The caches of all layers of a model; what `ZebraModel.forward` takes as `cache`.

    padding: for every row, the columns before its first token. capacity: columns in all, padding included.
    kv_heads: of this tensor-parallel rank.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        padding: Sequence[int],
        capacity: int,
        *,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        self.columns = Columns(padding, device)
        shape = (len(padding), kv_heads, capacity, head_dim)
        self.layers = [LayerCache(spec, self.columns, shape, dtype, device) for spec in specs]

    @classmethod
    def of(cls, model: ZebraModel, padding: Sequence[int], capacity: int) -> KVCache:
        """An empty cache for the model, in the dtype and on the device of its weights.

        Raises ValueError when the model is built for context or sequence parallelism, which split a row's tokens.
        """
        if model.mesh.cp.size > 1 or model.runtime.sequence_parallel:
            raise ValueError(
                f"generation keeps whole rows on every rank, but the model has parallel.context={model.mesh.cp.size} "
                f"and sequence_parallel={model.runtime.sequence_parallel}; load it with parallel.tensor alone"
            )
        config, weight = model.model.config, model.lm_head.weight
        return cls(
            model.model.specs,
            padding,
            capacity,
            kv_heads=config.kv_heads // model.mesh.tp.size,
            head_dim=config.head_size,
            dtype=weight.dtype,
            device=weight.device,
        )

    def begin(self, count: int) -> Tensor:
        """Start a forward pass over the next `count` columns; their positions, int64 [B, count] (padding has 0).

        Raises ValueError when that is more than the capacity.
        """
        if self.columns.end + count > self.capacity:
            raise ValueError(
                f"the cache holds {self.columns.end} of {self.capacity} tokens, {count} more do not fit; "
                "make it with a larger capacity"
            )
        return self.columns.advance(count)

    @property
    def nbytes(self) -> int:
        """Of all keys and values on this rank."""
        return sum(layer.keys_BGTD.nbytes + layer.values_BGTD.nbytes for layer in self.layers)

    @property
    def full_attention_nbytes(self) -> int:
        """What the same would take if every layer were global."""
        return sum(layer.nbytes_per_column for layer in self.layers) * self.capacity


class Columns:
    """Which columns a forward pass brings, [first, end), and what follows from that for all layers alike."""

    def __init__(self, padding: Sequence[int], device: torch.device) -> None:
        self.padding = tuple(padding)
        self.padding_B1 = torch.tensor(self.padding, device=device)[:, None]
        self.first = self.end = 0
        self._packings: dict[int, Packing | None] = {}
        self._unseen: dict[int, Tensor | None] = {}

    def advance(self, count: int) -> Tensor:
        self.first, self.end = self.end, self.end + count
        self._packings, self._unseen = {}, {}
        columns_S = torch.arange(self.first, self.end, device=self.padding_B1.device)
        return (columns_S - self.padding_B1).clamp(min=0)

    def packing(self, first_key: int) -> Packing | None:
        """Padding apart from the rest, for the new queries and the keys from a column on; None without padding there.

        Padding is a document of its own: its queries see something, so that nothing becomes NaN.
        """
        if first_key not in self._packings:
            self._packings[first_key] = self._apart(first_key) if max(self.padding) > first_key else None
        return self._packings[first_key]

    def unseen(self, size: int) -> Tensor | None:
        """For one new query, which slots of a ring of `size` hold padding: bool [B, T]; None where none does."""
        if size not in self._unseen:
            oldest, newest = max(0, self.end - size), self.end - 1
            self._unseen[size] = None
            if max(self.padding) > oldest:
                slots_T = torch.arange(self.end - oldest, device=self.padding_B1.device)
                columns_T = newest - (newest - slots_T) % size
                # A query that is padding itself sees itself, so that nothing becomes NaN.
                self._unseen[size] = columns_T < self.padding_B1.clamp(max=newest)
        return self._unseen[size]

    def _apart(self, first_key: int) -> Packing:
        queries, keys = [], []
        for padding in self.padding:
            edge = min(padding, self.end)
            spans = [
                (max(edge - self.first, 0), max(edge - first_key, 0)),  # padding
                (self.end - max(edge, self.first), self.end - max(edge, first_key)),
            ]
            queries.append([count for count, its_keys in spans if its_keys])
            keys.append([its_keys for _, its_keys in spans if its_keys])
        return Packing.from_spans(queries, keys, self.padding_B1.device)


class LayerCache:
    """Keys and values of one layer, a ring: column c lies in slot c mod size.

    A global layer has a slot for every column and never goes round. A local one has `window`, one for each key that its
    newest query sees.
    shape: [B, G, capacity, D] of a global layer.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        columns: Columns,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        B, G, capacity, D = shape
        self.spec = spec
        self.columns = columns
        self.size = min(spec.window or capacity, capacity)
        # Heads before slots: then products with all heads of a batch read the ring as it lies.
        self.keys_BGTD = torch.empty(B, G, self.size, D, dtype=dtype, device=device)
        self.values_BGTD = torch.empty_like(self.keys_BGTD)

    @property
    def nbytes_per_column(self) -> int:
        return (self.keys_BGTD.nbytes + self.values_BGTD.nbytes) // self.size

    def attend(
        self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, backend: BackendChoice, sinks_H: Tensor | None
    ) -> Tensor:
        """Keep the new keys and values; output [B, S, H, D] of the new queries over all that the layer lets them see.

        Several queries go through the attention backend, aligned at the end with the keys in order. For one query the
        order of the keys does not matter.
        """
        first, end = self.columns.first, self.columns.end
        if end - first == 1:
            self._keep(k_BSGD, v_BSGD)
            filled = min(end, self.size)
            return attend_to_cache(
                q_BSHD,
                self.keys_BGTD[:, :, :filled],
                self.values_BGTD[:, :, :filled],
                spec=self.spec,
                sinks_H=sinks_H,
                unseen_BT=self.columns.unseen(self.size),
            )
        before = min(first, self.size - 1)  # columns before the new ones that the first of them sees
        if end <= self.size:  # in order as they lie
            self._keep(k_BSGD, v_BSGD)
            k_BTGD, v_BTGD = (ring[:, :, :end].transpose(1, 2) for ring in (self.keys_BGTD, self.values_BGTD))
        else:
            k_BTGD = torch.cat([*self._last(self.keys_BGTD, before), k_BSGD], dim=1)
            v_BTGD = torch.cat([*self._last(self.values_BGTD, before), v_BSGD], dim=1)
            self._keep(k_BSGD, v_BSGD)
        packing = self.columns.packing(first - before)
        return backend.attend(q_BSHD, k_BTGD, v_BTGD, spec=self.spec, packing=packing, sinks_H=sinks_H)

    def _keep(self, k_BSGD: Tensor, v_BSGD: Tensor) -> None:
        """Write the new columns over the oldest; of more than the ring has slots, the last ones."""
        count = min(k_BSGD.shape[1], self.size)
        slot = (self.columns.end - count) % self.size
        fits = min(count, self.size - slot)  # the others go on at the ring's beginning
        for ring_BGTD, new_BSGD in ((self.keys_BGTD, k_BSGD), (self.values_BGTD, v_BSGD)):
            new_BGTD = new_BSGD[:, -count:].transpose(1, 2)
            ring_BGTD[:, :, slot : slot + fits] = new_BGTD[:, :, :fits]
            if fits < count:
                ring_BGTD[:, :, : count - fits] = new_BGTD[:, :, fits:]

    def _last(self, ring_BGTD: Tensor, count: int) -> list[Tensor]:
        """The last columns before the new ones, in order, as views [B, ., G, D] of one stretch or two."""
        slot = (self.columns.first - count) % self.size
        fits = min(count, self.size - slot)
        stretches = (ring_BGTD[:, :, slot : slot + fits], ring_BGTD[:, :, : count - fits])
        return [stretch.transpose(1, 2) for stretch in stretches]
