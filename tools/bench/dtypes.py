"""The precisions that are measured, as keys and options name them."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
