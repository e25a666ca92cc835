"""Checks that span keys: functions of the sections they read, yielding (dotted key, what is wrong and the mend).

A check runs when all its sections are valid in themselves, so one bad value hides no other problem.
"""

from __future__ import annotations

import inspect
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping

from megazebra.config.backends import attention_backend_names
from megazebra.config.errors import ConfigError
from megazebra.config.keys import did_you_mean
from megazebra.config.schema import (
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfileConfig,
    RopeConfig,
    ScheduleConfig,
    Section,
    TrainConfig,
    ValidationConfig,
)
from megazebra.pattern import pattern_symbols

Problems = Iterator[tuple[str, str]]


def heads_fit(model: ModelConfig) -> Problems:
    heads = model.num_attention_heads
    if model.head_dim is None and model.hidden_size % heads:
        yield (
            "model.hidden_size",
            f"must be divisible by model.num_attention_heads={heads} "
            f"(next: {_next_multiple(model.hidden_size, heads)}), or set model.head_dim",
        )
    if heads % model.kv_heads:
        yield (
            "model.num_kv_heads",
            f"must divide model.num_attention_heads={heads}: equal groups share a key/value head",
        )


def pattern_fits(model: ModelConfig) -> Problems:
    try:
        pattern_symbols(model.pattern, model.num_layers)
    except ValueError as error:
        yield "model.pattern", str(error)


def rotary_size(model: ModelConfig) -> Problems:
    """RoPE turns pairs of dimensions."""
    with_rope = [name for name, rope in _ropes(model) if rope.enabled]
    if with_rope and model.head_size % 2 and _head_size_is_whole(model):
        yield (
            "model.head_dim",
            f"gives heads of {model.head_size} dimensions; RoPE needs an even number "
            f"(or set model.{with_rope[0]}.enabled=false)",
        )


_SCALED = ("linear", "ntk", "yarn", "llama3", "longrope")
# The kinds that read each option of RopeConfig; `theta` describes the unscaled model and belongs to all.
_READ_BY = {
    "factor": _SCALED,
    "original_max_position_embeddings": ("yarn", "llama3", "longrope"),
    "abf_theta": ("abf",),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "attention_factor": ("yarn", "longrope"),
    "low_freq_factor": ("llama3",),
    "high_freq_factor": ("llama3",),
    "short_factor": ("longrope",),
    "long_factor": ("longrope",),
}


def rope_scaling(model: ModelConfig) -> Problems:
    for name, rope in (("rope_global", model.rope_global), ("rope_local", model.rope_local)):
        if rope.enabled:  # else nothing of it is read, and switching it off for a try should take one key
            yield from _within(f"model.{name}", _rope_problems(rope, model))


def _rope_problems(rope: RopeConfig, model: ModelConfig) -> Problems:
    kind = rope.scaling
    yield from _unread(rope, "scaling", _READ_BY)
    if kind in _SCALED and kind != "longrope" and rope.factor == 1.0:
        yield "factor", f"must be > 1 with scaling={kind}: new length / original length"
    if kind in _READ_BY["original_max_position_embeddings"] and rope.original_max_position_embeddings is None:
        yield (
            "original_max_position_embeddings",
            f"is needed by scaling={kind}: the length the unscaled model was trained for",
        )
    if kind == "abf" and rope.abf_theta is None:
        yield "abf_theta", "is needed by scaling=abf: the base that replaces theta"
    if kind == "yarn" and rope.beta_slow >= rope.beta_fast:
        yield "beta_slow", f"must be < beta_fast={rope.beta_fast:g}"
    if kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        yield "low_freq_factor", f"must be < high_freq_factor={rope.high_freq_factor:g}"
    if kind == "longrope":
        for option, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
            if factors is None:
                yield option, "is needed by scaling=longrope: a list of head_dim/2 divisors"
            elif _head_size_is_whole(model) and len(factors) != model.head_size // 2:
                yield (
                    option,
                    f"has {len(factors)} divisors; heads of {model.head_size} dimensions need {model.head_size // 2}",
                )


