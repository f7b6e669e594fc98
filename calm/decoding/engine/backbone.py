"""The Llama backbone with a preallocated KV cache: prefill, then one chunk a step.

When it reads one chunk, `transformers.LlamaModel` spends more time between its operations than in
them. `CachedBackbone` calls the same modules in the same order, but computes once per call what all
layers share: masks, rotations, cache columns. It holds no copy of a weight, so that it always reads
the model as it is now. Where kernels are chosen, a decode step of few sequences runs `fused_layer`
instead of the modules.

Shapes: B sequences, Q chunks of this call, P chunks of a prompt, H hidden size, D head size.
"""

from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from calm.decoding.engine.fused_layers import are_fused, fused_layer, is_plain
from calm.decoding.engine.kv_cache import KVCache
from calm.errors import UserError

__all__ = ["CachedBackbone"]

# What attends with a mask on a GPU, the second for head sizes that the first does not take. Left to
# itself torch may choose cuDNN, by version and device, which plans anew for every length.
WITH_MASK = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class _Positions(NamedTuple):
    """Where the chunks of one call go in the cache, and which columns they attend to."""

    rotation: Tensor  # [B or 1, Q, 1, D/2] complex
    columns: slice | Tensor  # to write: of all sequences alike, or one column of each, [B]
    length: int  # columns that attention reads
    mask: Tensor | None  # 0 or -inf, [B, 1, 1, length]
    is_causal: bool


