"""Every configuration key, with its type, default and meaning. Imports no torch.

The text under a key is its documentation: `pretrain_zebra.py --help` prints it.
Checks of one key stand in its type; checks that span keys stand in `checks.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from megazebra.pattern import AttentionSpec, expand_pattern

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
MAX_LAYERS = 10_000  # each has a specification of its own: a slip of the finger would fill the memory
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class RunConfig(Section):
    dir: str = "runs/default"
    """Folder of the run: resolved config, metrics, plot, checkpoints."""


class RopeConfig(Section):
    enabled: bool = True
    """False: these layers have no position embedding (NoPE)."""
    theta: Positive = 10000.0
    """Base of the rotary frequencies, theta^(-2i/head_dim)."""
    scaling: Literal["none", "linear", "ntk", "abf", "yarn", "llama3", "longrope"] = "none"
    """How the frequencies are stretched beyond the original length: none; linear (position
    interpolation, Chen et al. 2023); ntk (NTK-aware theta); abf (a new theta, Xiong et al. 2023);
    yarn (Peng et al. 2023); llama3 (by wavelength); longrope (a factor per frequency, Ding et al. 2024)."""
    factor: Annotated[float, Field(ge=1)] = 1.0
    """Extension s of the scaled kinds: new length / original length (not read by abf)."""
    original_max_position_embeddings: Count | None = None
    """Length the unscaled model was trained for; needed by yarn, llama3 and longrope."""
    abf_theta: Positive | None = None
    """The base that replaces theta under abf."""
    beta_fast: Positive = 32.0
    """YaRN: dimensions turning more often than this over the original length are left as they are."""
    beta_slow: Positive = 1.0
    """YaRN: dimensions turning less often than this are fully interpolated."""
    attention_factor: Positive | None = None
    """Factor on cos and sin; null takes the kind's own (yarn: 0.1 ln s + 1, longrope:
    sqrt(1 + ln s / ln original length))."""
    low_freq_factor: Positive = 1.0
    """llama3: wavelengths above original length / this are divided by the factor."""
    high_freq_factor: Positive = 4.0
    """llama3: wavelengths below original length / this are left as they are."""
    short_factor: tuple[Positive, ...] | None = None
    """longrope: head_dim/2 divisors used while the sequence fits the original length."""
    long_factor: tuple[Positive, ...] | None = None
    """longrope: head_dim/2 divisors used beyond the original length."""


class ModelConfig(Section):
    num_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = 32
    """Transformer blocks."""
    hidden_size: Count = 4096
    """Width of the residual stream."""
    ffn_hidden_size: Count = 11008
    """Width of the SwiGLU feed-forward layer."""
    num_attention_heads: Count = 32
    """Query heads."""
    num_kv_heads: Count | None = None
    """Key/value heads (grouped-query attention); null: as many as query heads."""
    head_dim: Count | None = None
    """Width of a head; null: hidden_size / num_attention_heads."""
    vocab_size: Count = 32000
    """Tokens in the vocabulary. Padded inside to a multiple of parallel.tensor; the padding is never predicted."""
    max_position_embeddings: Count = 4096
    """Longest sequence the position embedding is configured for; data.seq_len may not exceed it."""
    pattern: str | tuple[str | int, ...] = "GLLL"
    """Which layers attend globally (G) and which within the window (L). A string is tiled over the
    layers; a list names every layer and may give a layer a window of its own: [G, 128, 512, L]."""
    window: Count = 512
    """Keys a query of a local layer sees, itself included."""
    rope_global: RopeConfig = RopeConfig()
    """Rotary embedding of global layers."""
    rope_local: RopeConfig = RopeConfig()
    """Rotary embedding of local layers (rarely scaled: they never see a distance beyond the window)."""
    attention_sinks: Literal["none", "all", "local"] = "none"
    """Layers whose heads have a learned sink logit in the softmax (gpt-oss)."""
    attention_softcap: Positive | None = None
    """Attention logits become c * tanh(logit / c) (Gemma 2)."""
    final_logit_softcap: Positive | None = None
    """The same for the logits over the vocabulary."""
    qk_norm: bool = False
    """RMSNorm of every query and key head before RoPE (Qwen3)."""
    attention_bias: bool = False
    """Biases on the query, key, value and output projections."""
    mlp_bias: bool = False
    """Biases on the gate, up and down projections."""
    tie_word_embeddings: bool = False
    """The output layer shares the embedding's weight."""
    rms_norm_eps: Positive = 1e-5
    """Added to the mean square in RMSNorm."""
    init_std: Positive = 0.02
    """Standard deviation of the initial weights; output projections get init_std / sqrt(2 num_layers)."""

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """One AttentionSpec per layer. Raises ValueError when the pattern does not fit the layers."""
        global_ = AttentionSpec(
            window=None,
            rope=self.rope_global,
            sinks=self.attention_sinks == "all",
            softcap=self.attention_softcap,
        )
        local = AttentionSpec(
            window=self.window,
            rope=self.rope_local,
            sinks=self.attention_sinks in ("all", "local"),
            softcap=self.attention_softcap,
        )
        return expand_pattern(self.pattern, self.num_layers, local, global_)