def rope_reaches(model: ModelConfig) -> Problems:
    """Global layers see the whole sequence, so their scaling must reach it; local ones never look beyond the window.

    Not asked of llama3, where the factor is no ratio of lengths: Llama 3.1 has factor 8 over 8192 and runs to 131072.
    """
    rope, longest = model.rope_global, model.max_position_embeddings
    original = rope.original_max_position_embeddings
    if ("rope_global", rope) not in _ropes(model) or not rope.enabled or original is None:
        return
    if rope.scaling not in ("yarn", "longrope") or (rope.scaling == "yarn" and rope.factor == 1.0):
        return  # yarn's factor of 1 has been complained about
    if rope.factor * original < longest * (1 - 1e-5):  # a factor may be a rounded quotient
        yield (
            "model.rope_global.factor",
            f"times model.rope_global.original_max_position_embeddings={original} is {rope.factor * original:.9g}, "
            f"less than model.max_position_embeddings={longest}; set model.rope_global.factor={longest / original:g} "
            "or lower model.max_position_embeddings",
        )


def tensor_parallel_fits(model: ModelConfig, parallel: ParallelConfig) -> Problems:
    tensor = parallel.tensor
    if model.num_attention_heads % tensor:
        yield "model.num_attention_heads", f"must be divisible by parallel.tensor={tensor}; lower parallel.tensor"
    if model.kv_heads % tensor:
        yield (
            "model.num_kv_heads",
            f"gives {model.kv_heads} key/value heads, not divisible by parallel.tensor={tensor}; "
            "lower parallel.tensor or raise model.num_kv_heads",
        )
    if model.ffn_hidden_size % tensor:
        multiple = _next_multiple(model.ffn_hidden_size, tensor)
        yield (
            "model.ffn_hidden_size",
            f"must be divisible by parallel.tensor={tensor} (next: {multiple}); or lower parallel.tensor",
        )


def context_parallel_fits(model: ModelConfig, parallel: ParallelConfig) -> Problems:
    heads = model.num_attention_heads // parallel.tensor
    for name in ("context_local", "context_global"):
        if parallel.context > 1 and getattr(parallel, name) == "ulysses" and heads % parallel.context:
            yield (
                f"parallel.{name}",
                f"needs parallel.context={parallel.context} to divide the {heads} query heads of a tensor-parallel "
                "rank; set it to auto, or change parallel.context",
            )


def context_is_read(parallel: ParallelConfig) -> Problems:
    for name in ("context_local", "context_global"):
        if parallel.context == 1 and getattr(parallel, name) != "auto":
            yield f"parallel.{name}", "is not read with parallel.context=1; remove it"


def sequence_fits(model: ModelConfig, data: DataConfig) -> Problems:
    longest = model.max_position_embeddings
    if data.seq_len > longest:
        yield (
            "data.seq_len",
            f"exceeds model.max_position_embeddings={longest}; raise model.max_position_embeddings together with "
            "model.rope_global.scaling, or lower data.seq_len",
        )


def batch_fits(train: TrainConfig) -> Problems:
    if train.global_batch_size % train.micro_batch_size:
        multiple = _next_multiple(train.global_batch_size, train.micro_batch_size)
        yield (
            "train.global_batch_size",
            f"must be divisible by train.micro_batch_size={train.micro_batch_size} (next: {multiple})",
        )


def hang_is_seen(train: TrainConfig, parallel: ParallelConfig) -> Problems:
    if train.hang_timeout_s is not None and train.hang_timeout_s >= parallel.timeout_s:
        yield (
            "train.hang_timeout_s",
            f"must be less than parallel.timeout_s={parallel.timeout_s:g}, or collectives give up before; lower it, or "
            "raise parallel.timeout_s",
        )


def schedule_fits(schedule: ScheduleConfig, train: TrainConfig) -> Problems:
    steps, warmup = train.steps, schedule.warmup_steps
    if warmup > steps:
        yield "schedule.warmup_steps", f"exceeds train.steps={steps}"
    elif schedule.kind == "wsd":
        decay = steps // 10 if schedule.decay_steps is None else schedule.decay_steps
        if warmup + decay > steps:
            yield (
                "schedule.decay_steps",
                f"{decay} decay steps after schedule.warmup_steps={warmup} exceed train.steps={steps}; "
                "lower one of the two",
            )


def schedule_is_read(schedule: ScheduleConfig) -> Problems:
    read_by = {"decay_steps": ("wsd",), "min_lr_ratio": ("cosine", "linear", "wsd")}
    yield from _within("schedule", _unread(schedule, "kind", read_by))


