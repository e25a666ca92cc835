"""FlashAttention's arguments: stand-ins follow the libraries' documented semantics and record what they got.

What the documentation says, computed here by a dense attention of its own: causal is aligned at the end of each
sequence, (left, right) hides keys outside [i + T - S - left, i + T - S + right], no limit is -1 (2, 3) or None (4).
"""

import sys
from types import ModuleType

import pytest
import torch
from attention_cases import CPU, Case, attention_spec, error

from megazebra.attention import flash, reference

BF16 = torch.bfloat16
CAPABILITY = {"flash_attn.cute": 9, "flash_attn_interface": 9, "flash_attn": 8}


def dense(q, k, v, scale, causal, window_size, softcap, sink, no_limit):
    """One sequence: q [S, H, D], k and v [T, G, D]."""
    (S, H, _), (T, G, _) = q.shape, k.shape
    if S == 0:
        return q
    left, right = window_size
    k, v = (x.double().repeat_interleave(H // G, dim=1) for x in (k, v))
    logits = torch.einsum("shd,thd->hst", q.double(), k) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    relative = torch.arange(T)[None] - (torch.arange(S)[:, None] + T - S)
    if left != no_limit:
        assert left >= 0
        logits = logits.masked_fill(relative < -left, -torch.inf)
    if causal or right != no_limit:
        logits = logits.masked_fill(relative > (0 if causal else right), -torch.inf)
    total = logits.exp().sum(-1, keepdim=True)
    if sink is not None:
        total = total + sink.double().exp().view(H, 1, 1)
    return torch.einsum("hst,thd->shd", logits.exp() / total, v).to(q.dtype)


def fake_library(
    name: str, calls: list, sink_gradient: bool = True, softcap_gradient: bool = True
) -> dict[str, ModuleType]:
    """Modules for sys.modules with the signatures of the library."""
    no_limit = None if name == "flash_attn.cute" else -1

    def compute(q, k, v, options):
        sink = options.get("learnable_sink")
        arguments = (options["softmax_scale"], options["causal"], options["window_size"], options["softcap"], sink)
        return dense(q, k, v, *arguments, no_limit)

    def run_dense(q, k, v, **options):
        calls.append(options)
        return torch.stack([compute(*row, options) for row in zip(q, k, v, strict=True)])

    def run_varlen(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        calls.append(options | {"max_seqlen_q": max_q, "max_seqlen_k": max_k})
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert cu_q[-1] == len(q)
        assert cu_k[-1] == len(k) == len(v)
        assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
        pieces = zip(*(x.split(cu.diff().tolist()) for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k))), strict=True)
        return torch.cat([compute(*piece, options) for piece in pieces])

    module = ModuleType(name)
    if name == "flash_attn.cute":

        def flash_attn_func(
            q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0
        ):
            options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
            return run_dense(q, k, v, **options, learnable_sink=learnable_sink), None

        def flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            softmax_scale=None,
            causal=False,
            window_size=(None, None),
            learnable_sink=None,
            softcap=0.0,
        ):
            options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
            lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            return run_varlen(q, k, v, *lengths, **options, learnable_sink=learnable_sink), None

    else:

        def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
            options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
            return run_dense(q, k, v, **options)

        def flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale=None,
            causal=False,
            window_size=(-1, -1),
            softcap=0.0,
        ):
            options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
            return run_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    modules = {name: module}
    if name == "flash_attn.cute":
        interface, utils = ModuleType("flash_attn.cute.interface"), ModuleType("flash_attn.cute.utils")
        if sink_gradient:
            interface._flash_attn_bwd = lambda q, k, v, learnable_sink=None: None
        else:
            interface._flash_attn_bwd = lambda q, k, v: None
        if softcap_gradient:
            utils.create_softcap_scoremod_bwd = lambda softcap_val: None
        modules |= {"flash_attn": ModuleType("flash_attn"), interface.__name__: interface, utils.__name__: utils}
    elif name == "flash_attn":
        interface = ModuleType("flash_attn.flash_attn_interface")
        if softcap_gradient:
            interface._flash_attn_backward = lambda dout, q, k, v, softcap=0.0: None
        else:
            interface._flash_attn_backward = lambda dout, q, k, v: None
        modules[interface.__name__] = interface
    return modules


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """Makes the given modules the only FlashAttention there is, on a GPU of the given capability."""
    names = {*CAPABILITY, *(module for module, _, _ in flash.GRADIENT_SHOWN_BY.values())}

    def install(modules: dict[str, ModuleType | None], capability: int = 9) -> None:
        for name in names:
            monkeypatch.setitem(sys.modules, name, modules.get(name))
        monkeypatch.setattr(flash, "_compute_capability", lambda device: capability)
        flash._load.cache_clear()

    yield install
    flash._load.cache_clear()


CASES = [
    Case(7, B=2, H=8, G=2, name="local"),
    Case(1, name="window1"),
    Case(None, B=2, name="global"),
    Case(16, S=70, T=85, name="halo"),
    Case(None, S=70, T=200, name="keys_before"),
    Case(20, B=3, documents=[[30, 1, 65], [1] * 96, [64, 32]], name="documents"),
    Case(None, B=2, documents=[[1, 1, 50, 44], [96]], name="documents_global"),
    Case(16, S=70, T=85, B=2, spans=([[0, 60, 10], [70]], [[3, 72, 10], [85]]), name="documents_in_halo"),
    Case(7, softcap=2.0, name="softcap"),
    Case(7, softcap=2.0, documents=[[90, 6]], name="softcap_documents"),
]
SINK_CASES = [Case(7, sinks=True, name="sinks"), Case(None, sinks=True, documents=[[90, 6]], name="sinks_documents")]