class ParallelConfig(Section):
    tensor: Count = 1
    """Tensor-parallel size: ranks that share every layer's weights."""
    context: Count = 1
    """Context-parallel size: ranks that share every sequence, each with a contiguous part. Sequences are padded inside
    to a multiple of it (times parallel.tensor with sequence_parallel)."""
    context_local: Literal["auto", "halo", "ulysses", "allgather"] = "auto"
    """How local layers reach keys on other ranks: halo fetches the window - 1 keys it reads from the ranks to the left;
    ulysses swaps sequence for heads; allgather fetches all keys. auto: whatever receives least."""
    context_global: Literal["auto", "ulysses", "allgather"] = "auto"
    """The same for global layers. ulysses: parallel.context has to divide the query heads of a tensor-parallel rank."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks along the sequence (Korthikanti et al. 2022)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO, sharded over data- and context-parallel ranks: 0 nothing, 1 optimizer states, 2 also gradients,
    3 also parameters."""
    timeout_s: Positive = 600.0
    """A collective that waits longer than this ends the run (seconds)."""


class GuardConfig(Section):
    enabled: bool = True
    """Skip the update of a step whose loss or gradient norm is not finite or a spike."""
    sigma: Positive = 6.0
    """A spike: more than this many standard deviations above the mean of recent steps."""
    history: Annotated[int, Field(ge=16)] = 128
    """Recent steps the mean and deviation are taken over (fewer than 16 have no meaningful deviation);
    spikes are looked for once half of them are there."""
    max_consecutive_skips: Count = 5
    """Abort after this many skipped steps in a row."""


class TrainConfig(Section):
    steps: Count = 1000
    """Optimizer steps of the whole run."""
    micro_batch_size: Count = 1
    """Sequences per forward pass on one data-parallel rank."""
    global_batch_size: Count = 8
    """Sequences per optimizer step over all ranks; gradient accumulation follows."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1234
    """Seed of the initial weights and the data order."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights and accumulates gradients in fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in backward: selective repeats element-wise work only (the SwiGLU
    product), full repeats each block."""
    attention_backend: str = "auto"
    """Attention kernels: auto, or a name from megazebra/attention (simd, blocked, flash, flex, triton, reference)."""
    compile: bool = False
    """Fuse RMSNorm, RoPE and SwiGLU's product with torch.compile: on a CPU they take about half the time then, after
    seconds of compiling at the first step. Needs a C++ compiler on CPUs, Triton on GPUs (not yet tried there)."""
    hang_timeout_s: PositiveOrZero | None = None
    """End the run when a step takes longer than this (seconds), after every rank has written its Python stacks into
    the run folder's `stacks`; reading and writing checkpoints may take five times as long. null: 0.8 of
    parallel.timeout_s, after which collectives give up by themselves and leave no stacks. 0: never."""
    loss_chunk: Count = 1024
    """Tokens per chunk of the output layer and cross-entropy; the chunk's logits are all that exist of them."""
    guard: GuardConfig = GuardConfig()
    """Loss spikes and NaN."""


class OptimizerConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    """Update rule."""
    lr: Positive = 3e-4
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: Positive = 1e-8
    """AdamW's denominator offset."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """SGD's momentum."""
    weight_decay: PositiveOrZero = 0.1
    """Decoupled weight decay of matrices; norms, biases and sinks have none."""
    grad_clip: PositiveOrZero = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    state: Literal["carry", "reset"] = "carry"
    """The moments when a stage begins: those the stage before left, or none. Read in stages after the first."""


class ScheduleConfig(Section):
    kind: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Learning rate after warmup: constant, cosine or linear decay to the end, or wsd (warmup,
    stable, then linear decay over the last decay_steps; Hu et al. 2024)."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warmup from zero."""
    decay_steps: Count | None = None
    """wsd: length of the last stage; null: a tenth of train.steps."""
    min_lr_ratio: Share = 0.1
    """Learning rate at the end as a share of optimizer.lr."""


class SourceConfig(Section):
    path: str
    """Prefix of the source's corpus."""
    weight: Positive | None = None
    """Share of the samples that come from this source, as a ratio to the other weights; null for all sources:
    in proportion to their tokens."""
    min_document_tokens: CountOrZero = 0
    """Take only documents of at least this many tokens."""
    max_document_tokens: Count | None = None
    """Take only documents of at most this many tokens."""

    @property
    def filters(self) -> bool:
        """Whether the bounds leave any document out: those without a token give nothing anyway."""
        return self.min_document_tokens > 1 or self.max_document_tokens is not None


class DataConfig(Section):
    path: str | None = None
    """Prefix of the training corpus: `path`.bin, `path`.idx and `path`.meta.json, as
    tools/preprocess_data.py writes them. For more than one corpus, or a filter, see sources."""
    sources: dict[str, SourceConfig] = {}
    """Training corpora by name, instead of path; a corpus may appear twice, such as once for its long documents."""
    validation_path: str | None = None
    """Prefix of the held-out corpus."""
    validation_sources: dict[str, str] = {}
    """Prefixes of held-out corpora by name, instead of validation_path: each gets a loss of its own. With neither,
    there is no validation."""
    seq_len: Count = 4096
    """Tokens per training sequence."""
    document_mask: bool = True
    """Attention and positions stop at document boundaries; false: documents of a sequence see each other."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How text fills sequences: concatenate lays documents end to end and cuts every seq_len tokens; best_fit cuts
    only documents longer than that and fills sequences with whole ones (Ding et al. 2024), a little padding
    remains. Conversations are always packed whole; held-out text is always concatenated."""
    index_compat: Literal["none", "megatron"] = "none"
    """megatron: samples in exactly the order Megatron-LM gives them for train.seed, megatron_split and this run's
    number of samples, to go on with a run begun there; one corpus only. The order changes with train.steps, as it
    does in Megatron."""
    megatron_split: tuple[PositiveOrZero, ...] | None = None
    """Megatron's --split of the corpus, such as [969, 30, 1], where it had one: training takes the first share.
    Read with index_compat=megatron."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Instruction corpora: which tokens are learned, the assistant's or all. Text is always learned whole."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """Conversations longer than seq_len: refuse to start, leave them out, or cut them there."""
    balance: bool = True
    """Deal the samples of a step to data-parallel ranks by the attention they cost, where sequences are long enough
    for it to matter; false: in their order."""


class ValidationConfig(Section):
    interval: CountOrZero = 0
    """Steps between validations; 0: only after the last step."""
    samples: Count = 64
    """Sequences of one validation of a held-out corpus, always the same ones."""


class EvaluationConfig(Section):
    tasks: tuple[Literal["positions", "contexts", "passkey", "kv", "copy", "ruler"], ...] = ()
    """What is evaluated beside the validation loss, as tools/evaluate.py does: the loss of held-out text by position
    and behind contexts of different lengths, recall by depth and length, a RULER-style set."""
    interval: CountOrZero = 0
    """Steps between evaluations; 0: only after the last step."""
    lengths: tuple[Count, ...] | None = None
    """Tokens of their sequences; null: data.seq_len."""
    depths: tuple[Share, ...] = (0.0, 0.5, 1.0)
    """Where in the sequence the answers of passkey, kv and copy stand, from 0 (its beginning) to 1."""
    samples: Count = 16
    """Sequences of each task, length and depth, always the same ones."""
    tokenizer: str | None = None
    """A tokenizer.json, for questions in words (ruler has no others); null: passkey, kv and copy are made of bare token
    ids, which only a model trained on such can answer."""


class CheckpointConfig(Section):
    init_from: str | None = None
    """Begin with these weights in place of random ones: a model folder (tools/convert_hf.py import,
    tools/merge_checkpoint.py) or a training checkpoint under any layout. Not read when the run resumes."""
    interval: CountOrZero = 0
    """Steps between checkpoints; 0: only after the last step."""
    keep_last: Count = 2
    """Checkpoints kept; older ones are deleted after a newer one is complete."""
    keep_every: CountOrZero = 0
    """Checkpoints of every so many steps that are kept for good; 0: none."""
    asynchronous: bool = True
    """Copy the state and go on training while it is written; false: wait until it is on the disk. Either way the copy
    takes as much host memory as the rank's share of weights and moments."""
    on_damage: Literal["stop", "go_back"] = "stop"
    """A newest checkpoint whose files are damaged or missing: stop and name the file, or resume from an older one."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the run folder's newest checkpoint where there is one; never refuses a run folder in use."""