def optimizer_is_read(optimizer: OptimizerConfig) -> Problems:
    read_by = {"momentum": ("sgd",), "betas": ("adamw",), "eps": ("adamw",)}
    yield from _within("optimizer", _unread(optimizer, "name", read_by))


def validation_has_data(validation: ValidationConfig, data: DataConfig) -> Problems:
    if validation.interval and data.validation_path is None and not data.validation_sources:
        yield (
            "validation.interval",
            "needs a held-out corpus: set data.validation_path or data.validation_sources, or validation.interval=0",
        )


def evaluation_can_ask(evaluation: EvaluationConfig, data: DataConfig) -> Problems:
    asked = set(evaluation.tasks)
    if evaluation.interval and not asked:
        yield "evaluation.interval", "evaluates nothing; name tasks in evaluation.tasks, or set it to 0"
    if asked & {"positions", "contexts"} and data.validation_path is None and not data.validation_sources:
        yield (
            "evaluation.tasks",
            "needs held-out text for positions and contexts: set data.validation_path or data.validation_sources",
        )
    if "ruler" in asked and evaluation.tokenizer is None:
        yield "evaluation.tokenizer", "is needed by the task ruler, which is made of words: name a tokenizer.json"


_NAME = re.compile(r"[A-Za-z0-9_-]+")


def data_is_named_once(data: DataConfig) -> Problems:
    for one, several in (("path", "sources"), ("validation_path", "validation_sources")):
        if getattr(data, one) is not None and getattr(data, several):
            yield f"data.{several}", f"and data.{one} are both given; name that corpus in data.{several} too"
        for name in getattr(data, several):
            if not _NAME.fullmatch(name):
                yield f"data.{several}", f"has the name {name!r}; take letters, digits, '_' and '-'"


def sources_fit(data: DataConfig) -> Problems:
    without = [name for name, source in data.sources.items() if source.weight is None]
    if without and len(without) < len(data.sources):
        yield "data.sources", f"gives some weights but none for {', '.join(without)}; give every source one, or none"
    for name, source in data.sources.items():
        longest = source.max_document_tokens
        if longest is not None and source.min_document_tokens > longest:
            yield (
                "data.sources",
                f"asks {name!r} for documents of at least {source.min_document_tokens} and at most {longest} tokens; "
                "swap the two",
            )


def megatron_order_fits(data: DataConfig) -> Problems:
    split = data.megatron_split
    if data.index_compat != "megatron":
        if split is not None:
            yield "data.megatron_split", "is not read with index_compat=none, only with megatron; remove it"
        return
    if split is not None and not (split and split[0] > 0):
        yield "data.megatron_split", "leaves nothing to train on; its first share is that of training"
    if len(data.sources) > 1 or any(source.filters for source in data.sources.values()):
        yield "data.index_compat", "reproduces Megatron's order of one whole corpus; give one source without a filter"
    if data.packing != "concatenate":
        yield "data.packing", "must be concatenate with data.index_compat=megatron: Megatron cuts documents so"


def packing_is_masked(data: DataConfig) -> Problems:
    if data.packing == "best_fit" and not data.document_mask:
        yield "data.document_mask", "must be true with data.packing=best_fit: unrelated documents share a sequence"


def attention_backend_exists(train: TrainConfig) -> Problems:
    known = ("auto", *attention_backend_names())
    if train.attention_backend not in known:
        names = ", ".join(known)
        yield "train.attention_backend", f"must be one of {names}{did_you_mean(train.attention_backend, known)}"


