"""How large the blocks of triton_kernels.py are, by kernel, head dim and GPU. Imports no Triton."""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    rows: int  # queries, times the query heads that share a key/value head
    keys: int
    warps: int
    stages: int  # blocks of the loop's operands that are under way at once


# For 16-bit inputs, by kernel and head dim padded to a power of two. Nobody has timed these: they were chosen without
# a GPU, by what the compiler says of them. Large blocks read keys and queries less often and hide latency, but
# - what a block accumulates (rows x head dim, or twice keys x head dim) and its logits (rows x keys) are float32 in
#   registers, of which a thread has 255: larger blocks, or fewer warps, would spill;
# - the block that stays and `stages` copies of those that pass by lie in shared memory: a program has 163 KiB of it
#   on compute capability 8.0, 227 KiB on 9.x and 10.x, 99 KiB on 8.6, 8.9 and 12.x.
# A multiprocessor holds eight warps of each or more. The architectures differ in what a product takes from registers
# and what from shared memory, so one spills where another doesn't; tests/attention compiles them all.
BLACKWELL = {
    ("forward", 32): Blocks(128, 64, 4, 3),
    ("forward", 64): Blocks(128, 64, 4, 3),
    ("forward", 128): Blocks(128, 64, 8, 3),
    ("forward", 256): Blocks(128, 32, 8, 2),
    ("query_gradient", 32): Blocks(64, 64, 4, 3),
    ("query_gradient", 64): Blocks(64, 64, 4, 3),
    ("query_gradient", 128): Blocks(64, 64, 4, 2),
    ("query_gradient", 256): Blocks(64, 32, 8, 2),
    ("key_gradient", 32): Blocks(64, 128, 8, 2),
    ("key_gradient", 64): Blocks(64, 128, 8, 2),
    ("key_gradient", 128): Blocks(64, 64, 8, 2),
    ("key_gradient", 256): Blocks(32, 32, 8, 2),
}
HOPPER = BLACKWELL | {("key_gradient", 128): Blocks(32, 128, 8, 2)}
AMPERE = BLACKWELL | {("forward", 256): Blocks(64, 32, 8, 2)}
CONSUMER = AMPERE | {
    ("forward", 128): Blocks(128, 64, 8, 2),
    ("query_gradient", 128): Blocks(64, 64, 8, 2),
    ("query_gradient", 256): Blocks(32, 32, 8, 1),
    ("key_gradient", 64): Blocks(32, 128, 8, 2),
}
BY_CAPABILITY = {(8, 0): AMPERE, (9, 0): HOPPER, (10, 0): BLACKWELL, (10, 3): BLACKWELL}
# Three products of TF32 need three times the registers: float32 is for comparing, and may spill a little.
FLOAT32 = {32: Blocks(32, 32, 4, 1), 64: Blocks(32, 32, 4, 1), 128: Blocks(32, 32, 8, 1), 256: Blocks(16, 16, 8, 1)}
# Small, so that short sequences have blocks that are whole, cut and skipped.
INTERPRETED = {
    "forward": Blocks(32, 16, 1, 1),
    "query_gradient": Blocks(32, 16, 1, 1),
    "key_gradient": Blocks(16, 32, 1, 1),
}


def choose_blocks(kernel: str, capability: tuple[int, int] | None, padded_head_dim: int, element_size: int) -> Blocks:
    """Block sizes for a kernel on a GPU of that compute capability; None stands for Triton's interpreter."""
    if capability is None:
        return INTERPRETED[kernel]
    if element_size == 4:
        return FLOAT32[padded_head_dim]
    return BY_CAPABILITY.get(capability, CONSUMER)[kernel, padded_head_dim]
