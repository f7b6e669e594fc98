"""The generative head trained with the energy score: hidden state and noise in, latent out."""

from calm_kernels.energy_head.api import energy_head
from calm_kernels.energy_head.module import EnergyHead

__all__ = ["EnergyHead", "energy_head"]
