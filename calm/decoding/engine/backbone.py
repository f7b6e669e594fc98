"""The backbone without its framework: a prompt's chunks at once, then one chunk a step.

`transformers.LlamaModel` spends more time between its operations than in them when it reads one
chunk. `CachedBackbone` holds the same weights, those of one product side by side, and does what is
left: for each layer two norms, four products, a rotation and the attention over a preallocated
cache. All
that is decided per call (masks, rotations, columns to write) is decided once for all layers.

Dimensions of a head are reordered so that the two that rotate together are neighbours and one
complex multiplication rotates them; keys and queries alike, so their products are the same.

Shapes: B sequences, Q chunks of this call, P chunks of a prompt, H hidden size, D head size.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from calm.decoding.engine.kv_cache import KVCache
from calm.decoding.engine.layout import Product, joined, plain
from calm.errors import UserError
from calm_kernels.products import linear
from calm_kernels.threads import threads_for

__all__ = ["CachedBackbone"]


class _Layer(NamedTuple):
    """Weights of a layer, and their biases where it has any."""

    attention_norm: Tensor
    qkv: Product
    output: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product


class _Positions(NamedTuple):
    """Where the chunks of one call go, and what they see."""

    rotation: Tensor  # [B or 1, Q, 1, D/2] complex
    columns: slice | Tensor  # to write
    seen: int  # columns that attention reads
    mask: Tensor | None  # 0 or -inf, [B or 1, 1, Q, seen]
    is_causal: bool


class CachedBackbone:
    """A backbone's weights, arranged for reading chunk after chunk; they are copied.

    Args:
        backbone: a `LlamaModel`, in any of its configurations.

    Raises:
        UserError: its layers are not plain ones (adapters, quantised products).
    """

    def __init__(self, backbone: LlamaModel) -> None:
        config, first = backbone.config, cast(Any, backbone.layers[0])
        self.rotary = backbone.rotary_emb
        self.head_dim: int = first.self_attn.head_dim
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads or self.num_heads
        self.norm_eps = config.rms_norm_eps
        self.activation = first.mlp.act_fn
        self.norm = backbone.norm.weight.detach()
        self.layers = [self._arrange(layer) for layer in backbone.layers]

    def allocate(self, batch_size: int, capacity: int, *, is_fixed: bool = False) -> KVCache:
        """A cache of `capacity` chunks, see `KVCache`."""
        return KVCache.allocate(
            num_layers=len(self.layers),
            batch_size=batch_size,
            num_heads=self.num_kv_heads,
            capacity=capacity,
            head_dim=self.head_dim,
            device=self.norm.device,
            dtype=self.norm.dtype,
            rotations=self._rotations(capacity),
            is_fixed=is_fixed,
        )

    def _rotations(self, capacity: int) -> Tensor:
        """The model's own angles of each position, as unit complex numbers ``[capacity, D/2]``.

        One call for the whole cache: where angles depend on the length of the text (`rope_type`
        "dynamic" or "longrope"), all positions get those of the cache's length.
        """
        positions = torch.arange(capacity, device=self.norm.device)[None]
        cos, sin = self.rotary(self.norm.new_empty((), dtype=torch.float32), positions)
        return torch.complex(cos, sin)[0, :, : self.head_dim // 2]

    def prefill(self, embeds: Tensor, starts: list[int], cache: KVCache) -> Tensor:
        """Read prompts of any lengths, which end in the last column.

        Args:
            embeds: ``[B, P, H]``; columns before a sequence's start may hold anything finite.
            starts: first column of each sequence, at most P - 1.
            cache: is overwritten.

        Returns: the state after each prompt's last chunk, ``[B, H]``.
        """
        cache.begin(starts)
        cache.reserve(embeds.shape[1])
        column = torch.arange(embeds.shape[1], device=embeds.device)
        mask, rotation = None, cache.rotations[None, : len(column), None]
        if cache.is_ragged:
            rotation = cache.rotations[(column - cache.starts[:, None]).clamp(min=0)][:, :, None]
            is_own = column >= cache.starts[:, None, None, None]  # [B, 1, 1, P]
            is_past = column < column[:, None]
            # a column before the start sees itself, lest its softmax be empty
            mask = self._additive((is_own & is_past) | (column == column[:, None]))
        columns = slice(0, len(column))
        place = _Positions(rotation, columns, len(column), mask, is_causal=mask is None)
        hidden = self._run(embeds, cache, place)[:, -1]
        cache.advance(len(column))
        return self._normalised(hidden, self.norm)

    def step(self, embeds: Tensor, cache: KVCache) -> Tensor:
        """Read one more chunk.

        Args:
            embeds: ``[B, 1, H]``.
            cache: grows by one column.

        Returns: ``[B, H]``. With a fixed cache shapes are fixed, too, and nothing is read back from
            the device.
        """
        cache.reserve(1)
        if cache.position is None:
            place = self._next_place(cache)
        else:
            place = self._fixed_place(cache, cache.position)
        hidden = self._run(embeds, cache, place)[:, -1]
        cache.advance(1)
        return self._normalised(hidden, self.norm)

    def _next_place(self, cache: KVCache) -> _Positions:
        """The column after `cache.length` filled ones; attention reads no more than those."""
        column, mask = cache.length, None
        rotation = cache.rotations[column].view(1, 1, 1, -1)
        if cache.is_ragged:
            rotation = cache.rotations[column - cache.starts][:, None, None]
            seen = torch.arange(column + 1, device=cache.starts.device)
            mask = self._additive(seen >= cache.starts[:, None, None, None])
        return _Positions(rotation, slice(column, column + 1), column + 1, mask, is_causal=False)

    def _fixed_place(self, cache: KVCache, position: Tensor) -> _Positions:
        """The column that the device counts; attention reads all and masks those to come."""
        rotation = cache.rotations[position - cache.starts][:, None, None]
        column = torch.arange(cache.capacity, device=position.device)
        mask = (column >= cache.starts[:, None, None, None]) & (column <= position)
        return _Positions(rotation, position, cache.capacity, self._additive(mask), is_causal=False)

    def _additive(self, mask: Tensor) -> Tensor:
        """0 where `mask` is true, else -inf: what attention would make of it in every layer."""
        return torch.zeros_like(mask, dtype=self.norm.dtype).masked_fill(~mask, -torch.inf)

    def _run(self, hidden: Tensor, cache: KVCache, place: _Positions) -> Tensor:
        """All layers on ``[B, Q, H]``."""
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            normalised = self._normalised(hidden, layer.attention_norm)
            hidden = hidden + self._attend(normalised, layer, keys, values, place)
            normalised = self._normalised(hidden, layer.mlp_norm)
            gate, up = linear(normalised, *layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + linear(self.activation(gate) * up, *layer.down)
        return hidden

    def _attend(
        self, hidden: Tensor, layer: _Layer, keys: Tensor, values: Tensor, place: _Positions
    ) -> Tensor:
        """Attention of ``[B, Q, H]`` over the cache ``[B, heads, capacity, D]`` of one layer."""
        batch, chunks = hidden.shape[:2]
        num_rotated = self.num_heads + self.num_kv_heads
        qkv = linear(hidden, *layer.qkv).view(batch, chunks, -1, self.head_dim)
        rotated = _rotate(qkv[:, :, :num_rotated], place.rotation).transpose(1, 2)
        query, key = rotated.split((self.num_heads, self.num_kv_heads), dim=1)
        _write(keys, place.columns, key)
        _write(values, place.columns, qkv[:, :, num_rotated:].transpose(1, 2))
        if chunks == 1:  # heads that share keys are rows of one query
            query = query.reshape(batch, self.num_kv_heads, -1, self.head_dim)
        with threads_for(query.numel() * place.seen, query):
            attended = F.scaled_dot_product_attention(
                query,
                keys[:, :, : place.seen],
                values[:, :, : place.seen],
                attn_mask=place.mask,
                is_causal=place.is_causal,
                enable_gqa=query.shape[1] != self.num_kv_heads,
            )
        if chunks > 1:
            attended = attended.transpose(1, 2)
        return linear(attended.reshape(batch, chunks, -1), *layer.output)

    def _normalised(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self.norm_eps)

    def _arrange(self, layer: nn.Module) -> _Layer:
        """The weights of a layer, those of one product together."""
        if not isinstance(layer, LlamaDecoderLayer):
            raise UserError(f"generate reads Llama layers, got {type(layer).__name__}")
        attention, mlp = cast(Any, layer.self_attn), cast(Any, layer.mlp)
        query, key = (self._paired(*plain(p)) for p in (attention.q_proj, attention.k_proj))
        return _Layer(
            cast(Tensor, layer.input_layernorm.weight).detach(),
            joined(query, key, plain(attention.v_proj)),
            joined(plain(attention.o_proj)),
            cast(Tensor, layer.post_attention_layernorm.weight).detach(),
            joined(plain(mlp.gate_proj), plain(mlp.up_proj)),
            joined(plain(mlp.down_proj)),
        )

    def _paired(self, weight: Tensor, bias: Tensor | None) -> Product:
        """Rows i and i + D/2 of each head, which rotate together, side by side."""

        def pair(rows: Tensor) -> Tensor:
            by_half = rows.view(-1, 2, self.head_dim // 2, *rows.shape[1:])
            return by_half.transpose(1, 2).reshape(rows.shape)

        return pair(weight), None if bias is None else pair(bias)


def _rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Neighbouring pairs of ``[B, Q, heads, D]`` turned by the angles of their position."""
    pairs = torch.view_as_complex(heads.to(torch.float32).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(heads.dtype)


def _write(cache: Tensor, columns: slice | Tensor, fresh: Tensor) -> None:
    """Put ``[B, heads, Q, D]`` into these columns of the cache."""
    if isinstance(columns, slice):
        cache[:, :, columns] = fresh
    else:
        cache.index_copy_(2, columns, fresh)
