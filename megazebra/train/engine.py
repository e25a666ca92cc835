"""All that the framework knows of DeepSpeed: groups, construction, the step, its traffic.

What looks odd here was found by experiment and is held by tests/train.
"""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megazebra.config.schema import Config
from megazebra.models.initialization import initialize, load_full_weights
from megazebra.parallel.collectives import all_reduce
from megazebra.parallel.mesh import ParallelMesh
from megazebra.parallel.sharding import is_sharded
from megazebra.parallel.traffic import TrafficCounter
from megazebra.train.deepspeed_config import effective_zero_stage
from megazebra.train.guard import SpikeGuard
from megazebra.train.optimizer import build_optimizer
from megazebra.train.schedule import learning_rate

_NOT_FOR_USERS = ("untested optimizer", "OVERFLOW! Skipping step")

_UNDECIDED = "undecided"

Forward = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the valid tokens of the whole global batch. skipped: why the update was not made."""

    loss: float
    grad_norm: float
    lr: float
    valid_tokens: int
    skipped: str | None


def start_deepspeed(device: torch.device, timeout_s: float) -> None:
    """Start torch.distributed through DeepSpeed (NCCL on GPUs, gloo on CPUs)."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found nothing better
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Warnings a user can do nothing about: torch's own optimizers are "untested" to DeepSpeed, an overflow is
    # reported by our guard, and collectives are called by names that torch 2.13 deprecates.
    logger.addFilter(lambda record: not any(text in record.getMessage() for text in _NOT_FOR_USERS))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory collective for a minute, which training never calls.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        verbose=False,
    )


