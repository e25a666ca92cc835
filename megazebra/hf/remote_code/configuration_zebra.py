"""Configuration of Zebra: a Llama-style decoder in which each layer attends globally or within a window of its own."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

FULL, SLIDING = "full_attention", "sliding_attention"


class ZebraConfig(PretrainedConfig):
    """Fields that transformers' Llama has mean the same here; these are Zebra's.

    layer_windows: for every layer the number of keys a query sees, itself included; None where it sees all before it.
    global_rope, local_rope: rotary embedding of layers without and with a window; None for no position embedding.
        `rope_type` is default, linear, llama3, yarn or longrope, beside `rope_theta` and the kind's own options.
    attention_sinks: 'none', 'all' or 'local': layers whose heads have a learned logit that joins the softmax without a
        value (gpt-oss).
    attn_logit_softcapping, final_logit_softcapping: logits s become c * tanh(s / c) (Gemma 2); None leaves them.
    qk_norm: RMSNorm of every query and key head before the rotary embedding (Qwen3).

    `layer_types` and `sliding_window` follow from `layer_windows`; transformers reads them where it makes a cache.
    """

    model_type = "zebra"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers' own form)

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 4096,
        layer_windows: list[int | None] | None = None,
        global_rope: dict[str, Any] | None = None,
        local_rope: dict[str, Any] | None = None,
        attention_sinks: str = "none",
        attn_logit_softcapping: float | None = None,
        final_logit_softcapping: float | None = None,
        qk_norm: bool = False,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **others: Any,
    ) -> None:
        layer_windows = layer_windows or [None] * num_hidden_layers
        if len(layer_windows) != num_hidden_layers:
            raise ValueError(f"layer_windows={layer_windows} must have num_hidden_layers={num_hidden_layers} entries")
        if attention_sinks not in ("none", "all", "local"):
            raise ValueError(f"attention_sinks={attention_sinks!r} must be none, all or local")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.layer_windows = layer_windows
        self.layer_types = [FULL if window is None else SLIDING for window in layer_windows]
        # One for all layers: a cache of the widest window serves the narrower ones too, whose masks cut it.
        self.sliding_window = max((window for window in layer_windows if window is not None), default=None)
        self.global_rope = global_rope
        self.local_rope = local_rope
        self.attention_sinks = attention_sinks
        self.attn_logit_softcapping = attn_logit_softcapping
        self.final_logit_softcapping = final_logit_softcapping
        self.qk_norm = qk_norm
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        for derived in ("layer_types", "sliding_window"):
            others.pop(derived, None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)
