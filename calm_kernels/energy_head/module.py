"""`EnergyHead`: the parameters under their published names, and the draws."""

import math
from typing import Literal

from torch import Tensor, nn

from calm_kernels.backend import Backend
from calm_kernels.checks import check_integer
from calm_kernels.energy_head.api import energy_head
from calm_kernels.energy_head.parameters import NORM_EPS, parameters_by_name
from calm_kernels.noise import Seed

__all__ = ["EnergyHead", "HeadInit"]

HeadInit = Literal["zero", "scaled"]


class EnergyHead(nn.Module):
    """Residual MLP that turns a hidden state and noise into a latent, see `energy_head`.

    Args:
        hidden_size: C, width of the hidden states and of the head.
        latent_size: L.
        noise_size: Z, elements of noise a draw.
        num_blocks: residual blocks, at least 1.
        init: of the last linear, see `reset_output`.
    """

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        noise_size: int,
        num_blocks: int,
        *,
        init: HeadInit = "zero",
    ) -> None:
        super().__init__()
        self.hidden_size = check_integer("hidden_size", hidden_size, 1)
        self.latent_size = check_integer("latent_size", latent_size, 1)
        self.noise_size = check_integer("noise_size", noise_size, 1)
        self.num_blocks = check_integer("num_blocks", num_blocks, 1)
        self.noise_embd = nn.Linear(noise_size, hidden_size)
        self.hidden_embd = nn.Linear(hidden_size, hidden_size)
        self.norm_hidden = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.norm_noise = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.mlp_blocks = nn.ModuleList(_Block(hidden_size) for _ in range(num_blocks))
        self.final_layer = _FinalLayer(hidden_size, latent_size)
        self.reset_output(init)

    @property
    def output(self) -> nn.Linear:
        """The last linear, which `reset_output` initialises."""
        return self.final_layer.linears[-1]  # type: ignore[return-value] # a Linear, by __init__

    def reset_output(self, init: HeadInit = "zero") -> None:
        """Start the last linear at zero (published) or, to learn sooner, with weights N(0, 1/C)."""
        if init not in ("zero", "scaled"):
            raise ValueError(f"init must be 'zero' or 'scaled', got {init!r}")
        nn.init.zeros_(self.output.bias)
        if init == "zero":
            nn.init.zeros_(self.output.weight)
        else:
            nn.init.normal_(self.output.weight, std=self.hidden_size**-0.5)

    def forward(
        self,
        hidden: Tensor,
        noise: Tensor,
        *,
        recompute: bool = False,
        backend: Backend | str = Backend.AUTO,
    ) -> Tensor:
        """Latents ``[..., L]`` of noise ``[..., Z]``, or ``[N, ..., L]`` of ``[N, ..., Z]``.

        See `energy_head`.
        """
        return energy_head(hidden, noise, self, recompute=recompute, backend=backend)

    def sample(
        self,
        hidden: Tensor,
        noise: Tensor | None = None,
        num_samples: int | None = None,
        seed: Seed = None,
        first_row: int | Tensor = 0,
        noise_scale: float = 1.0,
        *,
        noise_spread: float = 1.0,
        recompute: bool = False,
        backend: Backend | str = Backend.AUTO,
    ) -> Tensor:
        """Draw latents; what depends on the rows alone is computed once for all draws.

        Args:
            hidden: ``[..., H]``.
            noise: draws to use instead of fresh ones, ``[..., Z]`` or ``[N, ..., Z]``, already
                centred.
            num_samples: N draws a row; None for one, without the leading axis (or as many as
                `noise` has).
            seed: of fresh draws, see `noise.as_seed`; row r of `hidden` is row ``first_row + r``.
            first_row: global index of the first row.
            noise_scale: factor on the noise, >= 0; 0 is deterministic. `norm_noise` cancels
                any other factor almost completely.
            noise_spread: factor on what the noise contributes after that norm, before its bias,
                >= 0: below 1 it narrows the distribution, 0 is deterministic (another latent than
                that of ``noise_scale=0``).
            recompute: see `energy_head`.
            backend: see `energy_head`.

        Returns: ``[..., L]``, or ``[N, ..., L]`` with N draws a row.
        """
        return energy_head(
            hidden, noise, self._with_spread(noise_spread), num_samples=num_samples, seed=seed,
            first_row=first_row, noise_scale=noise_scale, recompute=recompute, backend=backend,
        )  # fmt: skip

    def _with_spread(self, noise_spread: float) -> nn.Module | dict[str, Tensor]:
        """The parameters with the weight of `norm_noise` times `noise_spread`."""
        if not (noise_spread >= 0.0 and math.isfinite(noise_spread)):
            raise ValueError(f"noise_spread must be finite and at least 0, got {noise_spread}")
        if noise_spread == 1.0:
            return self
        return parameters_by_name(self) | {
            "norm_noise.weight": self.norm_noise.weight * noise_spread
        }


class _Block(nn.Module):
    """Parameters of one residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.linears = nn.Sequential(
            nn.Linear(2 * width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2 * width),
        )
        self.down_proj = nn.Linear(width, width)


class _FinalLayer(nn.Module):
    """Parameters of the output layer."""

    def __init__(self, width: int, latent_size: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.linears = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, latent_size)
        )