class MeshForDeepSpeed:
    """Our groups under the names DeepSpeed asks a model-parallel unit for.

    Gradients are averaged and ZeRO shards over dp_cp everywhere; only the arithmetic of batch sizes reads
    the dp size. `get_sequence_parallel_*` stays undefined: with it gradient norms come out too large.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp.size

    def get_model_parallel_group(self) -> Any:
        return self._mesh.tp.process_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.dp.size

    def get_data_parallel_group(self) -> Any:
        return self._mesh.dp_cp.process_group

    def get_sequence_data_parallel_rank(self) -> int:
        return self._mesh.dp_cp.rank

    def get_sequence_data_parallel_world_size(self) -> int:
        return self._mesh.dp_cp.size

    def get_sequence_data_parallel_group(self) -> Any:
        return self._mesh.dp_cp.process_group


class TrainEngine:
    """A model under DeepSpeed ZeRO: one global step, guarded, with the loss normalized over the whole batch.

    build_model: makes the model without initializing it (under ZeRO-3 it is sharded while it is built).
    forward: `forward(module, micro_batch)` -> summed token loss of this rank.
    weights: whole weights by name to begin with; None: random ones.
    """

    def __init__(
        self,
        config: Config,
        mesh: ParallelMesh,
        device: torch.device,
        deepspeed_config: dict[str, Any],
        build_model: Callable[[], nn.Module],
        forward: Forward,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        import deepspeed

        self.config = config
        self.mesh = mesh
        self.device = device
        self.forward = forward
        self.zero_stage = effective_zero_stage(config)
        self.guard = SpikeGuard(config.train.guard)
        # On its device from the start: a whole model may not fit the host.
        sharded_build: Any = torch.device(device)
        if self.zero_stage == 3:
            # The group must be named: without it ZeRO-3 shards over tensor-parallel ranks too.
            sharded_build = deepspeed.zero.Init(
                data_parallel_group=mesh.dp_cp.process_group,
                # Only these sections: batch sizes it would check without knowing of tp. The dtype comes from
                # `bf16` here, since its `dtype` argument is ignored on CPUs (always bf16 then).
                config_dict_or_path={
                    "zero_optimization": deepspeed_config["zero_optimization"],
                    "bf16": deepspeed_config["bf16"],
                    "train_micro_batch_size_per_gpu": 1,
                },
            )
        with sharded_build:
            model = build_model()
        if weights is None:
            initialize(model, config.model, config.train.seed, mesh.tp, self.gathered)
        else:
            load_full_weights(model, weights, mesh.tp, self.gathered)
        optimizer = build_optimizer(model, config.optimizer)
        optimizer.refuses = self._refuses_update
        with redirect_stdout(io.StringIO()):  # its bf16 optimizer prints a memory table for every group
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                mpu=MeshForDeepSpeed(mesh),
                config=deepspeed_config,
                dist_init_required=False,
            )
        self.optimizer = optimizer
        self._loss = math.nan
        self._grad_norm = math.nan
        self._verdict: str | None = _UNDECIDED
        self._count_traffic()

    def close(self) -> None:
        """Let go of the weights and of what the optimizer holds, so that another engine can take their place."""
        self.deepspeed.destroy()

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def gathered(self, parameters: list[nn.Parameter]) -> Any:
        """Context in which the parameters are whole (of this tensor-parallel rank) and may be written."""
        if self.zero_stage != 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)

    def train_step(self, micro_batches: Sequence[Any], step: int) -> StepResult:
        """One update over all micro-batches of the step (each has `valid_tokens`).

        step: number of the update, from 0 (the learning rate follows it).
        """
        group = self.mesh.dp_cp
        counts = torch.tensor([float(sum(batch.valid_tokens for batch in micro_batches))], dtype=torch.float64)
        valid_tokens = int(all_reduce(counts.to(self.device), group, label="valid_tokens").item())
        lr = learning_rate(step, self.config.train.steps, self.config.optimizer, self.config.schedule)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = lr
        # DeepSpeed averages gradients over dp_cp; a sum over tokens divided by their global count is wanted.
        scale = group.size / max(1, valid_tokens)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for remaining, batch in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
            loss = self.forward(self.deepspeed, batch)
            self.deepspeed.backward(loss * scale, scale_wrt_gas=False)
            loss_sum += loss.detach()
            del loss  # its graph must be gone before the next forward pass builds one
            if remaining:
                self.deepspeed.step()  # counts the micro-batch; the last one updates
        self._verdict = _UNDECIDED
        self._loss = all_reduce(loss_sum, group, label="loss").item() / max(1, valid_tokens)
        if self._clips_itself:
            self._grad_norm = self._clip_gradients()
        self.deepspeed.step()
        grad_norm = self._current_grad_norm()
        skipped = self._reason_of_skip(grad_norm)
        if skipped is None:
            self.guard.accepted(self._loss, grad_norm)
        else:
            self.guard.skipped()
        if self.device.type == "cuda":  # so that the step's time is the step's
            torch.cuda.synchronize(self.device)
        return StepResult(self._loss, grad_norm, lr, valid_tokens, skipped)

    def evaluate(self, micro_batches: Iterable[Any]) -> float:
        """Mean loss over the valid tokens of all ranks' micro-batches (equally many on each rank)."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.deepspeed.eval()
        with torch.no_grad():
            for batch in micro_batches:
                sums[0] += self.forward(self.deepspeed, batch)
                sums[1] += batch.valid_tokens
        self.deepspeed.train()
        loss_sum, valid_tokens = all_reduce(sums, self.mesh.dp_cp, label="validation").tolist()
        return loss_sum / max(1.0, valid_tokens)

    def _refuses_update(self) -> bool:
        """Asked by the optimizer, before each of its groups: decided at the first, by all ranks together.

        Loss and norm should be the same numbers everywhere; were they not, in their last bit, ranks that
        decide alone could drift apart without a sign.
        """
        if self._verdict is _UNDECIDED:
            objection = self.guard.objection(self._loss, self._current_grad_norm())
            flag = torch.tensor([float(objection is not None)], device=self.device)
            refused = bool(all_reduce(flag, self.mesh.world, maximum=True, label="guard").item())
            self._verdict = (objection or "another rank objected") if refused else None
        return self._verdict is not None

    def _reason_of_skip(self, grad_norm: float) -> str | None:
        if self._verdict is not _UNDECIDED:
            return self._verdict
        # The optimizer was never asked: ZeRO itself drops a step whose gradients are not finite.
        return self.guard.objection(self._loss, grad_norm) or f"gradient norm is {grad_norm}, which ZeRO refuses"

    @property
    def _clips_itself(self) -> bool:
        """DeepSpeed neither reports nor guards the norm of unsharded fp32 training."""
        return self.zero_stage == 0

    def _current_grad_norm(self) -> float:
        if self._clips_itself:
            return self._grad_norm
        # DeepSpeed sets it before the inner optimizer runs; -1 is its word for inf or NaN in places.
        norm = float(self.deepspeed.optimizer._global_grad_norm)
        return norm if norm >= 0 else math.inf

    def _clip_gradients(self) -> float:
        """Global gradient norm before clipping, over this rank's shards and, once, over what tp ranks share."""
        grads: list[Tensor] = []
        squares = torch.zeros(2, dtype=torch.float64, device=self.device)
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                grads.append(parameter.grad)
                squares[0 if is_sharded(parameter) else 1] += parameter.grad.norm().double() ** 2
        norm = math.sqrt(all_reduce(squares[0], self.mesh.tp, label="grad_norm").item() + squares[1].item())
        limit = self.config.optimizer.grad_clip
        if 0 < limit < norm < math.inf:
            torch._foreach_mul_(grads, limit / (norm + 1e-6))  # as torch and ZeRO do, so that stages agree
        return norm

    def _count_traffic(self) -> None:
        """Count what ZeRO sends beside our own collectives, under the group name 'zero'."""
        from deepspeed.comm import comm

        for kind, method_name, full_tensor, parameters in (
            ("all_reduce", "all_reduce", "tensor", ("tensor", "op", "group")),
            ("broadcast", "broadcast", "tensor", ("tensor", "src", "group")),
            ("all_gather", "all_gather_into_tensor", "output_tensor", ("output_tensor", "input_tensor", "group")),
            (
                "reduce_scatter",
                "reduce_scatter_tensor",
                "input_tensor",
                ("output_tensor", "input_tensor", "op", "group"),
            ),
        ):
            method = getattr(comm.cdb, method_name)
            # Engines may follow each other in one process: wrap the method itself, never a wrapper.
            method = getattr(method, "uncounted", method)
            setattr(comm.cdb, method_name, _counted(method, kind, full_tensor, parameters, self.mesh.traffic))


class _WatchedWork:
    """The handle of a collective that was only begun: waiting for it is communicating too."""

    def __init__(self, work: Any, traffic: TrafficCounter) -> None:
        self._work = work
        self._traffic = traffic

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._traffic.communicating("zero"):
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _counted(
    method: Callable[..., Any], kind: str, full_tensor: str, parameters: tuple[str, ...], traffic: TrafficCounter
) -> Callable[..., Any]:
    """The collective, recording at every call the size of the argument named `full_tensor`; watchers see it."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
        size = dist.get_world_size(arguments.get("group"))
        if size == 1:
            return method(*args, **kwargs)
        traffic.record(kind, "zero", size, arguments[full_tensor].nbytes, "zero")
        with traffic.communicating("zero"):
            work = method(*args, **kwargs)
        return work if work is None else _WatchedWork(work, traffic)

    counted.uncounted = method  # type: ignore[attr-defined]
    return counted
