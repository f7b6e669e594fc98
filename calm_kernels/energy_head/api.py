"""The public function: check, choose, call."""

from collections.abc import Mapping

from torch import Tensor, nn

from calm_kernels.backend import Backend, resolve
from calm_kernels.checks import check_device, check_dtype, check_shape, check_tensor
from calm_kernels.energy_head.eager import energy_head_eager
from calm_kernels.energy_head.parameters import gather_parameters
from calm_kernels.energy_head.reference import energy_head_reference
from calm_kernels.precision import product_dtype

__all__ = ["energy_head"]


def energy_head(
    hidden: Tensor,
    noise: Tensor,
    parameters: nn.Module | Mapping[str, Tensor],
    *,
    recompute: bool = False,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Latents of the generative head for given noise.

    e₀ = LN(W_n noise + b_n),    c = LN(W_h hidden + b_h)
    in each block: [g; u] = W₃ SiLU(W₂ SiLU(W₁ [LN(e); c] + b₁) + b₂) + b₃
                   e ← e + W_d (SiLU(g) ⊙ u) + b_d
    latent = W_o SiLU(W_f LN(e) + b_f) + b_o

    Args:
        hidden: ``[..., H]``, any float dtype; H is the head's width C; differentiable.
        noise: one draw a row ``[..., Z]`` or N draws a row ``[N, ..., Z]``, already centred
            (U[-1/2, 1/2)); cast to the dtype of `hidden`, differentiable.
        parameters: an `EnergyHead`, or its parameters by their published names, in the dtype of
            `hidden` unless autocast is on; differentiable.
        recompute: keep one array a block for the backward pass instead of all, and compute the
            others again.
        backend: ``auto``, ``reference`` or ``torch``.

    Returns: ``[..., L]`` or ``[N, ..., L]``; the latter is a view of memory in which the draws of a
        row are neighbours.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape, or a parameter
            missing.

    Source: CALM, section 3.3.3. Cost of D blocks in multiplications: 6 D C² a draw as published; in
        the torch backend 5 D C² a draw and D C² a row, because c and its half of W₁ do not depend
        on the noise.
    """
    check_tensor("hidden", hidden, min_dim=1)
    check_tensor("noise", noise, min_dim=1)
    check_dtype("hidden", hidden)
    check_dtype("noise", noise)
    check_device("noise", noise, "hidden", hidden)
    named = dict(parameters.named_parameters()) if isinstance(parameters, nn.Module) else parameters
    head = gather_parameters(named)
    width, noise_size = head.noise_embd.weight.shape
    check_shape("hidden", hidden, (*hidden.shape[:-1], width), "the head's width comes last")
    has_draws = noise.dim() == hidden.dim() + 1
    lead = hidden.shape[:-1]
    expected = (noise.shape[0], *lead, noise_size) if has_draws else (*lead, noise_size)
    check_shape("noise", noise, expected, "[..., Z] or [N, ..., Z] for hidden [..., H]")
    check_device("parameters", head.noise_embd.weight, "hidden", hidden)
    product_dtype("parameters", head.noise_embd.weight, "hidden", hidden)
    chosen = resolve(backend, "energy_head", hidden)

    rows = hidden.reshape(-1, width)
    draws = noise.reshape(noise.shape[0] if has_draws else 1, rows.shape[0], noise_size)
    match chosen:
        case Backend.REFERENCE:
            latent = energy_head_reference(rows, draws, named, recompute)
        case _:
            latent = energy_head_eager(rows, draws, head, recompute)
    latent = latent.unflatten(1, lead) if lead else latent[:, 0]
    return latent if has_draws else latent[0]
