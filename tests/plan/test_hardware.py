"""Peak arithmetic by device name, as drivers spell the names."""

from __future__ import annotations

import pytest

from megazebra.plan.hardware import peak_flops


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_known_devices(device: str, teraflops: int) -> None:
    assert peak_flops(device, "bf16") == teraflops * 1e12


@pytest.mark.parametrize("device", ["cpu", "NVIDIA RTX A1000", "NVIDIA A1000 Laptop GPU", "Tesla V100-SXM2-16GB", ""])
def test_unknown_devices_have_no_peak(device: str) -> None:
    assert peak_flops(device, "bf16") is None


def test_other_precisions_have_no_peak() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
