"""FlexAttention on CPU: forward, uncompiled. What is tested is our mask, score and sink functions."""

import gc

import pytest
import torch
from attention_cases import CASES, CPU, Case, attention_spec, error

from megazebra.attention import Packing, flex, reference

# float32 like the contract tests; large logits multiply their relative error into the weights.
TOLERANCE, LOGIT_TOLERANCE = 2e-6, 5e-5


def attend(backend, case: Case, leaves, packing=None):
    sinks = leaves[3] if case.sinks else None
    return backend.attend(*leaves[:3], spec=case.spec, packing=packing or case.packing(), sinks_H=sinks)


@pytest.mark.parametrize("case", [c for c in CASES if c.S <= 400], ids=str)
def test_forward_equals_the_float64_reference(case: Case):
    leaves, _ = case.tensors(torch.float32)
    with torch.no_grad():
        out = attend(flex, case, leaves)
        expected = attend(reference, case, [x.double() for x in leaves])
    assert (out.dtype, out.shape) == (torch.float32, expected.shape)
    assert error(out, expected, expected.norm()) < (LOGIT_TOLERANCE if case.q_factor > 1 else TOLERANCE)


def test_bf16_stays_bf16_with_sinks():
    case = Case(7, sinks=True)
    leaves, _ = case.tensors(torch.bfloat16)
    with torch.no_grad():
        out = attend(flex, case, leaves)
        expected = attend(reference, case, [x.double() for x in leaves])
    assert out.dtype == torch.bfloat16
    # Weights and output are rounded to 8 bits before and after the sink takes its share.
    assert error(out, expected, expected.norm()) < 8e-3


def test_gradients_on_cpu_are_refused():
    case = Case(7)
    leaves, _ = case.tensors(torch.float32)
    with pytest.raises(ValueError, match="'flex' has no backward on cpu; use 'blocked'"):
        attend(flex, case, leaves)
    assert "CUDA only" in flex.unavailable(CPU)


def test_masks_are_built_once_per_batch_and_kind_of_layer(monkeypatch: pytest.MonkeyPatch):
    built = []
    build = flex._build_mask
    monkeypatch.setattr(flex, "_build_mask", lambda key, start: built.append(key[0]) or build(key, start))
    flex._unpacked_mask.cache_clear()
    local, global_ = Case(7, S=20), Case(None, S=20)
    leaves = [x.detach() for x in local.tensors(torch.float32)[0]]
    batches = [None, Packing.from_document_lengths([[12, 8]]), Packing.from_document_lengths([[12, 8]])]
    for packing in batches:
        for case in (global_, local, local, local, global_):
            attend(flex, case, leaves, packing)
    assert built == [None, 7] * 3

    remembered = len(flex._masks_of_packing)
    del packing, batches
    gc.collect()
    assert len(flex._masks_of_packing) == remembered - 2, "masks must not outlive their batch"


def test_what_it_does_not_compute_is_said():
    spec = attention_spec(4)
    assert "float64" in flex.unsupported(spec, head_dim=64, dtype=torch.float64, device=CPU)
    assert "at least 16, got 8" in flex.unsupported(spec, head_dim=8, dtype=torch.bfloat16, device=CPU)
