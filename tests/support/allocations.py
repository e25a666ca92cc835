"""What operations allocate."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """`bytes`: the size of every tensor that an operation returned and none of its arguments shares memory with."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        new = (tensor.untyped_storage() for tensor in _tensors(out))
        self.bytes += [storage.nbytes() for storage in new if storage.data_ptr() not in old]
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
