"""The Triton kernels of attention/triton.py: FlashAttention-2 (Dao 2023) with loops that are as long as the band.

A query sees the keys from its first visible one (0, or what window and document leave) to its own. Neither bound
falls from one query to the next, so the first and the last query of a block tell which keys any of its queries sees
and which keys all of them see: only the blocks at the band's two edges pay for a mask. The same holds for a block of
keys and its queries. Every sum runs in a fixed order inside one program: no atomics.

The R query heads that share a key/value head are rows of one matrix (row = query * R + r): a key is read once for
all of them, and a block of rows spans few queries, so the band's edges are short.

Logits are in units of log 2 (exp2 is the hardware's exponential): `logit_scale` and `cap_scale` contain log2(e).
Rows beyond the end of a tensor are read as its last row and never stored.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads, R = H/G; in a block M rows, N keys, D head dim
padded to a power of two. k_ND is a block of keys, scores_MN its logits.
"""

from typing import Any

import torch
import triton
import triton.language as tl

# Logit of a hidden key. Finite, so that a row that has met only hidden keys holds numbers: the first visible key
# multiplies what they added by exp2(HIDDEN - its logit) = 0.
HIDDEN = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)

INTERPRETED = triton.knobs.runtime.interpret
_DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def dot_dtype(dtype: torch.dtype) -> Any:
    """What q, k and v are multiplied in. Triton's interpreter has no bf16 arithmetic: there it is float32."""
    return tl.float32 if INTERPRETED else _DOT_DTYPES[dtype]


