"""Heads and inputs that the tests of the energy head share."""

import torch
from helpers import leaf

from calm_kernels import EnergyHead, energy_head


def size_id(size):
    width, latent, noise_size, blocks, draws, lead = size
    return (
        f"C{width}-L{latent}-Z{noise_size}-D{blocks}-N{draws}-rows{'x'.join(map(str, lead)) or 1}"
    )


def make_head(size, generator, dtype=torch.float64):
    """A head whose every parameter is random: a missing bias or affine term would show."""
    width, latent, noise_size, blocks, *_ = size
    head = EnergyHead(width, latent, noise_size, blocks).to(dtype)
    for name, parameter in head.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
        offset = 1.0 if "ln.weight" in name or name.startswith("norm_") else 0.0
        parameter.data.copy_(offset + scale * draw)
    return head


def make_inputs(size, generator):
    """Hidden states ``[..., H]`` and noise ``[N, ..., Z]``."""
    width, _, noise_size, _, draws, lead = size
    hidden = torch.randn(*lead, width, generator=generator, dtype=torch.float64)
    drawn = torch.rand(draws, *lead, noise_size, generator=generator, dtype=torch.float64) - 0.5
    return hidden, drawn


def run(head, inputs, dtype, backend, **options):
    """Latents, and the gradients of a sum of sines in hidden states, noise and every parameter."""
    parameters = {name: leaf(value, dtype) for name, value in head.named_parameters()}
    inputs = [leaf(value, dtype) for value in inputs]
    latent = energy_head(*inputs, parameters, backend=backend, **options)
    gradients = torch.autograd.grad(latent.double().sin().sum(), [*inputs, *parameters.values()])
    return [latent.detach(), *gradients]