class WandbConfig(Section):
    enabled: bool = False
    """Log to Weights & Biases from rank 0 (extra `wandb`); offline where there is no key or no network."""
    project: str = "megazebra"
    """Project name."""
    name: str | None = None
    """Name of the run; null: the run folder's name."""


class PrometheusConfig(Section):
    enabled: bool = False
    """Serve the latest metrics to Prometheus from rank 0, under http://HOST:PORT/metrics."""
    host: str = "127.0.0.1"
    """Address to listen at. Loopback, unless expose is true."""
    port: Annotated[int, Field(ge=1, le=65535)] = 9400
    """Port to listen at."""
    expose: bool = False
    """Allow an address that other machines reach: whoever does reads the metrics, and no password is asked for."""


class LoggingConfig(Section):
    progress: Literal["auto", "bar", "lines"] = "auto"
    """auto: a bar on a terminal, one line a step otherwise."""
    interval: Count = 1
    """Steps between printed lines (metrics.jsonl has every step)."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder (extra `tensorboard`)."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    prometheus: PrometheusConfig = PrometheusConfig()
    """Prometheus endpoint."""


class ProfileConfig(Section):
    steps: Annotated[str, Field(pattern=r"^[0-9]+:[0-9]+$")] | None = None
    """Record these steps with torch's profiler, the first and the last of them, such as '10:12': the run folder's
    `profile` gets a trace for Perfetto and a table of the time by part of the model, which is printed too."""
    ranks: tuple[CountOrZero, ...] = (0,)
    """Ranks that record."""

    @property
    def window(self) -> tuple[int, int] | None:
        """First and last step."""
        if self.steps is None:
            return None
        first, last = map(int, self.steps.split(":"))
        return first, last


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()
    stages: dict[str, dict[str, Any]] = {}
    """Stages that follow each other, by name: what each sets of the sections model, parallel, train, optimizer,
    schedule, data, validation and evaluation in place of the values above, such as {long: {data: {seq_len: 16384},
    train: {steps: 500}}}. A stage has its own steps, learning rate schedule and samples, and goes on with the weights
    of the one before. train.seed grows by one from stage to stage where none sets it, so that a corpus is not repeated
    in the same order."""
