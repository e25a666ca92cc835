"""DeepSpeed's configuration, generated whole from ours; a user's own file may add to it. Imports no DeepSpeed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megazebra.config.checks import gradient_accumulation_steps
from megazebra.config.errors import ConfigError
from megazebra.config.schema import Config

# Which key of ours decides a key of DeepSpeed's. The other generated keys are needed as they are.
_OURS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size / (train.micro_batch_size * data-parallel ranks)",
    "zero_optimization.stage": "parallel.zero_stage",
    "gradient_clipping": "optimizer.grad_clip",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "torch_autocast.enabled": "train.precision",
}
# A user's file may set these keys ...
_TUNABLE = {
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "disable_python_gc"),
    *("comms_logger", "flops_profiler", "timers", "aio"),
    *(
        f"zero_optimization.{name}"
        for name in (
            *("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "overlap_comm", "contiguous_gradients"),
            *("reduce_scatter", "allgather_partitions", "use_multi_rank_bucket_allreduce", "round_robin_gradients"),
            *("ignore_unused_parameters", "memory_efficient_linear", "log_trace_cache_warnings"),
            *("enable_sanity_checks", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
            *("stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
            *("stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold"),
            *("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential"),
        )
    ),
}
# ... and these, where groups of processes, numerics or what our checkpoints read depends on them, only to
# DeepSpeed's default. Of these sections ('' is the top level) it may set no other key that is not generated.
_ONLY_DEFAULT = {
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.mics_shard_size": -1,
    "zero_optimization.mics_hierarchical_params_gather": False,
    "zero_optimization.zero_quantized_weights": False,
    "zero_optimization.zero_quantized_gradients": False,
    "zero_optimization.zero_quantized_nontrainable_weights": False,
    "zero_optimization.zenflow": None,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.elastic_checkpoint": False,
    "zero_optimization.load_from_fp32_weights": True,
    "zero_optimization.legacy_stage1": False,
    "zero_optimization.parameter_alignment": False,
    "zero_optimization.pipeline_loading_checkpoint": False,
    "zero_optimization.override_module_apply": True,
    "bf16.immediate_grad_update": False,
    "bf16.check_grad_overflow": True,
    "bf16.bf16_master_weights_and_grads": False,
    "bf16.bf16_optimizer_states": False,
}
_CLOSED = ("", "zero_optimization", "bf16", "data_types")
# Sections that would do a second time what we do, or would never be read: refused whatever they say.
_REFUSED = {
    "optimizer": "set optimizer.name, optimizer.lr, optimizer.betas, optimizer.eps and optimizer.weight_decay",
    "scheduler": "set schedule.kind, schedule.warmup_steps, schedule.decay_steps and schedule.min_lr_ratio",
    "bfloat16": "set train.precision",  # the old name of bf16
    "tensor_parallel": "set parallel.tensor",
    "sequence_parallel_size": "set parallel.context",
    "activation_checkpointing": "set train.recompute",
    "wandb": "set logging.wandb.enabled",
    "tensorboard": "set logging.tensorboard",
}
# Of `zero_optimization`: states would lie where our checkpoints do not look for them.
_NOT_YET = ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param")


def effective_zero_stage(config: Config) -> int:
    """The ZeRO stage that DeepSpeed is given.

    Stage 0 runs as stage 1 in bf16: DeepSpeed's optimizer for bf16 without ZeRO takes a step of Adam while it
    is built and reports a wrong gradient norm. Stage 1 computes the same update.
    """
    return max(config.parallel.zero_stage, 1) if config.train.precision == "bf16" else config.parallel.zero_stage


def deepspeed_config(config: Config, data_parallel_size: int) -> dict[str, Any]:
    """Everything DeepSpeed needs to know; optimizer and learning rate are handed to it as objects.

    Raises ConfigError when the global batch is no multiple of micro-batch times data-parallel size.
    """
    stage = effective_zero_stage(config)
    # DeepSpeed clips without telling the norm where there is neither bf16 nor ZeRO: our engine measures and
    # clips there itself.
    engine_clips = stage == 0
    return {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps(config, data_parallel_size),
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": config.train.precision == "bf16"},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        # Else bf16 gradients are summed over the micro-batches in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        # Else they are summed over the data-parallel ranks in bf16, which loses more the more ranks there are, and
        # undoes the line above. ZeRO-3 gathers the parameters in their own type all the same.
        "communication_data_type": "fp32",
        # Written even where it is off: DeepSpeed's default is 1.0.
        "gradient_clipping": 0.0 if engine_clips else config.optimizer.grad_clip,
        # DeepSpeed's defaults, which our scaling of the loss relies on: gradients are averaged over the ranks, once.
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        # The client optimizer is torch's, which DeepSpeed calls untested with ZeRO.
        "zero_allow_untested_optimizer": True,
        # Metrics are printed by us.
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }


def build_deepspeed_config(config: Config, world_size: int, user_path: str | Path | None) -> dict[str, Any]:
    """The generated configuration with a user's file, where there is one, merged over it.

    Raises ConfigError as the steps below do.
    """
    data_parallel_size = world_size // (config.parallel.tensor * config.parallel.context)
    generated = deepspeed_config(config, data_parallel_size)
    if user_path is None:
        return generated
    return merge_user_config(generated, load_user_config(user_path), str(user_path))


def user_additions(config: Config, data_parallel_size: int, merged: dict[str, Any]) -> dict[str, Any]:
    """What a user's file has added to the generated configuration or set anew in it: as a file, it does so again."""
    return _beyond(deepspeed_config(config, data_parallel_size), merged)


