"""The configuration of a run: schema, loading, checks, help. Imports no torch, so that mistakes show at once."""

from megazebra.config.checks import check_world
from megazebra.config.command_line import CommandLine, parse_command_line
from megazebra.config.errors import ConfigError
from megazebra.config.help import help_text
from megazebra.config.loading import load_config, save_config
from megazebra.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    GuardConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
    WandbConfig,
)

__all__ = [
    "CheckpointConfig",
    "CommandLine",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "GuardConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RopeConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "ValidationConfig",
    "WandbConfig",
    "check_world",
    "help_text",
    "load_config",
    "parse_command_line",
    "save_config",
]
