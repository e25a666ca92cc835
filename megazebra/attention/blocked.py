"""Exact attention in plain torch whose cost follows the band: O(S * window) work in a local layer.

Queries go in blocks; a block reads only the keys it can see, in tiles from right to left, with the online
softmax of FlashAttention (Dao et al. 2022, algorithm 1) between tiles. Only q, k, v, the output and each
row's log-sum-exp are kept for backward, which computes the logits again (ibid., algorithm 4).

Arithmetic is float32 (float64 for float64 inputs) whatever the dtype of the inputs; results are rounded once.
Sums run in a fixed order, so results are the same bit for bit from run to run with one number of threads.

The largest temporary besides O(S * D) ones is a block of logits: at most `score_elements(...)` numbers.

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

# Logits computed at once. On CPU they should stay in the caches; on a GPU a launch should be worth its cost.
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
TILE_KEYS = 1024
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


def block_queries(window: int | None, R: int) -> int:
    """Queries of a block: a block computes window + block - 1 keys of which each query sees `window`."""
    if window is None:
        return max(128 // R, 16)
    return max(min(window // 4, 128 // R), 32, 16)


def score_elements(window: int | None, sizes: Sizes, device_type: str) -> int:
    """Upper bound on the numbers in one block of logits."""
    one_head = block_queries(window, sizes.R) * sizes.R * TILE_KEYS
    return max(one_head, CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"]))


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
        self.block = min(block_queries(spec.window, sizes.R), sizes.S)
        keys = sizes.T if spec.window is None else min(spec.window + self.block - 1, sizes.T)
        # At least a block wide, so that a row's own key is in the first tile it meets.
        self.tile = max(min(TILE_KEYS, keys), self.block)
        # exp2 is the cheaper exponential: logits are kept in units of log 2, which the scale of q absorbs.
        scale = 1 / math.sqrt(sizes.D)
        self.softcap = spec.softcap
        self.q_scale = scale * LOG2_E if spec.softcap is None else scale / spec.softcap
        self.logit_scale = scale
        self._biases: dict[tuple[int, ...], Tensor] = {}

    def chunks(self) -> Iterator[Chunk]:
        B, G = self.sizes.B, self.sizes.G
        limit = CHUNK_ELEMENTS.get(self.device.type, CHUNK_ELEMENTS["cuda"])
        heads = max(1, limit // (self.block * self.sizes.R * self.tile))
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
        documents = self.packing is not None and self.packing.host_start_BS[chunk.rows.start, end - 1] > first_key
        beyond_window = self.window is not None and last_own - self.window >= first_key
        if not (documents or beyond_window or end_key - 1 > first_own):
            return Tile(first_key, end_key, None)
        shape = (end - first, end_key - first_key, first_own - first_key)
        bias_nt = self._biases.get(shape)
        if bias_nt is None:
            own_n1 = torch.arange(first_own, last_own + 1, device=self.device)[:, None]
            key_t = torch.arange(first_key, end_key, device=self.device)
            hidden_nt = key_t > own_n1
            if self.window is not None:
                hidden_nt |= key_t <= own_n1 - self.window
            bias_nt = torch.zeros(hidden_nt.shape, dtype=self.dtype, device=self.device)
            bias_nt.masked_fill_(hidden_nt, -math.inf)
            self._biases[shape] = bias_nt
        if documents:
            assert self.packing is not None
            start_n1 = self.packing.document_start_BS[chunk.rows.start, first:end, None]
            bias_nt = bias_nt.masked_fill(torch.arange(first_key, end_key, device=self.device) < start_n1, -math.inf)
        return Tile(first_key, end_key, bias_nt)

    def heads_CTD(self, x_BTGD: Tensor, chunk: Chunk) -> Tensor:
        x = x_BTGD[chunk.rows, :, chunk.groups].transpose(1, 2)
        return x.to(self.dtype, memory_format=torch.contiguous_format).reshape(-1, self.sizes.T, self.sizes.D)

    def of_chunk(self, x_BSHD: Tensor, chunk: Chunk, first: int = 0, end: int | None = None) -> Tensor:
        """The part of a query-like tensor that a chunk owns, as a view [b, g, S, R, D]."""
        x = x_BSHD.unflatten(2, (self.sizes.G, self.sizes.R))
        return x[chunk.rows, first:end, chunk.groups].transpose(1, 2)

    def rows_CND(self, x_BSHD: Tensor, chunk: Chunk) -> Tensor:
        x = self.of_chunk(x_BSHD, chunk)
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

    def sinks_CN1(self, sinks_H: Tensor, chunk: Chunk, queries: int) -> Tensor:
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
                q_CND = plan.rows_CND(q_BSHD, chunk) * plan.q_scale
                k_CTD, v_CTD = plan.heads_CTD(k_BTGD, chunk), plan.heads_CTD(v_BTGD, chunk)
                for first, end, tiles in plan.blocks(chunk):
                    q_CnD = q_CND[:, first * R : end * R]
                    out_CnD = torch.zeros_like(q_CnD)
                    if sinks_H is None:
                        max_Cn1 = q_CnD.new_full((*q_CnD.shape[:2], 1), -math.inf)
                        sum_Cn1 = torch.zeros_like(max_Cn1)
                    else:  # a key already seen, without a value
                        max_Cn1 = plan.sinks_CN1(sinks_H, chunk, end - first)
                        sum_Cn1 = torch.ones_like(max_Cn1)
                    # Right to left: a row meets its own key first, so its maximum is finite from then on.
                    for tile in tiles:
                        scores_Cnt, _ = plan.logits(q_CnD, k_CTD[:, tile.first_key : tile.end_key], tile)
                        new_max_Cn1 = torch.maximum(max_Cn1, scores_Cnt.amax(-1, keepdim=True))
                        weights_Cnt = scores_Cnt.sub_(new_max_Cn1).exp2_()
                        shrink_Cn1 = max_Cn1.sub_(new_max_Cn1).exp2_()
                        sum_Cn1 = sum_Cn1.mul_(shrink_Cn1).add_(weights_Cnt.sum(-1, keepdim=True))
                        out_CnD = out_CnD.mul_(shrink_Cn1).baddbmm_(
                            weights_Cnt, v_CTD[:, tile.first_key : tile.end_key]
                        )
                        max_Cn1 = new_max_Cn1
                    view = plan.of_chunk(out_BSHD, chunk, first, end)
                    view.copy_(out_CnD.div_(sum_Cn1).view(view.shape))
                    lse = lse_BGN[chunk.rows, chunk.groups, first * R : end * R]
                    lse.copy_(max_Cn1.add_(sum_Cn1.log2_()).view(lse.shape))
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
            q_CND = plan.rows_CND(q_BSHD, chunk) * plan.q_scale
            k_CTD, v_CTD = plan.heads_CTD(k_BTGD, chunk), plan.heads_CTD(v_BTGD, chunk)
            dout_CND = plan.rows_CND(dout_BSHD, chunk)
            delta_CN1 = (dout_CND * plan.rows_CND(out_BSHD, chunk)).sum(-1, keepdim=True)
            lse_CN1 = lse_BGN[chunk.rows, chunk.groups].reshape(-1, sizes.S * R, 1)
            dk_CTD, dv_CTD = torch.zeros_like(k_CTD), torch.zeros_like(v_CTD)
            for first, end, tiles in plan.blocks(chunk):
                rows = slice(first * R, end * R)
                q_CnD, dout_CnD = q_CND[:, rows], dout_CND[:, rows]
                dq_CnD = torch.zeros_like(q_CnD)
                for tile in tiles:
                    keys = slice(tile.first_key, tile.end_key)
                    scores_Cnt, tanh_Cnt = plan.logits(q_CnD, k_CTD[:, keys], tile)
                    weights_Cnt = scores_Cnt.sub_(lse_CN1[:, rows]).exp2_()
                    dv_CTD[:, keys].baddbmm_(weights_Cnt.transpose(1, 2), dout_CnD)
                    dlogits_Cnt = torch.bmm(dout_CnD, v_CTD[:, keys].transpose(1, 2))
                    dlogits_Cnt.sub_(delta_CN1[:, rows]).mul_(weights_Cnt)
                    if tanh_Cnt is not None:
                        dlogits_Cnt.mul_(tanh_Cnt.square_().neg_().add_(1))
                    dk_CTD[:, keys].baddbmm_(dlogits_Cnt.transpose(1, 2), q_CnD)
                    dq_CnD.baddbmm_(dlogits_Cnt, k_CTD[:, keys])
                view = plan.of_chunk(dq_BSHD, chunk, first, end)
                view.copy_(dq_CnD.mul_(plan.logit_scale).view(view.shape))
            dk_CTD.mul_(plan.logit_scale / plan.q_scale)
            for d_BTGD, d_CTD in ((dk_BTGD, dk_CTD), (dv_BTGD, dv_CTD)):
                view = d_BTGD[chunk.rows, :, chunk.groups].transpose(1, 2)
                view.copy_(d_CTD.view(view.shape))
            if sinks_H is not None and dsinks_H is not None:
                weight_CN1 = (plan.sinks_CN1(sinks_H, chunk, sizes.S) - lse_CN1).exp2_()
                shares = (weight_CN1 * delta_CN1).view(chunk.rows.stop - chunk.rows.start, -1, sizes.S, R)
                dsinks_H.view(sizes.G, R)[chunk.groups] -= shares.sum((0, 2))
        dsinks = None if sinks_H is None or dsinks_H is None else dsinks_H.to(sinks_H.dtype)
        return dq_BSHD, dk_BTGD, dv_BTGD, dsinks, None, None