@triton.jit
def forward_kernel(
    q, k, v, sinks, document_start, out, lse,
    q_row, q_head, q_batch, k_row, k_head, k_batch, v_row, v_head, v_batch,
    S, T, G, window, logit_scale, cap_scale,
    R: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr,
    WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr, SINKS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """out and log2-sum-exp2 of M rows of one key/value head."""
    # Without a window the last queries see the most keys: they start first, so that none is left for the end.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    batch, group = (tl.program_id(1) // G).to(tl.int64), (tl.program_id(1) % G).to(tl.int64)
    q += batch * q_batch + group * R * q_head
    k += batch * k_batch + group * k_head
    v += batch * v_batch + group * v_head
    out += (batch * S * G + group) * R * HEAD_DIM
    lse += (batch * G + group) * S * R
    if DOCUMENTS:
        document_start += batch * S

    rows_M = block_rows(first, S * R, M, True)
    query_M = (first + rows_M) // R
    own_M = query_M + (T - S)
    visible_M = first_visible_key(query_M, S, T, document_start, window, WINDOWED, DOCUMENTS)
    bounds = keys_of_rows(first, S, T, document_start, window, R, M, N, WINDOWED, DOCUMENTS)

    q_MD = load_query_rows(q, first, rows_M, q_row, q_head, R, HEAD_DIM, D).to(DOT)
    out_MD = tl.zeros([M, D], tl.float32)
    if SINKS:  # a key already seen that has no value
        highest_M = tl.load(sinks + group * R + (first + rows_M) % R).to(tl.float32) * LOG2_E
        total_M = tl.full([M], 1.0, tl.float32)
    else:
        highest_M = tl.full([M], HIDDEN, tl.float32)
        total_M = tl.zeros([M], tl.float32)
    for part in tl.static_range(3):
        if part > 0 or WINDOWED or DOCUMENTS:
            out_MD, total_M, highest_M = attend_keys(
                out_MD, total_M, highest_M, q_MD, own_M, visible_M, k, v, k_row, v_row, bounds[part], bounds[part + 1],
                T, logit_scale, cap_scale, HEAD_DIM, N, D, DOT, CAPPED, part != 1,
            )  # fmt: skip
    store_query_rows(out, out_MD / total_M[:, None], first, S, G * R * HEAD_DIM, R, HEAD_DIM, M, D)
    store_vector(lse, highest_M + tl.log2(total_M), first, S * R, M)


@triton.jit
def attend_keys(
    out_MD, total_M, highest_M, q_MD, own_M, visible_M, k, v, k_row, v_row, begin, end, T, logit_scale, cap_scale,
    HEAD_DIM: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr, CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys begin..end."""
    for start in tl.range(begin, end, N):
        rows_N = block_rows(start, T, N, MASKED)
        k_ND = load_rows(k, start, rows_N, k_row, HEAD_DIM, D).to(DOT)
        scores_MN, _ = logits(q_MD, k_ND, logit_scale, cap_scale, CAPPED)
        if MASKED:
            key_1N = start + tl.arange(0, N)[None, :]
            seen_MN = (key_1N >= visible_M[:, None]) & (key_1N <= own_M[:, None])
            scores_MN = tl.where(seen_MN, scores_MN, HIDDEN)
        raised_M = tl.maximum(highest_M, tl.max(scores_MN, 1))
        weights_MN = tl.exp2(scores_MN - raised_M[:, None])
        shrink_M = tl.exp2(highest_M - raised_M)
        total_M = total_M * shrink_M + tl.sum(weights_MN, 1)
        v_ND = load_rows(v, start, rows_N, v_row, HEAD_DIM, D).to(DOT)
        out_MD = tl.dot(weights_MN.to(DOT), v_ND, out_MD * shrink_M[:, None], input_precision="tf32x3")
        highest_M = raised_M
    return out_MD, total_M, highest_M


@triton.jit
def delta_kernel(
    out, dout, delta, dout_row, dout_head, dout_batch, S, G,
    R: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """sum(dout * out) of every row, which backward subtracts from the gradients of the row's weights."""
    first = tl.program_id(0) * M
    batch, group = (tl.program_id(1) // G).to(tl.int64), (tl.program_id(1) % G).to(tl.int64)
    out += (batch * S * G + group) * R * HEAD_DIM
    dout += batch * dout_batch + group * R * dout_head
    delta += (batch * G + group) * S * R
    rows_M = block_rows(first, S * R, M, True)
    out_MD = load_query_rows(out, first, rows_M, G * R * HEAD_DIM, HEAD_DIM, R, HEAD_DIM, D).to(tl.float32)
    dout_MD = load_query_rows(dout, first, rows_M, dout_row, dout_head, R, HEAD_DIM, D).to(tl.float32)
    store_vector(delta, tl.sum(out_MD * dout_MD, 1), first, S * R, M)


@triton.jit
def query_gradient_kernel(
    q, k, v, document_start, dout, lse, delta, dq,
    q_row, q_head, q_batch, k_row, k_head, k_batch, v_row, v_head, v_batch, dout_row, dout_head, dout_batch,
    S, T, G, window, scale, logit_scale, cap_scale,
    R: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr,
    WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """dq of M rows of one key/value head."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    batch, group = (tl.program_id(1) // G).to(tl.int64), (tl.program_id(1) % G).to(tl.int64)
    q += batch * q_batch + group * R * q_head
    k += batch * k_batch + group * k_head
    v += batch * v_batch + group * v_head
    dout += batch * dout_batch + group * R * dout_head
    dq += (batch * S * G + group) * R * HEAD_DIM
    lse += (batch * G + group) * S * R
    delta += (batch * G + group) * S * R
    if DOCUMENTS:
        document_start += batch * S

    rows_M = block_rows(first, S * R, M, True)
    query_M = (first + rows_M) // R
    own_M = query_M + (T - S)
    visible_M = first_visible_key(query_M, S, T, document_start, window, WINDOWED, DOCUMENTS)
    bounds = keys_of_rows(first, S, T, document_start, window, R, M, N, WINDOWED, DOCUMENTS)

    q_MD = load_query_rows(q, first, rows_M, q_row, q_head, R, HEAD_DIM, D).to(DOT)
    dout_MD = load_query_rows(dout, first, rows_M, dout_row, dout_head, R, HEAD_DIM, D).to(DOT)
    lse_M = tl.load(lse + first + rows_M)
    delta_M = tl.load(delta + first + rows_M)
    dq_MD = tl.zeros([M, D], tl.float32)
    for part in tl.static_range(3):
        if part > 0 or WINDOWED or DOCUMENTS:
            dq_MD = add_keys(
                dq_MD, q_MD, dout_MD, lse_M, delta_M, own_M, visible_M, k, v, k_row, v_row, bounds[part],
                bounds[part + 1], T, logit_scale, cap_scale, HEAD_DIM, N, D, DOT, CAPPED, part != 1,
            )  # fmt: skip
    store_query_rows(dq, dq_MD * scale, first, S, G * R * HEAD_DIM, R, HEAD_DIM, M, D)


@triton.jit
def add_keys(
    dq_MD, q_MD, dout_MD, lse_M, delta_M, own_M, visible_M, k, v, k_row, v_row, begin, end, T, logit_scale, cap_scale,
    HEAD_DIM: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr, CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """dq with the share of the keys begin..end; it still lacks the scale."""
    for start in tl.range(begin, end, N):
        rows_N = block_rows(start, T, N, MASKED)
        k_ND = load_rows(k, start, rows_N, k_row, HEAD_DIM, D).to(DOT)
        scores_MN, tanh_MN = logits(q_MD, k_ND, logit_scale, cap_scale, CAPPED)
        if MASKED:
            key_1N = start + tl.arange(0, N)[None, :]
            seen_MN = (key_1N >= visible_M[:, None]) & (key_1N <= own_M[:, None])
            scores_MN = tl.where(seen_MN, scores_MN, HIDDEN)
        weights_MN = tl.exp2(scores_MN - lse_M[:, None])
        v_ND = load_rows(v, start, rows_N, v_row, HEAD_DIM, D).to(DOT)
        dweights_MN = tl.dot(dout_MD, tl.trans(v_ND), input_precision="tf32x3")
        dscores_MN = weights_MN * (dweights_MN - delta_M[:, None])
        if CAPPED:
            dscores_MN *= 1.0 - tanh_MN * tanh_MN
        dq_MD = tl.dot(dscores_MN.to(DOT), k_ND, dq_MD, input_precision="tf32x3")
    return dq_MD


@triton.jit
def key_gradient_kernel(
    q, k, v, document_start, query_end, dout, lse, delta, dk, dv,
    q_row, q_head, q_batch, k_row, k_head, k_batch, v_row, v_head, v_batch, dout_row, dout_head, dout_batch,
    S, T, G, window, scale, logit_scale, cap_scale,
    R: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr,
    WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys of one key/value head."""
    # Without a window the first keys are seen by the most queries: they start first.
    first = tl.program_id(0) * N
    batch, group = (tl.program_id(1) // G).to(tl.int64), (tl.program_id(1) % G).to(tl.int64)
    q += batch * q_batch + group * R * q_head
    k += batch * k_batch + group * k_head
    v += batch * v_batch + group * v_head
    dout += batch * dout_batch + group * R * dout_head
    dk += (batch * T * G + group) * HEAD_DIM
    dv += (batch * T * G + group) * HEAD_DIM
    lse += (batch * G + group) * S * R
    delta += (batch * G + group) * S * R

    # Queries begin..end see a key of the block at least; those from all_from to all_until see every key of a block
    # that is whole.
    begin, end = tl.maximum(first - (T - S), 0), S
    all_from, all_until = first + N - 1 - (T - S), S
    if WINDOWED:
        end = tl.minimum(end, tl.minimum(first + N, T) - 1 + window - (T - S))
        all_until = tl.minimum(all_until, first + window - (T - S))
    if DOCUMENTS:
        document_start += batch * S
        query_end += (batch * tl.num_programs(0) + tl.program_id(0)) * 2
        all_until = tl.minimum(all_until, tl.load(query_end))
        end = tl.minimum(end, tl.load(query_end + 1))
    end = tl.maximum(end, begin)
    inner = tl.minimum(begin * R + tl.cdiv(tl.maximum(all_from - begin, 0) * R, M) * M, end * R)
    outer = inner + tl.maximum(all_until * R - inner, 0) // M * M
    bounds = (begin * R, inner, outer, end * R)

    rows_N = block_rows(first, T, N, True)
    k_ND = load_rows(k, first, rows_N, k_row, HEAD_DIM, D).to(DOT)
    v_ND = load_rows(v, first, rows_N, v_row, HEAD_DIM, D).to(DOT)
    dk_ND = tl.zeros([N, D], tl.float32)
    dv_ND = tl.zeros([N, D], tl.float32)
    for part in tl.static_range(3):
        dk_ND, dv_ND = add_queries(
            dk_ND, dv_ND, k_ND, v_ND, first, q, dout, lse, delta, q_row, q_head, dout_row, dout_head,
            document_start, bounds[part], bounds[part + 1], S, T, window, logit_scale, cap_scale,
            R, HEAD_DIM, M, N, D, DOT, WINDOWED, DOCUMENTS, CAPPED, part != 1,
        )  # fmt: skip
    store_rows(dk, dk_ND * scale, first, T, G * HEAD_DIM, HEAD_DIM, N, D)
    store_rows(dv, dv_ND, first, T, G * HEAD_DIM, HEAD_DIM, N, D)


@triton.jit
def add_queries(
    dk_ND, dv_ND, k_ND, v_ND, first_key, q, dout, lse, delta, q_row, q_head, dout_row, dout_head,
    document_start, begin, end, S, T, window, logit_scale, cap_scale,
    R: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr,
    WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk and dv with the share of the rows begin..end; dk still lacks the scale.

    The logits are transposed, so that their products with dout and q need no transposition in registers.
    """
    for start in tl.range(begin, end, M):
        rows_M = block_rows(start, S * R, M, MASKED)
        q_MD = load_query_rows(q, start, rows_M, q_row, q_head, R, HEAD_DIM, D).to(DOT)
        scores_NM, tanh_NM = logits(k_ND, q_MD, logit_scale, cap_scale, CAPPED)
        if MASKED:
            query_M = (start + rows_M) // R
            visible_M = first_visible_key(query_M, S, T, document_start, window, WINDOWED, DOCUMENTS)
            key_N1 = first_key + tl.arange(0, N)[:, None]
            seen_NM = (key_N1 >= visible_M[None, :]) & (key_N1 <= (query_M + (T - S))[None, :])
            seen_NM = seen_NM & (start + tl.arange(0, M) < S * R)[None, :]
            scores_NM = tl.where(seen_NM, scores_NM, HIDDEN)
        weights_NM = tl.exp2(scores_NM - tl.load(lse + start + rows_M)[None, :])
        dout_MD = load_query_rows(dout, start, rows_M, dout_row, dout_head, R, HEAD_DIM, D).to(DOT)
        dv_ND = tl.dot(weights_NM.to(DOT), dout_MD, dv_ND, input_precision="tf32x3")
        dweights_NM = tl.dot(v_ND, tl.trans(dout_MD), input_precision="tf32x3")
        dscores_NM = weights_NM * (dweights_NM - tl.load(delta + start + rows_M)[None, :])
        if CAPPED:
            dscores_NM *= 1.0 - tanh_NM * tanh_NM
        dk_ND = tl.dot(dscores_NM.to(DOT), q_MD, dk_ND, input_precision="tf32x3")
    return dk_ND, dv_ND


@triton.jit
def logits(left, right, logit_scale, cap_scale, CAPPED: tl.constexpr):
    """Logits in units of log 2, and tanh(logit / softcap) where there is a cap."""
    scores = tl.dot(left, tl.trans(right), input_precision="tf32x3") * logit_scale
    capped = scores
    if CAPPED:
        shrunk = tl.exp2(tl.abs(scores) * (-2 * LOG2_E))
        capped = (1.0 - shrunk) / (1.0 + shrunk)
        capped = tl.where(scores < 0, -capped, capped)
        scores = capped * cap_scale
    return scores, capped


@triton.jit
def keys_of_rows(
    first, S, T, document_start, window, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """begin, inner, outer, end: keys begin..end are seen by a row of the block at least, inner..outer by all of them.

    Each is a whole number of blocks from begin, or the end.
    """
    first_query, last_query = first // R, (tl.minimum(first + M, S * R) - 1) // R
    begin = first_visible_key(first_query, S, T, document_start, window, WINDOWED, DOCUMENTS)
    all_from = first_visible_key(last_query, S, T, document_start, window, WINDOWED, DOCUMENTS)
    all_until, end = first_query + (T - S) + 1, last_query + (T - S) + 1
    inner = tl.minimum(begin + tl.cdiv(all_from - begin, N) * N, end)
    outer = inner + tl.maximum(all_until - inner, 0) // N * N
    return begin, inner, outer, end


@triton.jit
def first_visible_key(query, S, T, document_start, window, WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr):
    visible = query * 0
    if WINDOWED:
        visible = tl.maximum(query + (T - S) - window + 1, visible)
    if DOCUMENTS:
        visible = tl.maximum(visible, tl.load(document_start + query).to(tl.int32))
    return visible


@triton.jit
def block_rows(first, length, ROWS: tl.constexpr, CLAMPED: tl.constexpr):
    """0, 1, ... up to the last row of a tensor of that length, then that row again."""
    rows = tl.arange(0, ROWS)
    if CLAMPED:
        rows = tl.minimum(rows, length - 1 - first)
    return rows


@triton.jit
def load_rows(tensor, first, rows, stride, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Rows first + rows, of stride elements each. Only their distance from the first is sure to fit into 32 bits."""
    return load_block(tensor + tl.cast(first, tl.int64) * stride, rows * stride, HEAD_DIM, D)


@triton.jit
def load_query_rows(
    tensor, first, rows, query_stride, head_stride, R: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Rows first + rows of a tensor of queries, row = query * R + head."""
    rows += first % R
    offsets = rows // R * query_stride + rows % R * head_stride
    return load_block(tensor + tl.cast(first // R, tl.int64) * query_stride, offsets, HEAD_DIM, D)


@triton.jit
def load_block(pointer, offsets, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    columns = tl.arange(0, D)
    pointers = pointer + (offsets[:, None] + columns[None, :])
    return tl.load(pointers) if HEAD_DIM == D else tl.load(pointers, mask=columns[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def store_rows(
    tensor, block, first, length, stride, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    rows, columns = tl.arange(0, ROWS), tl.arange(0, D)
    pointers = tensor + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    inside = (first + rows < length)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, block.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def store_query_rows(
    tensor, block, first, S, query_stride, R: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    rows, columns = first % R + tl.arange(0, M), tl.arange(0, D)
    offsets = rows // R * query_stride + rows % R * HEAD_DIM
    pointers = tensor + tl.cast(first // R, tl.int64) * query_stride + (offsets[:, None] + columns[None, :])
    inside = (first // R + rows // R < S)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, block.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def store_vector(vector, block, first, length, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    tl.store(vector + first + rows, block, mask=first + rows < length)