class CachedBackbone:
    """A backbone that reads chunk after chunk into a `KVCache`.

    Args:
        backbone: a `LlamaModel`, in any of its configurations.

    Raises:
        UserError: its layers are not Llama's, or their weights are split among processes.
    """

    def __init__(self, backbone: LlamaModel) -> None:
        for layer in backbone.layers:
            if not isinstance(layer, LlamaDecoderLayer):
                raise UserError(f"generate reads Llama layers, got {type(layer).__name__}")
            weight = getattr(layer.self_attn.q_proj, "weight", None)  # an adapter may have none
            if hasattr(weight, "full_tensor"):  # a DTensor
                raise UserError(
                    "generate reads whole weights, and these are split among processes: call it "
                    "inside of `with calm.training.sharding.weights.whole_weights(model)`"
                )
        config = backbone.config
        self.backbone = backbone
        self.head_dim: int = cast(Any, backbone.layers[0]).self_attn.head_dim
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads or self.num_heads

    @property
    def dtype(self) -> torch.dtype:
        """Of keys, values and hidden states."""
        return cast(Tensor, self.backbone.norm.weight).dtype

    @property
    def device(self) -> torch.device:
        """Where the backbone runs."""
        return cast(Tensor, self.backbone.norm.weight).device

    @cached_property
    def _is_plain(self) -> bool:
        """Whether layers can be fused; what changes a layer later is not seen here."""
        return all(is_plain(layer) for layer in self.backbone.layers)

    def allocate(self, batch_size: int, capacity: int, *, is_fixed: bool = False) -> KVCache:
        """A cache of `capacity` chunks, see `KVCache`."""
        return KVCache.allocate(
            num_layers=len(self.backbone.layers),
            batch_size=batch_size,
            num_heads=self.num_kv_heads,
            capacity=capacity,
            head_dim=self.head_dim,
            device=self.device,
            dtype=self.dtype,
            rotations=self._rotations(capacity),
            is_fixed=is_fixed,
        )

    def _rotations(self, capacity: int) -> Tensor:
        """The model's own angles of each position, as unit complex numbers ``[capacity, D/2]``.

        One call for the whole cache: where angles depend on the length of the text (`rope_type`
        "dynamic" or "longrope"), all positions get those of the cache's length.
        """
        positions = torch.arange(capacity, device=self.device)[None]
        like = torch.empty((), dtype=torch.float32, device=self.device)
        cos, sin = self.backbone.rotary_emb(like, positions)
        return torch.complex(cos, sin)[0, :, : self.head_dim // 2].contiguous()

    def prefill(self, embeds: Tensor, lengths: list[int], cache: KVCache) -> Tensor:
        """Read prompts of any lengths, which begin in the first column.

        Args:
            embeds: ``[B, P, H]``; after a sequence's end they may hold any finite numbers.
            lengths: chunks of each sequence, 1 to P, the longest P.
            cache: its contents are overwritten.

        Returns: the hidden state after each prompt's last chunk, ``[B, H]``.
        """
        cache.begin(lengths)
        columns = slice(0, embeds.shape[1])
        rotation = cache.rotations[None, columns, None]
        positions = _Positions(rotation, columns, embeds.shape[1], None, is_causal=True)
        hidden = self._run(embeds, cache, positions)
        if not cache.is_ragged:
            return self.backbone.norm(hidden[:, -1])
        rows = torch.arange(len(lengths), device=embeds.device)
        return self.backbone.norm(hidden[rows, cache.lengths - 1])

    def decode_step(self, embeds: Tensor, cache: KVCache) -> Tensor:
        """Read one more chunk.

        Args:
            embeds: ``[B, 1, H]``.
            cache: its next column is written; `decode_step.advance` counts it.

        Returns: ``[B, H]``. With a fixed cache all shapes are fixed and nothing synchronises.
        """
        cache.reserve(1)
        if are_fused(embeds[:, 0]) and self._is_plain:
            return self._run_fused(embeds[:, 0], cache)
        positions = self._next_positions(cache)
        is_pinned = positions.mask is not None and self.device.type == "cuda"
        with sdpa_kernel(WITH_MASK) if is_pinned else nullcontext():
            hidden = self._run(embeds, cache, positions)
        return self.backbone.norm(hidden[:, -1])

    def _run_fused(self, hidden: Tensor, cache: KVCache) -> Tensor:
        """All layers on ``[B, H]``, fused; the state, normalised."""
        for layer, keys, values in zip(self.backbone.layers, cache.keys, cache.values, strict=True):
            hidden = fused_layer(layer, hidden, keys, values, cache)
        return self.backbone.norm(hidden)

    def _next_positions(self, cache: KVCache) -> _Positions:
        """The next column of each sequence; attention reads what is filled, or all of it masked."""
        column = cache.length
        if not (cache.is_fixed or cache.is_ragged):
            rotation = cache.rotations[column].view(1, 1, 1, -1)
            columns = slice(column, column + 1)
            return _Positions(rotation, columns, column + 1, None, is_causal=False)
        length = cache.capacity if cache.is_fixed else column + 1
        rotation = cache.rotations[cache.lengths][:, None, None]
        every = torch.arange(length, device=cache.lengths.device)
        mask = self._additive(every <= cache.lengths[:, None, None, None])
        return _Positions(rotation, cache.lengths, length, mask, is_causal=False)

    def _additive(self, mask: Tensor) -> Tensor:
        """0 where `mask` is true, else -inf; attention would convert it so in every layer."""
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, -torch.inf)

    def _run(self, hidden: Tensor, cache: KVCache, positions: _Positions) -> Tensor:
        """All layers on ``[B, Q, H]``; states before the last norm."""
        layers = cast(Any, self.backbone.layers)
        for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
            normed = layer.input_layernorm(hidden)
            hidden = hidden + self._attend(layer.self_attn, normed, keys, values, positions)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden

    def _attend(
        self, attention: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor, at: _Positions
    ) -> Tensor:
        """Attention of ``[B, Q, H]`` over the cache ``[B, heads, capacity, D]`` of one layer."""
        module, (batch, chunks, _) = cast(Any, attention), hidden.shape
        query_key = torch.cat([module.q_proj(hidden), module.k_proj(hidden)], dim=-1)
        rotated = _rotate(query_key.unflatten(-1, (-1, self.head_dim)), at.rotation)
        query, key = rotated.transpose(1, 2).split((self.num_heads, self.num_kv_heads), dim=1)
        value = module.v_proj(hidden).unflatten(-1, (-1, self.head_dim))
        _write(keys, at.columns, key)
        _write(values, at.columns, value.transpose(1, 2))
        if chunks == 1:  # heads that share keys become rows of one query
            query = query.reshape(batch, self.num_kv_heads, -1, self.head_dim)
        attended = F.scaled_dot_product_attention(
            query,
            keys[:, :, : at.length],
            values[:, :, : at.length],
            attn_mask=at.mask,
            is_causal=at.is_causal,
            enable_gqa=query.shape[1] != self.num_kv_heads,
        )
        if chunks > 1:
            attended = attended.transpose(1, 2)
        return module.o_proj(attended.reshape(batch, chunks, -1))


def _rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Rotate elements i and i + D/2 of ``[B, Q, heads, D]`` by the angles of their position."""
    real, imaginary = heads.to(torch.float32).chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * rotation
    return torch.cat([turned.real, turned.imag], dim=-1).to(heads.dtype)


def _write(cache: Tensor, columns: slice | Tensor, fresh: Tensor) -> None:
    """Put ``[B, heads, Q, D]`` into these columns of the cache."""
    if isinstance(columns, slice):
        cache[:, :, columns] = fresh
    else:
        index = columns[:, None, None, None].expand_as(fresh)
        cache.scatter_(2, index, fresh)
