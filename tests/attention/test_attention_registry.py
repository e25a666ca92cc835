import pytest
import torch
from attention_cases import CPU, attention_spec

from megazebra.attention import backend_names, flash, flex, load_backend, resolve_backend, simd

LAYERS = (attention_spec(None), attention_spec(512), attention_spec(512), attention_spec(512))
CUDA = torch.device("cuda")


def resolve(name: str, device: torch.device, specs=LAYERS, dtype=torch.bfloat16):
    return resolve_backend(name, specs, head_dim=64, dtype=dtype, device=device)


def test_backends_are_the_files_of_the_folder():
    assert {"reference", "blocked", "simd", "flash", "flex", "triton"} <= set(backend_names())
    assert not {"__init__", "backend", "inputs", "packing"} & set(backend_names())
    for name in backend_names():
        backend = load_backend(name)
        assert callable(backend.attend)
        assert isinstance(backend.unavailable(CPU), str | None)


def test_auto_on_cpu(monkeypatch):
    monkeypatch.setattr(simd, "unavailable", lambda device: None)
    choice = resolve("auto", CPU)
    assert choice.name == "simd"
    assert choice.attend is simd.attend
    assert choice.reason == "attention backend simd: the best on cpu"


def test_auto_on_cpu_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(simd, "_loaded", "No module named 'x'; install a C++ compiler, then megazebra again")
    choice = resolve("auto", CPU)
    assert choice.name == "blocked"
    assert choice.attend is load_backend("blocked").attend
    assert "not simd, because it is not compiled (" in choice.reason
    assert "install a C++ compiler" in choice.reason


def test_auto_on_cpu_where_the_kernel_lacks_something():
    assert resolve("auto", CPU, dtype=torch.float64).name == "blocked"


@pytest.mark.parametrize(
    ("flash_refusal", "flex_refusal", "expected"),
    [(None, None, "flash"), ("it is absent", None, "flex"), ("it is absent", "it is old", "blocked")],
)
def test_auto_on_cuda_takes_the_best_and_says_why_not_better(monkeypatch, flash_refusal, flex_refusal, expected):
    monkeypatch.setattr(flash, "unavailable", lambda device: flash_refusal)
    monkeypatch.setattr(flash, "unsupported", lambda spec, **kwargs: None)
    monkeypatch.setattr(flex, "unavailable", lambda device: flex_refusal)
    choice = resolve("auto", CUDA)
    assert choice.name == expected
    for name, why in (("flash", flash_refusal), ("flex", flex_refusal)):
        assert (f"not {name}, because {why}" in choice.reason) == (why is not None and expected != name)


def test_auto_needs_one_backend_for_all_layers(monkeypatch):
    monkeypatch.setattr(flash, "unavailable", lambda device: None)
    monkeypatch.setattr(flash, "unsupported", lambda spec, **kwargs: "it has no sinks" if spec.sinks else None)
    specs = (*LAYERS, attention_spec(512, sinks=True))
    assert resolve("auto", CUDA, specs).name == "flex"


def test_a_backend_asked_for_by_name_never_falls_back():
    assert resolve("reference", CPU).reason == "attention backend reference: asked for by name"
    with pytest.raises(ValueError, match=r"'flash' was asked for but FlashAttention needs a CUDA GPU.*use 'auto'"):
        resolve("flash", CPU)
    with pytest.raises(ValueError, match=r"'flex' was asked for but .*float64"):
        resolve("flex", CUDA, dtype=torch.float64)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="no attention backend 'fash'; choose auto or one of blocked, flash"):
        resolve("fash", CPU)
    with pytest.raises(ValueError, match="no attention backend 'packing'"):
        load_backend("packing")
