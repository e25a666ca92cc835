"""The oracle is checked by two computations that share no code with it."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import CASES, Case

from megazebra.attention import reference

SMALL = [case for case in CASES if case.S <= 100]


def by_loops(case: Case, q, k, v, sinks) -> list:
    """Attention as nested loops over lists of Python floats, from the definition of the mask."""
    q, k, v = (x.detach().tolist() for x in (q, k, v))
    sinks = sinks.tolist() if case.sinks else None
    offset = len(k[0]) - len(q[0])
    packing = case.packing()
    out = []
    for b in range(case.B):
        for i in range(len(q[b])):
            for h in range(case.H):
                g = h // (case.H // case.G)
                start = 0 if packing is None else int(packing.document_start_BS[b, i])
                first = max(start, 0 if case.window is None else i + offset - case.window + 1)
                keys = range(first, i + offset + 1)
                logits = [sum(x * y for x, y in zip(q[b][i][h], k[b][j][g], strict=True)) for j in keys]
                logits = [logit / math.sqrt(case.D) for logit in logits]
                if case.softcap is not None:
                    logits = [case.softcap * math.tanh(logit / case.softcap) for logit in logits]
                sink = [sinks[h]] if case.sinks else []
                largest = max(logits + sink)
                total = sum(math.exp(logit - largest) for logit in logits + sink)
                weights = [math.exp(logit - largest) / total for logit in logits]
                out += [sum(w * v[b][j][g][d] for w, j in zip(weights, keys, strict=True)) for d in range(case.D)]
    return out


@pytest.mark.parametrize(
    "case",
    [
        Case(3, S=9, B=2, H=4, G=2, D=4, documents=[[5, 1, 3], [9]], name="documents"),
        Case(None, S=6, T=10, H=2, G=1, D=4, sinks=True, softcap=1.5, name="sinks_softcap_keys_before"),
        Case(4, S=6, T=9, H=3, G=3, D=4, spans=([[0, 4, 2]], [[1, 6, 2]]), name="documents_in_halo"),
        Case(1, S=5, H=2, G=2, D=4, sinks=True, name="window1_sinks"),
    ],
    ids=str,
)
def test_reference_equals_loops_over_floats(case: Case):
    leaves, _ = case.tensors(torch.float64)
    sinks = leaves[3] if case.sinks else None
    out = reference.attend(*leaves[:3], spec=case.spec, packing=case.packing(), sinks_H=sinks)
    expected = torch.tensor(by_loops(case, *leaves[:3], sinks), dtype=torch.float64).view(out.shape)
    # Sums of a few products in two orders: some units of 2^-53.
    torch.testing.assert_close(out.detach(), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("case", [c for c in SMALL if not c.sinks and c.softcap is None], ids=str)
def test_reference_equals_sdpa_with_an_explicit_mask(case: Case):
    leaves, _ = case.tensors(torch.float64)
    q, k, v = (x.transpose(1, 2) for x in leaves)
    S, T = q.shape[2], k.shape[2]
    distance = torch.arange(T - S, T)[:, None] - torch.arange(T)
    mask = (distance >= 0) & (distance < (case.window or T))
    mask = mask.expand(case.B, 1, S, T)
    if (packing := case.packing()) is not None:
        mask = mask & (torch.arange(T) >= packing.document_start_BS[:, None, :, None])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    out = reference.attend(*leaves, spec=case.spec, packing=packing)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)


def test_gradients_of_the_reference_equal_finite_differences():
    case = Case(3, S=5, T=7, H=2, G=1, D=3, sinks=True, softcap=2.0)
    leaves, _ = case.tensors(torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v, sinks: reference.attend(q, k, v, spec=case.spec, sinks_H=sinks), leaves
    )
