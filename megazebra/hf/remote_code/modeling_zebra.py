"""Zebra for transformers: a Llama-style decoder in which each layer attends globally or within a window of its own.

Attention is exact and plain: its memory grows with the product of queries and keys, in layers with sinks or a
soft-cap for every head. For training at length use the trainer that wrote this model.

Legend: B batch, S queries, T keys (the cached ones and the queries' own), H query heads, G key/value heads, D head dim,
E width of the residual stream, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_zebra import ZebraConfig

# Outputs call it so too; transformers 5 renamed it.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

CosSin = tuple[Tensor, Tensor] | None


class ZebraAttention(nn.Module):
    """Grouped-query attention of one layer, within its window where it has one."""

    def __init__(self, config: ZebraConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.window = config.layer_windows[layer_idx]
        self.softcap = config.attn_logit_softcapping
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        has_sinks = config.attention_sinks == "all" or (config.attention_sinks == "local" and self.window is not None)
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads)) if has_sinks else None

    def forward(self, x_BSE: Tensor, rope: CosSin, seen: Tensor, cache: Cache | None) -> Tensor:
        q_BSHD = self.q_proj(x_BSE).unflatten(-1, (-1, self.head_dim))
        k_BSGD = self.k_proj(x_BSE).unflatten(-1, (-1, self.head_dim))
        v_BSGD = self.v_proj(x_BSE).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHD, k_BSGD = self.q_norm(q_BSHD), self.k_norm(k_BSGD)
        q_BHSD = rotated(q_BSHD, rope).transpose(1, 2)
        k_BGTD = rotated(k_BSGD, rope).transpose(1, 2)
        v_BGTD = v_BSGD.transpose(1, 2)
        if cache is not None:
            k_BGTD, v_BGTD = cache.update(k_BGTD, v_BGTD, self.layer_idx)
        heads_per_group = q_BHSD.shape[1] // k_BGTD.shape[1]
        k_BHTD = k_BGTD.repeat_interleave(heads_per_group, dim=1)
        v_BHTD = v_BGTD.repeat_interleave(heads_per_group, dim=1)
        out_BHSD = attend(q_BHSD, k_BHTD, v_BHTD, seen[..., -k_BHTD.shape[2] :], self.sinks, self.softcap)
        return self.o_proj(out_BHSD.transpose(1, 2).flatten(2))


class ZebraMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ZebraConfig) -> None:
        super().__init__()
        size, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, width, bias=bias)
        self.up_proj = nn.Linear(size, width, bias=bias)
        self.down_proj = nn.Linear(width, size, bias=bias)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BSE)) * self.up_proj(x_BSE))


class ZebraDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ZebraConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = ZebraAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = ZebraMLP(config)

    def forward(self, x_BSE: Tensor, rope: CosSin, seen: Tensor, cache: Cache | None) -> Tensor:
        x_BSE = x_BSE + self.self_attn(self.input_layernorm(x_BSE), rope, seen, cache)
        return x_BSE + self.mlp(self.post_attention_layernorm(x_BSE))


class ZebraPreTrainedModel(PreTrainedModel):
    config_class = ZebraConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ZebraDecoderLayer"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZebraAttention) and module.sinks is not None:
            nn.init.zeros_(module.sinks)


class ZebraModel(ZebraPreTrainedModel):
    """Tokens to final hidden states [B, S, E]."""

    def __init__(self, config: ZebraConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ZebraDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last norm.

        attention_mask: [B, cached + S], 0 at padding. position_ids: [B, S], counted from each row's first token that is
        no padding where None; given without attention_mask, a position that does not follow the one before it begins a
        document, which sees nothing before it. cache, past_key_values: two names of one argument, a cache that grows.
        Raises ValueError for another kind of mask or cache, a cache under gradient checkpointing, and where longrope
        would change within a cached sequence.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BSE = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if recomputes and cache is not None:
            raise ValueError("recomputed layers would add their keys twice; pass no cache, or call model.eval()")
        if use_cache and cache is None and not recomputes:
            cache = DynamicCache(config=self.config)
        B, S = x_BSE.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        check_mask_and_cache(attention_mask, (B, past + S), cache)
        positions_BS = own_positions(attention_mask, past, S, x_BSE.device) if position_ids is None else position_ids

        # Layers that are alike share one table and one mask.
        config = self.config
        tables = {
            is_local: cos_sin(rope, config.head_dim, positions_BS, past)
            for is_local, rope in ((False, config.global_rope), (True, config.local_rope))
        }
        packed = position_ids is not None and attention_mask is None and past == 0
        documents = documents_of(positions_BS) if packed else None
        seen = {
            window: visible(S, past + S, window, attention_mask, documents, x_BSE.device)
            for window in {*config.layer_windows}
        }
        for layer, window in zip(self.layers, config.layer_windows, strict=True):
            x_BSE = layer(x_BSE, tables[window is not None], seen[window], cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BSE), **{CACHE: cache})


class ZebraForCausalLM(ZebraPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own form)

    def __init__(self, config: ZebraConfig) -> None:
        super().__init__(config)
        self.model = ZebraModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V], and with `labels` (not shifted, -100 where not counted) the mean loss; else as ZebraModel.

        logits_to_keep: of the last so many positions only, or of those that a tensor lists; 0: all.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache, **others
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, kept])
        if (softcap := self.config.final_logit_softcapping) is not None:
            logits_BSV = softcap * torch.tanh(logits_BSV / softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BSV, labels=labels, vocab_size=self.config.vocab_size, **others)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BSV, **{CACHE: getattr(outputs, CACHE)})


def check_mask_and_cache(attention_mask: Tensor | None, shape: tuple[int, int], cache: Cache | None) -> None:
    if getattr(cache, "is_compileable", False):
        raise ValueError("static caches are not supported; leave cache_implementation at its default, a growing cache")
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; give one of {list(shape)} (batch, cached and new "
            "tokens), 0 at padding"
        )


def own_positions(attention_mask: Tensor | None, past: int, S: int, device: torch.device) -> Tensor:
    """Positions [B, S] of the new tokens, counted from each row's first token that is no padding."""
    if attention_mask is None:
        return torch.arange(past, past + S, device=device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -S:].to(device)


