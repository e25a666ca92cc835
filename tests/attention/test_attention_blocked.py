"""What `blocked` costs, counted in operations and numbers rather than seconds."""

import pytest
import torch
from attention_cases import Case, attention_spec
from torch.utils._python_dispatch import TorchDispatchMode

from megazebra.attention import blocked
from megazebra.attention.inputs import Sizes

aten = torch.ops.aten


class Meter(TorchDispatchMode):
    """Multiply-adds of matrix products, and the largest tensor that any operation makes (without views)."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in (aten.bmm, aten.baddbmm, aten.baddbmm_):
            a, b = args[-2:]
            self.products += a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
        assert packet not in (aten.mm, aten.addmm, aten.matmul, aten._scaled_dot_product_attention_math)
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, result.numel())
        return result


def measure(case: Case) -> Meter:
    leaves, dout = case.tensors(torch.float32)
    with Meter() as meter:
        sinks = leaves[3] if case.sinks else None
        out = blocked.attend(*leaves[:3], spec=case.spec, packing=case.packing(), sinks_H=sinks)
        torch.autograd.grad(out, leaves, dout)
    return meter


def products_of_visible_pairs(case: Case) -> int:
    """2 products forward and 5 backward, of D multiply-adds for each pair a head sees."""
    window = case.window or case.S
    pairs = sum(min(i + 1, window) for i in range(case.S))
    return 7 * case.B * case.H * pairs * case.D


@pytest.mark.parametrize("window", [64, 512])
def test_local_work_is_linear_in_the_length_and_near_the_band(window: int):
    short, long = Case(window, S=2048, H=2, G=1), Case(window, S=4096, H=2, G=1)
    work = {case.S: measure(case).products for case in (short, long)}
    # Twice the length costs twice as much, but for the triangle at the start that is cheaper.
    triangle = 7 * short.H * short.D * (window + blocked.LOCAL_BLOCK) ** 2 / 2
    assert 2 * work[2048] <= work[4096] <= 2 * work[2048] + triangle
    # window + block - 1 keys are computed where `window` are seen.
    for case in (short, long):
        assert work[case.S] <= products_of_visible_pairs(case) * (1 + blocked.LOCAL_BLOCK / window)


def test_local_work_at_a_long_length_doubles_with_it():
    work = [measure(Case(16, S=S, H=1, G=1, D=8)).products for S in (8192, 16384)]
    assert work[1] / work[0] == pytest.approx(2, rel=0.01)


def test_global_work_is_half_the_square():
    case = Case(None, S=1500, H=2, G=1)
    assert measure(case).products <= products_of_visible_pairs(case) * (1 + blocked.GLOBAL_BLOCK / case.S)


def test_documents_save_work_in_global_layers():
    whole = measure(Case(None, S=1024, H=2, G=1)).products
    packed = measure(Case(None, S=1024, H=2, G=1, documents=[[128] * 8])).products
    assert packed == whole / 4.5  # 8 blocks of 1 instead of 1 + 2 + ... + 8


@pytest.mark.parametrize(
    "case",
    [
        Case(512, S=4096, H=2, G=1, D=8, name="local"),
        Case(2000, S=4096, H=2, G=1, D=8, name="wide_window"),
        Case(None, S=4096, H=2, G=1, D=8, name="global"),
        Case(64, S=1024, B=4, H=8, G=2, D=8, name="rows_and_heads"),
        Case(64, S=1024, B=2, H=8, G=2, D=8, sinks=True, softcap=3.0, documents=[[1000, 24], [1024]], name="packed"),
    ],
    ids=str,
)
def test_no_tensor_exceeds_the_documented_bound(case: Case):
    sizes = Sizes(case.B, case.S, case.S, case.H, case.G, case.D)
    bound = max(blocked.score_elements(sizes, "cpu"), case.B * case.S * case.H * case.D)
    assert measure(case).largest <= bound
    assert bound < case.B * case.H * case.S * min(case.window or case.S, case.S)


def test_the_bound_does_not_grow_with_the_length():
    assert blocked.score_elements(Sizes(1, 2**10, 2**10, 8, 2, 64), "cpu") == blocked.score_elements(
        Sizes(8, 2**20, 2**20, 8, 2, 64), "cpu"
    )


def test_only_inputs_output_and_row_sums_are_saved():
    case = Case(64, S=1024, H=4, G=2, sinks=True)
    leaves, _ = case.tensors(torch.float32)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = blocked.attend(*leaves[:3], spec=case.spec, sinks_H=leaves[3])
    own = {x.data_ptr() for x in (*leaves, out)}
    extra = [x for x in saved if x.data_ptr() not in own]
    assert [x.numel() for x in extra] == [case.B * case.H * case.S]


def test_backward_of_backward_is_refused():
    case = Case(7)
    leaves, dout = case.tensors(torch.float32)
    out = blocked.attend(*leaves, spec=case.spec)
    dq = torch.autograd.grad(out, leaves, dout.requires_grad_(), create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_gradients_are_the_same_bits_each_time():
    case = Case(100, S=700, H=4, G=2, B=2, documents=[[300, 400], [700]])

    def gradients() -> list[torch.Tensor]:
        leaves, dout = case.tensors(torch.float32)
        out = blocked.attend(*leaves, spec=case.spec, packing=case.packing())
        return [out, *torch.autograd.grad(out, leaves, dout)]

    assert all(map(torch.equal, gradients(), gradients()))


def test_autocast_does_not_lower_the_precision():
    (q, k, v), _ = Case(7).tensors(torch.float32)
    plain = blocked.attend(q, k, v, spec=attention_spec(7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(blocked.attend(q, k, v, spec=attention_spec(7)), plain)