def _beyond(ours: dict[str, Any], merged: dict[str, Any]) -> dict[str, Any]:
    additions = {}
    for key, value in merged.items():
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            if inner := _beyond(ours[key], value):
                additions[key] = inner
        elif key not in ours or value != ours[key]:
            additions[key] = value
    return additions


def load_user_config(path: str | Path) -> dict[str, Any]:
    """A user's DeepSpeed file (`--deepspeed_config`).

    Raises ConfigError when it cannot be read, is no JSON object or gives a key twice.
    """
    try:
        user = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except json.JSONDecodeError as error:
        raise ConfigError([f"{path}:{error.lineno}: is not valid JSON: {error.msg} (column {error.colno})"]) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a key given twice, nested too deeply
        raise ConfigError([f"{path}: is not valid JSON: {error}"]) from None
    if not isinstance(user, dict):
        raise ConfigError([f'{path}: must be a JSON object, such as {{"zero_optimization": {{...}}}}'])
    return user


def merge_user_config(generated: dict[str, Any], user: dict[str, Any], source: str) -> dict[str, Any]:
    """The generated configuration with the keys that `user` (read from the file `source`) adds.

    "auto" (the habit of Hugging Face's trainer), or a value equal to ours, leaves ours. Raises ConfigError with
    every key that the two sides set differently, that MegaZebra sees to itself or that is not known to be harmless.
    """
    problems: list[str] = []
    known = {*generated, *_TUNABLE, *_ONLY_DEFAULT, *_OURS}

    def merge(ours: Any, theirs: Any, key: str) -> Any:
        if isinstance(ours, dict) and isinstance(theirs, dict):
            result = dict(ours)
            for name, value in theirs.items():
                inner = f"{key}.{name}" if key else name
                if value == "auto":
                    continue
                if name in ours and inner not in _TUNABLE:
                    result[name] = merge(ours[name], value, inner)
                elif problem := _objection(inner, value, source, known):
                    problems.append(problem)
                elif inner not in _ONLY_DEFAULT:
                    result[name] = merge({}, value, inner) if isinstance(value, dict) else value
            return result
        if key == "gradient_clipping" and generated["zero_optimization"]["stage"] == 0:
            # Ours is 0.0 here whatever optimizer.grad_clip says, so agreement could not be told from a conflict.
            problems.append(
                f"{key}: {source} says {json.dumps(theirs)}, but in fp32 with parallel.zero_stage=0 MegaZebra clips "
                f"by itself; set optimizer.grad_clip, and remove it from {source}"
            )
            return ours
        if key == "zero_optimization.stage" and theirs == 0 and generated["bf16"]["enabled"]:
            theirs = 1  # as `effective_zero_stage` reads ours
        if not _equal(ours, theirs):
            says = f"{source} says {json.dumps(theirs)}, {_our_side(key, ours, generated)}"
            problems.append(f"{key}: {says}; remove it from {source}")
        return ours

    merged: dict[str, Any] = merge(generated, user, "")
    if problems:
        raise ConfigError(problems)
    return merged


def _objection(key: str, value: Any, source: str, known: Iterable[str]) -> str | None:
    """Why a user's file may not add `key`; None when it may."""
    section, _, name = key.rpartition(".")
    if key in _REFUSED:
        mend = _REFUSED[key]
        return f"{key}: {source} sets it, but MegaZebra sees to this itself; {mend}, and remove it from {source}"
    if section == "zero_optimization" and name in _NOT_YET:
        if value in (None, False, {"device": "none"}):
            return None
        return f"{key}: {source} sets it, but offloading is not there yet; remove it from {source}"
    if key in _ONLY_DEFAULT:
        if _equal(_ONLY_DEFAULT[key], value):
            return None
        says = f"{source} says {json.dumps(value)}, but MegaZebra relies on {json.dumps(_ONLY_DEFAULT[key])}"
        return f"{key}: {says}; remove it from {source}"
    if section in _CLOSED and key not in _TUNABLE:
        return f"{source}: unknown or unsupported key {key!r}{_meant(section, name, known) or '; remove it'}"
    return None


def _meant(section: str, name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for a name of another section or a typo within its own, else ''."""
    names = {key.rpartition(".")[2]: key for key in known}
    here = [other for other, key in names.items() if key.rpartition(".")[0] == section]
    close = [name] if name in names else difflib.get_close_matches(name, here, n=1, cutoff=0.8)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def _our_side(key: str, value: Any, generated: dict[str, Any]) -> str:
    """'parallel.zero_stage=1 says 1': the key of ours behind a generated value."""
    if isinstance(value, dict):
        return "but it is a section with keys of its own"
    says = f"says {json.dumps(value)}"
    if key not in _OURS:
        return f"MegaZebra {says}"
    if _OURS[key] == "train.precision":
        return f"train.precision={'bf16' if generated['bf16']['enabled'] else 'fp32'} {says}"
    if key == "zero_optimization.stage" and value == 1 and generated["bf16"]["enabled"]:
        return f"{_OURS[key]} {says} (bf16 runs stage 0 as 1)"
    return f"{_OURS[key]} {says}" if " " in _OURS[key] else f"{_OURS[key]}={json.dumps(value)} {says}"


def _equal(ours: Any, theirs: Any) -> bool:
    # In Python True == 1, but "stage": true is no stage.
    return isinstance(ours, bool) == isinstance(theirs, bool) and bool(ours == theirs)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice in one object")
        found[key] = value
    return found
