"""The configuration DeepSpeed is given, and a user's file over it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megazebra.config import Config, ConfigError, OptimizerConfig, ParallelConfig, TrainConfig
from megazebra.train.deepspeed_config import (
    _ONLY_DEFAULT,
    _TUNABLE,
    deepspeed_config,
    effective_zero_stage,
    load_user_config,
    merge_user_config,
)


def run(stage: int = 1, precision: str = "bf16", **train: Any) -> Config:
    return Config(
        parallel=ParallelConfig(zero_stage=stage),  # type: ignore[arg-type]
        train=TrainConfig(precision=precision, **train),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(grad_clip=0.5),
    )


@pytest.mark.parametrize(
    ("precision", "stage", "effective", "clip"),
    [
        ("bf16", 0, 1, 0.5),
        ("bf16", 1, 1, 0.5),
        ("bf16", 3, 3, 0.5),
        ("fp32", 0, 0, 0.0),  # our engine clips there
        ("fp32", 1, 1, 0.5),
        ("fp32", 2, 2, 0.5),
    ],
)
def test_stage_precision_and_clipping(precision: str, stage: int, effective: int, clip: float) -> None:
    config = run(stage, precision)
    generated = deepspeed_config(config, 1)
    assert effective_zero_stage(config) == effective
    assert generated["zero_optimization"] == {"stage": effective}
    assert generated["gradient_clipping"] == clip
    assert generated["bf16"]["enabled"] == (precision == "bf16")
    assert generated["data_types"] == {"grad_accum_dtype": "fp32"}
    assert generated["communication_data_type"] == "fp32"
    assert "optimizer" not in generated
    assert "scheduler" not in generated


@pytest.mark.parametrize(("batch", "micro", "ranks", "steps"), [(8, 1, 1, 8), (8, 2, 2, 2), (8, 8, 1, 1)])
def test_batch(batch: int, micro: int, ranks: int, steps: int) -> None:
    generated = deepspeed_config(run(global_batch_size=batch, micro_batch_size=micro), ranks)
    assert generated["train_batch_size"] == batch
    assert generated["train_micro_batch_size_per_gpu"] == micro
    assert generated["gradient_accumulation_steps"] == steps


def test_batch_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"train.global_batch_size=8 is not divisible by .* = 3; set .* 6 or 9"):
        deepspeed_config(run(), 3)


def test_deepspeed_reads_every_key_as_meant() -> None:
    """The names are DeepSpeed's: a misspelled top-level key would be ignored without a word."""
    program = """
import json, sys, torch
from deepspeed.runtime.config import DeepSpeedConfig
given = json.loads(sys.argv[1])
read = DeepSpeedConfig(given)
print(json.dumps({
    "train_batch_size": read.train_batch_size,
    "train_micro_batch_size_per_gpu": read.train_micro_batch_size_per_gpu,
    "gradient_accumulation_steps": read.gradient_accumulation_steps,
    "zero_optimization": {"stage": int(read.zero_optimization_stage)},
    "bf16": {"enabled": read.bfloat16_config.enabled},
    "fp16": {"enabled": read.float16_config.enabled},
    "torch_autocast": {"enabled": read.torch_autocast_enabled},
    "data_types": {"grad_accum_dtype": read.grad_accum_dtype},
    "communication_data_type": {torch.float32: "fp32"}.get(read.communication_data_type),
    "gradient_clipping": read.gradient_clipping,
    "gradient_allreduce_op": read.gradient_allreduce_op,
    "prescale_gradients": read.prescale_gradients,
    "gradient_predivide_factor": read.gradient_predivide_factor,
    "zero_allow_untested_optimizer": read.zero_allow_untested_optimizer,
    "steps_per_print": read.steps_per_print,
    "wall_clock_breakdown": read.wall_clock_breakdown,
}))
"""
    given = deepspeed_config(run(2, global_batch_size=6, micro_batch_size=2), 1)
    result = subprocess.run(
        [sys.executable, "-c", program, json.dumps(given)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == given


@pytest.mark.parametrize(
    "user",
    [
        {},
        {"zero_optimization": {"stage": "auto"}, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"},
        {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5, "train_batch_size": 8.0},
        {"zero_optimization": {"stage": 0}},  # both sides mean the same: bf16 runs stage 0 as 1
        {"fp16": {"enabled": False}, "steps_per_print": "auto", "prescale_gradients": False},
        {"zero_optimization": {"reduce_bucket_size": "auto"}, "comms_logger": "auto", "optimizer": "auto"},
        # DeepSpeed's defaults of what may not be changed
        {"zero_optimization": {"zero_hpz_partition_size": 1, "zenflow": None, "compute_grad_norm": True}},
        {"zero_optimization": {"mics_shard_size": -1}, "bf16": {"bf16_master_weights_and_grads": False}},
    ],
)
def test_agreement_leaves_ours(user: dict[str, Any]) -> None:
    generated = deepspeed_config(run(), 1)
    assert merge_user_config(generated, user, "ds.json") == generated


def test_additions_are_merged_deep() -> None:
    generated = deepspeed_config(run(3), 1)
    user = {
        "zero_optimization": {"overlap_comm": False, "stage3_prefetch_bucket_size": 5e7},
        "fp16": {"loss_scale": 0},
        "comms_logger": {"enabled": True, "verbose": "auto"},
        "steps_per_print": 5,
        "wall_clock_breakdown": True,
    }
    merged = merge_user_config(generated, user, "ds.json")
    assert merged == {
        **generated,
        "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_prefetch_bucket_size": 5e7},
        "fp16": {"enabled": False, "loss_scale": 0},
        "comms_logger": {"enabled": True},
        "steps_per_print": 5,
        "wall_clock_breakdown": True,
    }
    assert generated == deepspeed_config(run(3), 1)  # left as it was
    assert user["comms_logger"]["verbose"] == "auto"  # type: ignore[index]


@pytest.mark.parametrize(
    ("user", "problem"),
    [
        (
            {"zero_optimisation": {"stage": 3}},
            "unknown or unsupported key 'zero_optimisation'; did you mean 'zero_optimization'?",
        ),
        ({"checkpoint": {"load_universal": True}}, "unknown or unsupported key 'checkpoint'; remove it"),
        ({"compile": {"deepcompile": True}}, "unknown or unsupported key 'compile'; remove it"),
        (
            {"zero_optimization": {"overlap_com": True}},
            "unknown or unsupported key 'zero_optimization.overlap_com'; "
            "did you mean 'zero_optimization.overlap_comm'?",
        ),
        (
            {"reduce_bucket_size": 5e8},
            "unknown or unsupported key 'reduce_bucket_size'; did you mean 'zero_optimization.reduce_bucket_size'?",
        ),
        (
            {"zero_optimization": {"leaf_module": {}}},
            "unknown or unsupported key 'zero_optimization.leaf_module'; remove it",
        ),
        (
            {"zero_optimization": {"stag": 1}},
            "unknown or unsupported key 'zero_optimization.stag'; did you mean 'zero_optimization.stage'?",
        ),
        ({"data_types": {"param_dtype": "bf16"}}, "unknown or unsupported key 'data_types.param_dtype'; remove it"),
    ],
)
def test_unknown_keys(user: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_user_config(deepspeed_config(run(), 1), user, "ds.json")
    assert caught.value.problems == [f"ds.json: {problem}"]


@pytest.mark.parametrize(
    ("section", "key", "value", "default"),
    [
        ("zero_optimization", "zero_hpz_partition_size", 2, "1"),
        ("zero_optimization", "mics_shard_size", 2, "-1"),
        ("zero_optimization", "mics_hierarchical_params_gather", True, "false"),
        ("zero_optimization", "zero_quantized_weights", True, "false"),
        ("zero_optimization", "zero_quantized_gradients", True, "false"),
        ("zero_optimization", "zero_quantized_nontrainable_weights", True, "false"),
        ("zero_optimization", "zenflow", {"topk_ratio": 0.1}, "null"),
        ("zero_optimization", "compute_grad_norm", False, "true"),
        ("zero_optimization", "elastic_checkpoint", True, "false"),
        ("zero_optimization", "parameter_alignment", True, "false"),
        ("bf16", "bf16_master_weights_and_grads", True, "false"),
    ],
)
def test_what_our_engine_and_checkpoints_rely_on(section: str, key: str, value: Any, default: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_user_config(deepspeed_config(run(), 1), {section: {key: value}}, "ds.json")
    assert caught.value.problems == [
        f"{section}.{key}: ds.json says {json.dumps(value)}, but MegaZebra relies on {default}; remove it from ds.json"
    ]


def test_the_keys_a_user_may_set_are_deepspeeds() -> None:
    """And what may only be set to DeepSpeed's default has that default."""
    program = """
import json
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
def defaults(model):
    return {field.alias or name: field.get_default() for name, field in model.model_fields.items()}
read = DeepSpeedConfig({"train_batch_size": 1, "steps_per_print": 7, "dump_state": True, "memory_breakdown": True,
    "wall_clock_breakdown": True, "log_level": "error", "disable_python_gc": True, "aio": {"queue_depth": 3},
    "comms_logger": {"verbose": True}, "flops_profiler": {"top_modules": 3},
    "timers": {"throughput": {"enabled": False}}})
assert (read.steps_per_print, read.dump_state, read.memory_breakdown, read.wall_clock_breakdown, read.log_level,
    read.disable_python_gc, read.aio_config["queue_depth"], read.comms_config.comms_logger.verbose,
    read.flops_profiler_config.top_modules, read.timers_config.enabled
) == (7, True, True, True, "error", True, 3, True, 3, False)
print(json.dumps({"zero_optimization": defaults(DeepSpeedZeroConfig), "bf16": defaults(DeepSpeedBF16Config)},
    default=str))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    theirs = json.loads(result.stdout.splitlines()[-1])
    for key in _TUNABLE:
        section, _, name = key.rpartition(".")
        assert not section or name in theirs[section], key
    for key, default in _ONLY_DEFAULT.items():
        section, _, name = key.rpartition(".")
        assert name.startswith("mics_") or theirs[section][name] == default, key  # MiCS left DeepSpeed in 0.19


@pytest.mark.parametrize(
    ("config", "user", "problem"),
    [
        (
            run(1, "fp32"),
            {"zero_optimization": {"stage": 3}},
            "zero_optimization.stage: ds.json says 3, parallel.zero_stage=1 says 1; remove it from ds.json",
        ),
        (
            run(0, "fp32"),
            {"zero_optimization": {"stage": 3}},
            "zero_optimization.stage: ds.json says 3, parallel.zero_stage=0 says 0; remove it from ds.json",
        ),
        (
            run(0),
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage: ds.json says 2, parallel.zero_stage says 1 (bf16 runs stage 0 as 1); "
            "remove it from ds.json",
        ),
        (
            run(3),
            {"zero_optimization": {"stage": True}},
            "zero_optimization.stage: ds.json says true, parallel.zero_stage=3 says 3; remove it from ds.json",
        ),
        (
            run(),
            {"zero_optimization": False},
            "zero_optimization: ds.json says false, but it is a section with keys of its own; remove it from ds.json",
        ),
        (
            run(),
            {"gradient_clipping": 1.0},
            "gradient_clipping: ds.json says 1.0, optimizer.grad_clip=0.5 says 0.5; remove it from ds.json",
        ),
        (
            run(0, "fp32"),
            {"gradient_clipping": 0},
            "gradient_clipping: ds.json says 0, but in fp32 with parallel.zero_stage=0 MegaZebra clips by itself; "
            "set optimizer.grad_clip, and remove it from ds.json",
        ),
        (
            run(),
            {"bf16": {"enabled": False}},
            "bf16.enabled: ds.json says false, train.precision=bf16 says true; remove it from ds.json",
        ),
        (
            run(1, "fp32"),
            {"fp16": {"enabled": True}},
            "fp16.enabled: ds.json says true, train.precision=fp32 says false; remove it from ds.json",
        ),
        (
            run(),
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps: ds.json says 2, train.global_batch_size / (train.micro_batch_size * "
            "data-parallel ranks) says 8; remove it from ds.json",
        ),
        (
            run(),
            {"data_types": {"grad_accum_dtype": "bf16"}},
            'data_types.grad_accum_dtype: ds.json says "bf16", MegaZebra says "fp32"; remove it from ds.json',
        ),
        (
            run(),
            {"optimizer": {"type": "AdamW"}},
            "optimizer: ds.json sets it, but MegaZebra sees to this itself; set optimizer.name, optimizer.lr, "
            "optimizer.betas, optimizer.eps and optimizer.weight_decay, and remove it from ds.json",
        ),
        (
            run(),
            {"scheduler": {"type": "WarmupLR"}},
            "scheduler: ds.json sets it, but MegaZebra sees to this itself; set schedule.kind, schedule.warmup_steps, "
            "schedule.decay_steps and schedule.min_lr_ratio, and remove it from ds.json",
        ),
    ],
)
def test_conflicts(config: Config, user: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_user_config(deepspeed_config(config, 1), user, "ds.json")
    assert caught.value.problems == [problem]


def test_all_conflicts_at_once() -> None:
    user = {
        "train_batch_size": 3,
        "zero_optimization": {"stage": 3},
        "scheduler": {},
        "tensor_parallel": {"autotp_size": 2},
        "zero_optimisation": {},
    }
    with pytest.raises(ConfigError) as caught:
        merge_user_config(deepspeed_config(run(), 1), user, "ds.json")
    assert len(caught.value.problems) == 5


def test_user_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"overlap_comm": true}}')
    assert load_user_config(path) == {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1,\n "b": }', r"ds.json:2: is not valid JSON: Expecting value \(column 7\)"),
        (b"[1]", r"ds.json: must be a JSON object"),
        (b'{"a": {"b": 1, "b": 2}}', r"ds.json: is not valid JSON: the key 'b' is given twice"),
        (b'{"a": "\xe9"}', r"ds.json: is not valid JSON: 'utf-8' codec"),
        (b"[" * 100_000, r"ds.json: is not valid JSON: "),
    ],
)
def test_user_file_that_is_no_object(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_user_config(tmp_path / "ds.json")


def test_user_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ds\.json: no such file"):
        load_user_config(tmp_path / "ds.json")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_user_config(tmp_path)


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_offloading_is_refused_for_now(key: str) -> None:
    generated = deepspeed_config(Config(), 1)
    with pytest.raises(ConfigError, match=rf"zero_optimization.{key}: ds.json sets it, but offloading is not there"):
        merge_user_config(generated, {"zero_optimization": {key: {"device": "cpu"}}}, "ds.json")
    merge_user_config(generated, {"zero_optimization": {key: {"device": "none"}}}, "ds.json")