def check(case: Case, library: str, install) -> dict:
    calls: list[dict] = []
    install(fake_library(library, calls), CAPABILITY[library])
    leaves, _ = case.tensors(BF16)
    sinks = leaves[3] if case.sinks else None
    out = flash.attend(*leaves[:3], spec=case.spec, packing=case.packing(), sinks_H=sinks)
    wide = [x.double() for x in leaves]
    expected = reference.attend(
        *wide[:3], spec=case.spec, packing=case.packing(), sinks_H=wide[3] if case.sinks else None
    )
    assert (out.dtype, out.shape) == (BF16, expected.shape)
    assert error(out, expected, expected.norm()) < 2e-3  # one rounding to 8 bits
    (call,) = calls
    return call


@pytest.mark.parametrize("library", CAPABILITY)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_arguments_mean_our_mask(case: Case, library: str, install):
    call = check(case, library, install)
    no_limit = None if library == "flash_attn.cute" else -1
    assert call["causal"] is True
    assert call["window_size"] == ((no_limit, no_limit) if case.window is None else (case.window - 1, 0))
    assert ("max_seqlen_q" in call) == (case.packing() is not None)
    assert call["softcap"] == (case.softcap or 0.0)


@pytest.mark.parametrize("case", SINK_CASES, ids=str)
def test_sinks_of_flash_attention_4(case: Case, install):
    check(case, "flash_attn.cute", install)


def refusal(spec=None, head_dim=64, dtype=BF16) -> str | None:
    return flash.unsupported(spec or attention_spec(8), head_dim=head_dim, dtype=dtype, device=torch.device("cuda"))


def test_limits_are_said(install):
    install(fake_library("flash_attn", []), 8)
    assert refusal() is None
    assert "the dtype is torch.float32" in refusal(dtype=torch.float32)
    assert "up to 256, got 264" in refusal(head_dim=264)
    assert "multiple of 8 up to 256, got 36" in refusal(head_dim=36)
    assert refusal(attention_spec(8, sinks=True)) == "FlashAttention-2 has no attention sinks"
    assert refusal(attention_spec(8, softcap=5.0)) is None
    q = torch.zeros(1, 4, 2, 64)
    with pytest.raises(ValueError, match=r"'flash' can't compute this: .*torch.float32"):
        flash.attend(q, q, q, spec=attention_spec(8))


def test_sinks_without_a_gradient_are_refused(install):
    install(fake_library("flash_attn.cute", [], sink_gradient=False))
    assert refusal(attention_spec(8, sinks=True)).startswith(
        "this FlashAttention-4 has no gradient for attention sinks"
    )
    assert refusal() is None


@pytest.mark.parametrize(
    ("library", "name"), [("flash_attn.cute", "FlashAttention-4"), ("flash_attn", "FlashAttention-2")]
)
def test_a_softcap_without_a_gradient_is_refused(library: str, name: str, install):
    install(fake_library(library, [], softcap_gradient=False), CAPABILITY[library])
    assert refusal(attention_spec(8, softcap=5.0)) == f"this {name} has no gradient for a softcap"
    assert refusal() is None


def test_an_operator_that_hides_its_arguments_has_them(install):
    modules = fake_library("flash_attn", [])
    modules["flash_attn.flash_attn_interface"]._flash_attn_backward = lambda *args, **kwargs: None
    install(modules, 8)
    assert refusal(attention_spec(8, softcap=5.0)) is None


def test_blackwell_has_fewer_head_dims(install):
    install(fake_library("flash_attn.cute", []), 10)
    assert refusal(head_dim=128) is None
    assert "up to 128, or 256, got 192" in refusal(head_dim=192)
    assert refusal(head_dim=256) is None
    assert "neither sinks nor softcap" in refusal(attention_spec(8, softcap=2.0), head_dim=256)


def test_another_library_steps_in_for_what_the_first_lacks(install):
    calls4, calls3 = [], []
    modules = fake_library("flash_attn.cute", calls4) | fake_library("flash_attn_interface", calls3)
    case = Case(7)
    (q, k, v), _ = case.tensors(BF16)
    install(modules, 9)
    flash.attend(q, k, v, spec=case.spec)
    assert (len(calls4), len(calls3)) == (1, 0)
    modules["flash_attn.cute"] = None
    install(modules, 9)
    flash.attend(q, k, v, spec=case.spec)
    assert (len(calls4), len(calls3)) == (1, 1)


def test_absent_broken_and_old_libraries_give_their_reason(install, tmp_path, monkeypatch: pytest.MonkeyPatch):
    cuda = torch.device("cuda")
    install({})
    reason = flash.unavailable(cuda)
    assert reason.count("is not installed") == 3

    old = ModuleType("flash_attn")
    old.flash_attn_func = lambda q, k, v, softmax_scale=None, causal=False: None
    old.flash_attn_varlen_func = old.flash_attn_func
    install({"flash_attn": old}, 8)
    assert "FlashAttention-2 is too old (no argument window_size)" in flash.unavailable(cuda)

    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    install({})
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    flash._load.cache_clear()
    assert "FlashAttention-3 is installed but broken (OSError: undefined symbol: _ZN3c10)" in flash.unavailable(cuda)

    install({"flash_attn": ModuleType("flash_attn")}, 8)  # another package of that name
    assert "FlashAttention-2 is installed but broken (AttributeError" in flash.unavailable(cuda)

    install(fake_library("flash_attn_interface", []), 12)
    assert "FlashAttention-3 has no kernels for compute capability 12.x" in flash.unavailable(cuda)


def test_cpu_is_refused_without_looking_for_libraries():
    assert "the device is cpu" in flash.unavailable(CPU)
    q = torch.zeros(1, 4, 2, 64, dtype=BF16)
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu; use 'blocked'"):
        flash.attend(q, q, q, spec=attention_spec(8))