def prometheus_stays_inside(logging: LoggingConfig) -> Problems:
    server = logging.prometheus
    if server.enabled and not server.expose and not is_loopback(server.host):
        yield (
            "logging.prometheus.host",
            "is no loopback address, so other machines could read the metrics; set logging.prometheus.host=127.0.0.1, "
            "or logging.prometheus.expose=true if that is meant",
        )
    if server.expose and is_loopback(server.host):
        yield (
            "logging.prometheus.expose",
            f"exposes nothing at logging.prometheus.host={server.host}; set the host to an address of this machine, "
            "such as 0.0.0.0, or remove it",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; names other than localhost are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def profile_window_is_one(profile: ProfileConfig) -> Problems:
    if profile.window is not None and not 1 <= profile.window[0] <= profile.window[1]:
        yield "profile.steps", "must be first:last with 1 <= first <= last: steps count from 1"
    if profile.window is not None and not profile.ranks:
        yield "profile.ranks", "names no rank, so profile.steps records nothing; set profile.ranks=[0]"


CHECKS: tuple[Callable[..., Problems], ...] = (
    heads_fit,
    pattern_fits,
    rotary_size,
    rope_scaling,
    rope_reaches,
    tensor_parallel_fits,
    context_parallel_fits,
    context_is_read,
    sequence_fits,
    batch_fits,
    hang_is_seen,
    schedule_fits,
    schedule_is_read,
    optimizer_is_read,
    validation_has_data,
    evaluation_can_ask,
    data_is_named_once,
    sources_fit,
    megatron_order_fits,
    packing_is_masked,
    attention_backend_exists,
    prometheus_stays_inside,
    profile_window_is_one,
)


def cross_problems(sections: Mapping[str, Section]) -> Problems:
    """What the checks find in the given sections; a check that reads another section is left out."""
    for check in CHECKS:
        names = inspect.signature(check).parameters
        if all(name in sections for name in names):
            yield from check(**{name: sections[name] for name in names})


def check_world(config: Config, world_size: int) -> None:
    """Check the layout and the batch against the number of processes.

    Raises ConfigError when the processes do not divide into tensor * context groups, or the global batch not
    into whole micro-batches for every data-parallel rank.
    """
    ranks_per_replica = config.parallel.tensor * config.parallel.context
    if world_size < 1 or world_size % ranks_per_replica:
        above = _next_multiple(world_size, ranks_per_replica)
        below = above - ranks_per_replica
        start = f"{below} or {above}" if below > 0 else f"{above}"
        raise ConfigError(
            [
                f"world size {world_size} is not divisible by parallel.tensor * parallel.context = "
                f"{ranks_per_replica}; start {start} processes"
            ]
        )
    gradient_accumulation_steps(config, world_size // ranks_per_replica)
    absent = [rank for rank in config.profile.ranks if rank >= world_size]
    if config.profile.window is not None and absent:
        raise ConfigError([f"profile.ranks has {absent[0]}, but the ranks are 0 to {world_size - 1}; remove it"])


def gradient_accumulation_steps(config: Config, data_parallel_size: int) -> int:
    """Micro-batches per optimizer step on each rank. Raises ConfigError when that is no whole number."""
    micro, batch = config.train.micro_batch_size, config.train.global_batch_size
    per_round = micro * data_parallel_size
    if batch % per_round:
        above = _next_multiple(batch, per_round)
        choices = f"{above - per_round} or {above}" if above > per_round else f"{above}"
        raise ConfigError(
            [
                f"train.global_batch_size={batch} is not divisible by train.micro_batch_size={micro} times "
                f"{data_parallel_size} data-parallel ranks = {per_round}; set train.global_batch_size to {choices}"
            ]
        )
    return batch // per_round


def _unread(section: Section, chooser: str, read_by: Mapping[str, tuple[str, ...]]) -> Problems:
    """An option that the chosen kind ignores may only keep its default: nothing asked for is silently dropped."""
    choice = getattr(section, chooser)
    for option, kinds in read_by.items():
        if choice not in kinds and getattr(section, option) != type(section).model_fields[option].default:
            yield option, f"is not read with {chooser}={choice}, only with {' | '.join(kinds)}; remove it"


def _within(prefix: str, problems: Problems) -> Problems:
    return ((f"{prefix}.{key}", message) for key, message in problems)


def _ropes(model: ModelConfig) -> list[tuple[str, RopeConfig]]:
    """The rotary embeddings of the kinds of layer that the pattern has (both, where the pattern is wrong)."""
    try:
        symbols = set(pattern_symbols(model.pattern, model.num_layers))
    except ValueError:
        symbols = {"G", "L"}
    ropes = [("rope_global", model.rope_global)] if "G" in symbols else []
    return ropes + ([("rope_local", model.rope_local)] if symbols != {"G"} else [])


def _head_size_is_whole(model: ModelConfig) -> bool:
    return model.head_dim is not None or model.hidden_size % model.num_attention_heads == 0


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of
