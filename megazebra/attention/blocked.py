"""Exact attention in plain torch whose cost follows the band: O(S * window) work in a local layer.

Queries go in blocks; a block reads only the keys it can see, in tiles from right to left, with the online
softmax of FlashAttention (Dao et al. 2022, algorithm 1) between tiles. Only q, k, v, the output and each
row's log-sum-exp are kept for backward, which computes the logits again (ibid., algorithm 4).

Arithmetic is float32 (float64 for float64 inputs) whatever the dtype of the inputs; results are rounded once.
Sums run in a fixed order, so results are the same bit for bit from run to run with one number of threads.

The largest temporary besides O(S * D) ones is a block of logits: at most `score_elements` numbers.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads, R = H/G, D head dim; C heads of a chunk
(b, g flattened), N = S * R query rows of a key/value head (row = query * R + r: the R query heads that share
a key/value head are rows of one matrix, so keys are never repeated), n rows and t keys of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megazebra.attention.inputs import Sizes, check_inputs
from megazebra.attention.packing import Packing
from megazebra.pattern import AttentionSpec

# A local block computes window + block - 1 keys of which each query sees `window`: narrow blocks waste little.
# A global block wastes half a block of keys on average: wide blocks read the keys less often.
LOCAL_BLOCK, GLOBAL_BLOCK = 64, 128
TILE_KEYS = 1024
# Logits computed at once. On CPU they should stay in the caches; on a GPU a launch should be worth its cost.
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
LOG2_E = math.log2(math.e)


def unavailable(device: torch.device) -> str | None:
    return None


def unsupported(spec: AttentionSpec, *, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    return None


def attend(
    q_BSHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    *,
    spec: AttentionSpec,
    packing: Packing | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v under the package's mask; returns [B, S, H, D] in q's dtype.

    Differentiable once in q, k, v and the sinks. Raises ValueError when shapes, dtypes or options don't fit.
    """
    check_inputs(q_BSHD, k_BTGD, v_BTGD, spec, packing, sinks_H)
    return _BlockedAttention.apply(q_BSHD, k_BTGD, v_BTGD, sinks_H, spec, packing)


def score_elements(sizes: Sizes, device_type: str) -> int:
    """Upper bound on the numbers in one block of logits, whatever the sequence length, batch and window."""
    return max(_chunk_elements(device_type), GLOBAL_BLOCK * sizes.R * TILE_KEYS)


def _chunk_elements(device_type: str) -> int:
    return CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"])


class Chunk(NamedTuple):
    """Heads computed together: some rows of the batch with all key/value heads, or some heads of one row."""

    rows: slice
    groups: slice


class Tile(NamedTuple):
    """Keys first_key..end_key of a block of queries."""

    first_key: int
    end_key: int
    bias_nt: Tensor | None  # 0 where visible and -inf elsewhere; None where everything is


class Block(NamedTuple):
    first_query: int
    end_query: int
    tiles: list[Tile]