def documents_of(positions_BS: Tensor) -> Tensor:
    """The number of the document that each token of a packed row belongs to, [B, S]."""
    return F.pad((positions_BS.diff(dim=-1) != 1).cumsum(-1), (1, 0))


def visible(
    S: int,
    T: int,
    window: int | None,
    attention_mask: Tensor | None,
    documents_BS: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which keys each query sees: bool [B, 1, S, T], B = 1 where all rows are alike; the last key is the last query's.

    Padding sees itself, so that no row of a softmax is empty.
    """
    own_key_S1 = torch.arange(T - S, T, device=device)[:, None]
    key_T = torch.arange(T, device=device)
    seen = (key_T <= own_key_S1)[None, None]
    if window is not None:
        seen = seen & (key_T > own_key_S1 - window)
    if attention_mask is not None:
        seen = seen & (attention_mask.to(device)[:, None, None, :].bool() | (key_T == own_key_S1))
    if documents_BS is not None:
        seen = seen & (documents_BS[:, None, :, None] == documents_BS[:, None, None, :])
    return seen


def attend(
    q_BHSD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, seen: Tensor, sinks_H: Tensor | None, softcap: float | None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys that are seen; a sink takes weight from them and gives no value."""
    if sinks_H is None and softcap is None:
        return F.scaled_dot_product_attention(q_BHSD, k_BHTD, v_BHTD, attn_mask=seen)
    logits_BHST = (q_BHSD @ k_BHTD.transpose(2, 3)).float() / math.sqrt(q_BHSD.shape[-1])
    if softcap is not None:
        logits_BHST = softcap * torch.tanh(logits_BHST / softcap)
    logits_BHST = logits_BHST.masked_fill(~seen, -math.inf)
    if sinks_H is not None:
        sink_BHS1 = sinks_H.float().view(1, -1, 1, 1).expand(*logits_BHST.shape[:3], 1)
        logits_BHST = torch.cat([logits_BHST, sink_BHS1], dim=-1)
    weights_BHST = logits_BHST.softmax(dim=-1)[..., : k_BHTD.shape[2]]
    return weights_BHST.to(v_BHTD.dtype) @ v_BHTD


def cos_sin(rope: dict[str, Any] | None, head_dim: int, positions_BS: Tensor, past: int) -> CosSin:
    """cos and sin [B, S, 1, D/2] in float32; None without a rotary embedding.

    Angles are formed in float64 where the device has it: at position 100,000 a float32 product is off by 0.004 radians.
    """
    if rope is None:
        return None
    device = positions_BS.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    exponents = torch.arange(0, head_dim, 2, dtype=wide, device=device) / head_dim
    frequencies, factor = stretched(rope["rope_theta"] ** -exponents, rope, head_dim, positions_BS, past)
    angles = positions_BS[..., None].to(wide) * frequencies
    return (angles.cos() * factor).float()[:, :, None], (angles.sin() * factor).float()[:, :, None]


def stretched(
    frequencies: Tensor, rope: dict[str, Any], head_dim: int, positions_BS: Tensor, past: int
) -> tuple[Tensor, float]:
    """Frequencies beyond the original length, [D/2] or one row for each sequence, and the factor on cos and sin.

    linear: Chen et al. 2023. llama3: Llama 3.1's by wavelength. yarn: Peng et al. 2023, section 3.4. longrope: Ding et
    al. 2024, whose second list of factors serves sequences longer than the original.
    """
    kind, s = rope["rope_type"], rope.get("factor", 1.0)
    original: Any = rope.get("original_max_position_embeddings")
    factor = 1.0
    if kind == "linear":
        frequencies = frequencies / s
    elif kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * frequencies / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - blend) * frequencies / s + blend * frequencies
    elif kind == "yarn":
        kept = 1 - ramp(rope, head_dim, original, frequencies)
        frequencies = frequencies / s * (1 - kept) + frequencies * kept
        factor = 0.1 * math.log(s) + 1.0
    elif kind == "longrope":
        length_B1 = positions_BS.max(dim=-1, keepdim=True).values + 1
        is_long_B1 = length_B1 > original
        if past and (is_long_B1 & (positions_BS[:, :1] <= original)).any():
            raise ValueError(
                f"longrope has other frequencies beyond {original} tokens, and the cached keys have those up to there; "
                "go on without the cache: generate(..., use_cache=False)"
            )
        short, long = (frequencies / frequencies.new_tensor(rope[f"{name}_factor"]) for name in ("short", "long"))
        frequencies = torch.where(is_long_B1[..., None], long, short)
        factor = math.sqrt(1 + math.log(s) / math.log(original)) if s > 1 else 1.0
    elif kind != "default":
        raise ValueError(f"rope_type={kind!r} must be default, linear, llama3, yarn or longrope")
    return frequencies, rope.get("attention_factor") or factor


def ramp(rope: dict[str, Any], head_dim: int, original: int, frequencies: Tensor) -> Tensor:
    """YaRN's share of interpolation for each frequency: 0 for fast ones, 1 for slow ones."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low = max(math.floor(dimension(rope["beta_fast"])), 0)
    high = min(math.ceil(dimension(rope["beta_slow"])), head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=frequencies.dtype, device=frequencies.device)
    return ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)


def rotated(x_BSHD: Tensor, rope: CosSin) -> Tensor:
    """Dimensions i and i + D/2 of every head turned by their angle; arithmetic in float32, rounded once."""
    if rope is None:
        return x_BSHD
    cos, sin = rope
    first, second = x_BSHD.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSHD.dtype)
