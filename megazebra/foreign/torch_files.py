"""What `torch.save` wrote for other trainers: its structure and where its tensors lie, without calling anything in it.

A pickle may name any function to be called while it is read. torch's `weights_only` reader calls none that is not
allowed. Other trainers put options, loss scalers and random states beside their tensors; those are allowed by name
below, and each name stands for `Inert`, not for what it names: no code but torch's and ours runs.

Tensors are not read: torch tells where in the file they lie (a FakeTensorMode has no memory to read them into).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megazebra.checkpoint.store import CheckpointError
from megazebra.checkpoint.tensor_file import StoredTensor

_INERT = {
    # DeepSpeed: in the optimizer's state
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "builtins.getattr",  # Python 3.11.2 pickles members of an Enum by it; a stand-in here too, which looks nothing up
    # Megatron: options and what they hold, random states, Transformer Engine's extra state
    "_io.BytesIO",
    "argparse.Namespace",
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "signal.Signals",
    "torch._C.Generator",
    "types.SimpleNamespace",
}


class Inert:
    """What a file says about an object of another program's: nothing is made of it.

    state: its attributes where it has any.
    """

    state: Any = None

    def __new__(cls, *args: object, **kwargs: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)


def read_structure(path: Path) -> Any:
    """The tree that was saved, with a StoredTensor for every tensor, a dict for every mapping, a list for every
    sequence (but torch.Size), and Inert for objects.

    Raises CheckpointError, naming file and function, when it wants one called that is not on our list; or when it is
    no file of torch's.
    """
    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    try:
        wanted = set(get_unsafe_globals_in_checkpoint(path))
        if strange := sorted(wanted - _INERT):
            raise CheckpointError(
                f"{path} holds more than tensors and options: reading it would call {', '.join(strange)}, which may do "
                "anything and is refused; save the checkpoint again without it"
            )
        with safe_globals([(Inert, name) for name in sorted(wanted)]), FakeTensorMode():
            tree = torch.load(path, map_location="cpu", weights_only=True)
            return _with_places(tree, path)
    except CheckpointError:
        raise
    except Exception as error:  # torch's reader stumbles over a damaged pickle in many ways
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} is damaged, or no file that torch.save of version 1.6 or newer wrote: {reason}"
        ) from error


def _with_places(tree: Any, path: Path) -> Any:
    if isinstance(tree, Tensor):
        return _place(tree, path)
    if isinstance(tree, dict):
        return {key: _with_places(value, path) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        return [_with_places(value, path) for value in tree]
    return tree


def _place(tensor: Tensor, path: Path) -> StoredTensor:
    if not tensor.is_contiguous():
        raise CheckpointError(f"{path}: a tensor of shape {list(tensor.shape)} is not contiguous; save it anew")
    begin = tensor.untyped_storage()._checkpoint_offset
    assert begin is not None
    position = begin + int(tensor.storage_offset()) * tensor.dtype.itemsize
    return StoredTensor(path, tensor.dtype, tuple(tensor.shape), position)