class _Plan:
    """How one call is cut up. Laid out on the host: nothing here waits for the device."""

    def __init__(self, sizes: Sizes, spec: AttentionSpec, packing: Packing | None, like: Tensor) -> None:
        self.sizes, self.window, self.packing = sizes, spec.window, packing
        self.dtype, self.device = torch.promote_types(like.dtype, torch.float32), like.device
        self.block = min(GLOBAL_BLOCK if spec.window is None else LOCAL_BLOCK, sizes.S)
        keys = sizes.T if spec.window is None else min(spec.window + self.block - 1, sizes.T)
        # At least a block wide, so that a row's own key is in the first tile it meets.
        self.tile = max(min(TILE_KEYS, keys), self.block)
        # exp2 is the cheaper exponential: logits are kept in units of log 2, which the scale of q absorbs.
        self.scale, self.softcap = 1 / math.sqrt(sizes.D), spec.softcap
        self.q_scale = self.scale * LOG2_E if spec.softcap is None else self.scale / spec.softcap
        self._band_biases: dict[tuple[int, ...], Tensor] = {}

    def chunks(self) -> Iterator[Chunk]:
        B, G = self.sizes.B, self.sizes.G
        heads = max(1, _chunk_elements(self.device.type) // (self.block * self.sizes.R * self.tile))
        rows = 1 if self.packing is not None else max(1, heads // G)  # documents differ from row to row
        for b in range(0, B, rows):
            for g in range(0, G, min(heads, G)):
                yield Chunk(slice(b, min(b + rows, B)), slice(g, min(g + heads, G)))

    def blocks(self, chunk: Chunk) -> Iterator[Block]:
        S, offset = self.sizes.S, self.sizes.offset
        for first in range(0, S, self.block):
            end = min(first + self.block, S)
            lowest = 0 if self.window is None else max(0, first + offset - self.window + 1)
            if self.packing is not None:
                lowest = max(lowest, int(self.packing.host_start_BS[chunk.rows.start, first]))
            highest = end + offset
            edges = range(highest, lowest, -self.tile)
            tiles = [self._tile(first, end, max(edge - self.tile, lowest), edge, chunk) for edge in edges]
            yield Block(first, end, tiles)

    def _tile(self, first: int, end: int, first_key: int, end_key: int, chunk: Chunk) -> Tile:
        first_own, last_own = first + self.sizes.offset, end - 1 + self.sizes.offset
        after_own = end_key - 1 > first_own
        beyond_window = self.window is not None and first_key <= last_own - self.window
        bias_nt = self._band_bias(first_own, last_own, first_key, end_key) if after_own or beyond_window else None
        if self.packing is not None and self.packing.host_start_BS[chunk.rows.start, end - 1] > first_key:
            start_n1 = self.packing.document_start_BS[chunk.rows.start, first:end, None]
            other_nt = torch.arange(first_key, end_key, device=self.device) < start_n1
            band_nt = torch.zeros((), dtype=self.dtype, device=self.device) if bias_nt is None else bias_nt
            bias_nt = torch.where(other_nt, -math.inf, band_nt)
        return Tile(first_key, end_key, bias_nt)

    def _band_bias(self, first_own: int, last_own: int, first_key: int, end_key: int) -> Tensor:
        """Causality and window."""
        geometry = (last_own - first_own, first_key - first_own, end_key - first_own)
        if (bias_nt := self._band_biases.get(geometry)) is not None:
            return bias_nt
        own_n1 = torch.arange(first_own, last_own + 1, device=self.device)[:, None]
        key_t = torch.arange(first_key, end_key, device=self.device)
        hidden_nt = key_t > own_n1
        if self.window is not None:
            hidden_nt |= key_t <= own_n1 - self.window
        bias_nt = torch.zeros(hidden_nt.shape, dtype=self.dtype, device=self.device)
        bias_nt.masked_fill_(hidden_nt, -math.inf)
        # All blocks inside an unpacked sequence share a geometry; documents make too many to keep.
        if self.packing is None:
            self._band_biases[geometry] = bias_nt
        return bias_nt

    def head_matrices(self, x_BTGD: Tensor, chunk: Chunk) -> Tensor:
        """The keys or values of a chunk, laid out for bmm, in the dtype of the arithmetic."""
        x = x_BTGD[chunk.rows, :, chunk.groups].transpose(1, 2)
        return x.to(self.dtype, memory_format=torch.contiguous_format).reshape(-1, self.sizes.T, self.sizes.D)

    def query_view(self, x_BSHD: Tensor, chunk: Chunk, first: int = 0, end: int | None = None) -> Tensor:
        """The part of a query-like tensor that a chunk owns, as a view [b, g, queries, R, D]."""
        x = x_BSHD.unflatten(2, (self.sizes.G, self.sizes.R))
        return x[chunk.rows, first:end, chunk.groups].transpose(1, 2)

    def row_matrices(self, x_BSHD: Tensor, chunk: Chunk) -> Tensor:
        """A query-like tensor of a chunk, laid out for bmm, in the dtype of the arithmetic."""
        x = self.query_view(x_BSHD, chunk)
        x = x.to(self.dtype, memory_format=torch.contiguous_format)
        return x.reshape(-1, self.sizes.S * self.sizes.R, self.sizes.D)

    def logits(self, q_CnD: Tensor, k_CtD: Tensor, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """Masked logits in units of log 2, and tanh(logit / softcap) when there is a cap."""
        scores_Cnt = torch.bmm(q_CnD, k_CtD.transpose(1, 2))
        tanh_Cnt = None
        if self.softcap is not None:
            tanh_Cnt = scores_Cnt.tanh_()
            scores_Cnt = tanh_Cnt * (self.softcap * LOG2_E)
        if tile.bias_nt is not None:
            scores_Cnt.unflatten(1, (-1, self.sizes.R)).add_(tile.bias_nt[:, None])
        return scores_Cnt, tanh_Cnt

    def sink_rows(self, sinks_H: Tensor, chunk: Chunk, queries: int) -> Tensor:
        """Each row's sink in units of log 2."""
        sinks_gR = sinks_H.to(self.dtype).view(self.sizes.G, self.sizes.R)[chunk.groups] * LOG2_E
        b = chunk.rows.stop - chunk.rows.start
        return sinks_gR[None, :, None].expand(b, -1, queries, -1).reshape(-1, queries * self.sizes.R, 1)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSHD: Tensor,
        k_BTGD: Tensor,
        v_BTGD: Tensor,
        sinks_H: Tensor | None,
        spec: AttentionSpec,
        packing: Packing | None,
    ) -> Tensor:
        sizes = check_inputs(q_BSHD, k_BTGD, v_BTGD, spec, packing, sinks_H)
        plan = _Plan(sizes, spec, packing, q_BSHD)
        B, S, _, H, G, D = sizes
        R = sizes.R
        out_BSHD = q_BSHD.new_empty(B, S, H, D)
        lse_BGN = torch.empty(B, G, S * R, dtype=plan.dtype, device=plan.device)
        with torch.autocast(plan.device.type, enabled=False):
            for chunk in plan.chunks():
                q_CND = plan.row_matrices(q_BSHD, chunk) * plan.q_scale
                k_CTD, v_CTD = plan.head_matrices(k_BTGD, chunk), plan.head_matrices(v_BTGD, chunk)
                for first, end, tiles in plan.blocks(chunk):
                    rows = slice(first * R, end * R)
                    sinks_Cn1 = None if sinks_H is None else plan.sink_rows(sinks_H, chunk, end - first)
                    out_CnD, lse_Cn1 = _block_forward(plan, tiles, q_CND[:, rows], k_CTD, v_CTD, sinks_Cn1)
                    _copy_reshaped(plan.query_view(out_BSHD, chunk, first, end), out_CnD)
                    _copy_reshaped(lse_BGN[chunk.rows, chunk.groups, rows], lse_Cn1)
        ctx.save_for_backward(q_BSHD, k_BTGD, v_BTGD, sinks_H, out_BSHD, lse_BGN)
        ctx.spec, ctx.packing = spec, packing
        return out_BSHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BSHD: Tensor) -> tuple[Tensor | None, ...]:
        q_BSHD, k_BTGD, v_BTGD, sinks_H, out_BSHD, lse_BGN = ctx.saved_tensors
        sizes = check_inputs(q_BSHD, k_BTGD, v_BTGD, ctx.spec, ctx.packing, sinks_H)
        plan = _Plan(sizes, ctx.spec, ctx.packing, q_BSHD)
        R = sizes.R
        dq_BSHD = torch.empty(q_BSHD.shape, dtype=q_BSHD.dtype, device=q_BSHD.device)
        dk_BTGD = torch.empty(k_BTGD.shape, dtype=k_BTGD.dtype, device=k_BTGD.device)
        dv_BTGD = torch.empty_like(dk_BTGD)
        dsinks_H = None if sinks_H is None else torch.zeros(sizes.H, dtype=plan.dtype, device=plan.device)
        for chunk in plan.chunks():
            q_CND = plan.row_matrices(q_BSHD, chunk) * plan.q_scale
            k_CTD, v_CTD = plan.head_matrices(k_BTGD, chunk), plan.head_matrices(v_BTGD, chunk)
            dout_CND = plan.row_matrices(dout_BSHD, chunk)
            delta_CN1 = (dout_CND * plan.row_matrices(out_BSHD, chunk)).sum(-1, keepdim=True)
            lse_CN1 = lse_BGN[chunk.rows, chunk.groups].reshape(-1, sizes.S * R, 1)
            dk_CTD, dv_CTD = torch.zeros_like(k_CTD), torch.zeros_like(v_CTD)
            for first, end, tiles in plan.blocks(chunk):
                rows = slice(first * R, end * R)
                of_rows = (q_CND[:, rows], dout_CND[:, rows], delta_CN1[:, rows], lse_CN1[:, rows])
                dq_CnD = _block_backward(plan, tiles, *of_rows, k_CTD, v_CTD, dk_CTD, dv_CTD)
                _copy_reshaped(plan.query_view(dq_BSHD, chunk, first, end), dq_CnD.mul_(plan.scale))
            # dk was summed over scaled queries.
            dk_CTD.mul_(plan.scale / plan.q_scale)
            _copy_reshaped(dk_BTGD[chunk.rows, :, chunk.groups].transpose(1, 2), dk_CTD)
            _copy_reshaped(dv_BTGD[chunk.rows, :, chunk.groups].transpose(1, 2), dv_CTD)
            if sinks_H is not None and dsinks_H is not None:
                weight_CN1 = (plan.sink_rows(sinks_H, chunk, sizes.S) - lse_CN1).exp2_()
                shares = (weight_CN1 * delta_CN1).view(chunk.rows.stop - chunk.rows.start, -1, sizes.S, R)
                dsinks_H.view(sizes.G, R)[chunk.groups] -= shares.sum((0, 2))
        dsinks = None if sinks_H is None or dsinks_H is None else dsinks_H.to(sinks_H.dtype)
        return dq_BSHD, dk_BTGD, dv_BTGD, dsinks, None, None


def _block_forward(
    plan: _Plan, tiles: list[Tile], q_CnD: Tensor, k_CTD: Tensor, v_CTD: Tensor, sinks_Cn1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output of a block of queries and its log2-sum-exp2."""
    out_CnD = torch.zeros_like(q_CnD)
    if sinks_Cn1 is None:
        max_Cn1 = q_CnD.new_full((*q_CnD.shape[:2], 1), -math.inf)
        sum_Cn1 = torch.zeros_like(max_Cn1)
    else:  # a key already seen that had no value
        max_Cn1, sum_Cn1 = sinks_Cn1, torch.ones_like(sinks_Cn1)
    # Right to left: a row meets its own key first, so its maximum is finite from then on.
    for tile in tiles:
        keys = slice(tile.first_key, tile.end_key)
        scores_Cnt, _ = plan.logits(q_CnD, k_CTD[:, keys], tile)
        new_max_Cn1 = torch.maximum(max_Cn1, scores_Cnt.amax(-1, keepdim=True))
        weights_Cnt = scores_Cnt.sub_(new_max_Cn1).exp2_()
        shrink_Cn1 = (max_Cn1 - new_max_Cn1).exp2_()
        sum_Cn1.mul_(shrink_Cn1).add_(weights_Cnt.sum(-1, keepdim=True))
        out_CnD.mul_(shrink_Cn1).baddbmm_(weights_Cnt, v_CTD[:, keys])
        max_Cn1 = new_max_Cn1
    return out_CnD.div_(sum_Cn1), max_Cn1.add_(sum_Cn1.log2_())


def _block_backward(
    plan: _Plan,
    tiles: list[Tile],
    q_CnD: Tensor,
    dout_CnD: Tensor,
    delta_Cn1: Tensor,
    lse_Cn1: Tensor,
    k_CTD: Tensor,
    v_CTD: Tensor,
    dk_CTD: Tensor,
    dv_CTD: Tensor,
) -> Tensor:
    """Adds a block's share to dk and dv; returns its dq. Both dq and dk still lack their scale."""
    dq_CnD = torch.zeros_like(q_CnD)
    for tile in tiles:
        keys = slice(tile.first_key, tile.end_key)
        scores_Cnt, tanh_Cnt = plan.logits(q_CnD, k_CTD[:, keys], tile)
        weights_Cnt = scores_Cnt.sub_(lse_Cn1).exp2_()
        dv_CTD[:, keys].baddbmm_(weights_Cnt.transpose(1, 2), dout_CnD)
        dlogits_Cnt = torch.bmm(dout_CnD, v_CTD[:, keys].transpose(1, 2))
        dlogits_Cnt.sub_(delta_Cn1).mul_(weights_Cnt)
        if tanh_Cnt is not None:
            dlogits_Cnt.mul_(tanh_Cnt.square_().neg_().add_(1))
        dk_CTD[:, keys].baddbmm_(dlogits_Cnt.transpose(1, 2), q_CnD)
        dq_CnD.baddbmm_(dlogits_Cnt, k_CTD[:, keys])
    return dq_CnD


def _copy_reshaped(target: Tensor, source: Tensor) -> None:
    target.copy_(source.view(target.shape))
