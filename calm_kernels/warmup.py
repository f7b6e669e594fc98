"""Compiles what a model will launch, before a CUDA graph is captured or a clock starts."""

from typing import Any

import torch

from calm_kernels.backend import Backend, resolve
from calm_kernels.energy_score import gaussian_energy_score
from calm_kernels.reparameterize import reparameterize

__all__ = ["warmup"]


def warmup(
    config: Any, device: torch.device | str = "cuda", *, dtype: torch.dtype = torch.bfloat16
) -> list[str]:
    """Run each operation of `config` that has a kernel once, on two rows.

    Settings come from a table, so this only compiles; the caches of Triton keep the result on disk.

    Args:
        config: a language model's configuration (`num_samples`, `latent_size`, `beta`, `targets`,
            `num_targets`), or an autoencoder's (`latent_size`, `kl_clamp`, `ae_dropout`).
        device: where the kernels will run.
        dtype: of the samples or latent states.

    Returns: the operations that were run; none where torch runs them.
    """
    width = config.latent_size
    is_autoencoder = hasattr(config, "kl_clamp")
    operation = "reparameterize" if is_autoencoder else "gaussian_energy_score"
    zeros = torch.zeros(2, 2 * width, device=device, dtype=dtype)
    if resolve(Backend.AUTO, operation, zeros) is not Backend.TRITON:
        return []
    seed = torch.zeros(2, dtype=torch.int64, device=device)
    if is_autoencoder:
        states = zeros.requires_grad_()
        latent, kl = reparameterize(
            states, kl_floor=config.kl_clamp, dropout=config.ae_dropout, seed=seed
        )
        (latent.square().sum() + kl.sum()).backward()
        return [operation]
    samples = zeros.new_zeros(2, config.num_samples, width).transpose(0, 1).requires_grad_()
    score = gaussian_energy_score(
        samples,
        zeros[:, :width],
        zeros[:, width:],
        exponent=config.beta,
        targets=config.targets,
        num_targets=config.num_targets,
        weight=torch.ones(2, device=device),
        seed=seed,
    )
    score.sum().backward()
    return [operation]
