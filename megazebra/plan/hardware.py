"""Peak arithmetic of accelerators, for MFU. Dense bf16, from NVIDIA's data sheets (no sparsity)."""

from __future__ import annotations

import re

# The first name that stands as words in the device's own name wins, so longer names come first.
_PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Operations per second of one device at `precision`; None where it is not known, and MFU with it."""
    if precision != "bf16":
        return None
    return next((peak for name, peak in _PEAK_BF16_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)
