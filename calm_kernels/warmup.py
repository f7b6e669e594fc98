"""Compiles the kernels of a model before a CUDA graph is captured or a time is measured."""

from collections.abc import Callable
from typing import Any

import torch

from calm_kernels.agreeing_patch import agreeing_patch
from calm_kernels.backend import Backend, resolve
from calm_kernels.chunk_record import advance_state, chunk_record
from calm_kernels.decode_attention import decode_attention
from calm_kernels.energy_head import EnergyHead
from calm_kernels.energy_score import gaussian_energy_score
from calm_kernels.linear_argmax import linear_argmax
from calm_kernels.linear_cross_entropy import linear_cross_entropy
from calm_kernels.noise import Stream
from calm_kernels.norm_linear import linear_residual, norm_linear, norm_swiglu
from calm_kernels.reparameterize import reparameterize
from calm_kernels.softmax_draws import softmax_draws
from calm_kernels.tuning import num_processors
from calm_kernels.uniform_draws import normal_draws, uniform_draws

__all__ = ["warmup"]

NUM_CANDIDATES = 200  # candidates of a vote, the default of `generate`
CAPACITY = 512  # chunks of a cache
ROWS = (1, 17)  # of layers: few have their own settings


def warmup(
    config: Any, device: torch.device | str = "cuda", *, dtype: torch.dtype = torch.bfloat16
) -> list[str]:
    """Run each operation of `config` that has a kernel once, on few rows.

    Settings come from a table, so this only compiles; Triton caches the result on disk.

    Args:
        config: a language model's configuration (`num_samples`, `latent_size`, `beta`, `targets`,
            `num_targets`, `hidden_size`, `noise_size`, `patch_size`, and the backbone's
            `intermediate_size`, `rms_norm_eps`, `num_attention_heads`, `num_key_value_heads`), or
            an autoencoder's (`latent_size`, `kl_clamp`, `ae_dropout`, `latent_dropout`,
            `vocab_size`, `hidden_size`, `intermediate_size`, `rms_norm_eps`).
        device: where the kernels will run.
        dtype: of the samples or latent states.

    Returns: the operations that were run; none where torch runs them.
    """
    is_autoencoder = hasattr(config, "kl_clamp")
    names = []
    for name, run in (_AUTOENCODER if is_autoencoder else _LANGUAGE_MODEL).items():
        nothing = torch.zeros(2, device=device, dtype=dtype)
        if resolve(Backend.AUTO, name, nothing) is Backend.TRITON:
            run(config, nothing, torch.zeros(2, dtype=torch.int64, device=device))
            names.append(name)
    return names


def _reparameterize(config: Any, like: torch.Tensor, seed: torch.Tensor) -> None:
    states = like.new_zeros(2, 2 * config.latent_size).requires_grad_()
    own = config.latent_dropout
    dropout = config.ae_dropout if own is None else own
    latent, kl = reparameterize(states, kl_floor=config.kl_clamp, dropout=dropout, seed=seed)
    (latent.square().sum() + kl.sum()).backward()


def _linear_cross_entropy(config: Any, like: torch.Tensor, seed: torch.Tensor) -> None:
    hidden = like.new_zeros(2, config.hidden_size).requires_grad_()
    weight = like.new_zeros(config.vocab_size, config.hidden_size).requires_grad_()
    linear_cross_entropy(hidden, weight, seed).backward()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, seed)


def _linear_argmax(config: Any, like: torch.Tensor, seed: torch.Tensor) -> None:
    weight = like.new_zeros(config.vocab_size, config.hidden_size)
    for num_rows in (2, 64, 65):  # few, some and many rows have their own settings
        linear_argmax(like.new_zeros(num_rows, config.hidden_size), weight)


def _energy_score(config: Any, like: torch.Tensor, seed: torch.Tensor) -> None:
    zeros = like.new_zeros(2, config.latent_size)
    samples = like.new_zeros(2, config.num_samples, config.latent_size).transpose(0, 1)
    score = gaussian_energy_score(
        samples.requires_grad_(),
        zeros,
        zeros,
        exponent=config.beta,
        targets=config.targets,
        num_targets=config.num_targets,
        weight=torch.ones_like(zeros[:, 0], dtype=torch.float32),
        seed=seed,
    )
    score.sum().backward()


def _energy_head(config: Any, like: torch.Tensor, seed: torch.Tensor) -> None:
    sizes = (config.hidden_size, config.latent_size, config.noise_size)
    # More blocks launch the same kernels. Under autocast parameters that are vectors stay float32.
    head = EnergyHead(*sizes, num_blocks=2).to(like.device)
    hidden = like.new_zeros(2, config.hidden_size).requires_grad_()
    has_autocast = like.dtype != torch.float32
    with torch.autocast(like.device.type, dtype=like.dtype, enabled=has_autocast):
        latent = head.sample(hidden.float(), num_samples=config.num_samples, seed=seed)
    latent.sum().backward()
    head.to(like.dtype)
    with torch.no_grad():
        for count in (1, 64, NUM_CANDIDATES, 513):  # few rows have their own settings
            head.sample(hidden, num_samples=count, seed=seed)


def _agreeing_patch(config: Any, like: torch.Tensor, seed: torch.Tensor) -> None:
    candidates = seed.new_zeros(2, NUM_CANDIDATES, config.patch_size)
    agreeing_patch(candidates, torch.full_like(like, 2.0, dtype=torch.float64), seed=seed)


@torch.no_grad()
def _norm_linear(config: Any, like: torch.Tensor, seed: torch.Tensor) -> None:
    width, eps = config.hidden_size, config.rms_norm_eps
    heads, kv_heads, size = _heads(config)
    weights = [like.new_zeros(count * size, width) for count in (heads, kv_heads, kv_heads)]
    norm = like.new_zeros(width)
    for num_rows in ROWS:
        norm_linear(like.new_zeros(num_rows, width), norm, weights, norm_eps=eps)
        attended = like.new_zeros(num_rows, heads * size)
        linear_residual(
            attended, like.new_zeros(width, heads * size), like.new_zeros(num_rows, width)
        )
    _mlp(config, like, seed)


@torch.no_grad()
def _mlp(config: Any, like: torch.Tensor, seed: torch.Tensor) -> None:
    """Of the backbone and of the autoencoder's decoder."""
    width, inner = config.hidden_size, config.intermediate_size
    norm, gate = like.new_zeros(width), like.new_zeros(inner, width)
    for num_rows in ROWS:
        rows = like.new_zeros(num_rows, width)
        features = norm_swiglu(rows, norm, gate, gate, norm_eps=config.rms_norm_eps)
        linear_residual(features, like.new_zeros(width, inner), rows)


def _decode_attention(config: Any, like: torch.Tensor, seed: torch.Tensor) -> None:
    heads, kv_heads, size = _heads(config)
    rotations = torch.ones(CAPACITY, size // 2, dtype=torch.complex64, device=like.device)
    pairs, most = kv_heads, num_processors(like.device)
    while pairs <= max(kv_heads, most):  # the more sequences, the fewer parts has each cache
        batch = pairs // kv_heads
        keys, values = like.new_zeros(2, batch, kv_heads, CAPACITY, size)
        rows = like.new_zeros(batch, (heads + 2 * kv_heads) * size)
        decode_attention(rows, keys, values, rotations, seed.new_zeros(batch))
        pairs *= 2


def _chunk_record(config: Any, like: torch.Tensor, seed: torch.Tensor) -> None:
    tokens, latents = seed.new_zeros(2, config.patch_size), like.new_zeros(1, 2, config.latent_size)
    for num_agreeing in (1, seed):  # of one draw, of a vote
        record = chunk_record(tokens, latents, num_agreeing=num_agreeing)
    for lengths in (None, seed):  # after a prompt, after a step
        advance_state(record, tokens, seed.new_zeros(2, 2), lengths)


def _draws(config: Any, like: torch.Tensor, seed: torch.Tensor) -> None:
    options: dict[str, Any] = {"stream": Stream.VOTE, "seed": seed, "device": seed.device}
    for dtype in (torch.float32, torch.float64):  # tokens are drawn in the latter
        uniform_draws(1, 1, **options, dtype=dtype)
    normal_draws(1, 1, **options)


def _softmax_draws(config: Any, like: torch.Tensor, seed: torch.Tensor) -> None:
    logits = like.new_zeros(1, config.vocab_size)
    for uniforms in (None, like.new_zeros(1, 1, dtype=torch.float64)):  # baseline, readout
        softmax_draws(logits, uniforms, seed=seed)
    softmax_draws(logits, temperature=0.0, seed=seed)


def _heads(config: Any) -> tuple[int, int, int]:
    """Query heads, key heads, features of each."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, config.num_key_value_heads or heads, size


_Run = Callable[[Any, torch.Tensor, torch.Tensor], None]
_AUTOENCODER: dict[str, _Run] = {
    "reparameterize": _reparameterize,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_argmax": _linear_argmax,
    "norm_swiglu": _mlp,
    "uniform_draws": _draws,
}
_LANGUAGE_MODEL: dict[str, _Run] = {
    "gaussian_energy_score": _energy_score,
    "energy_head": _energy_head,
    "agreeing_patch": _agreeing_patch,
    "norm_linear": _norm_linear,
    "decode_attention": _decode_attention,
    "chunk_record": _chunk_record,
    "uniform_draws": _draws,
    "softmax_draws": _softmax_draws,
}
