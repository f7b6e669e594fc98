"""Fused operations for continuous autoregressive language models.

Each operation has a reference that defines it and one or more fast backends; `backend` chooses.
The package needs torch alone, and Triton only where its backend is chosen.
"""

from calm_kernels import noise
from calm_kernels.agreeing_patch import agreeing_patch
from calm_kernels.backend import Backend, set_backend, use_backend
from calm_kernels.chunk_record import advance_state, chunk_record
from calm_kernels.decode_attention import decode_attention
from calm_kernels.energy_head import EnergyHead, energy_head
from calm_kernels.energy_score import (
    EnergyScoreDiagnostics,
    energy_score,
    expected_distance,
    gaussian_energy_score,
)
from calm_kernels.linear_argmax import linear_argmax
from calm_kernels.linear_cross_entropy import linear_cross_entropy
from calm_kernels.norm_linear import linear_residual, norm_linear, norm_swiglu
from calm_kernels.reparameterize import reparameterize
from calm_kernels.softmax_draws import softmax_draws
from calm_kernels.uniform_draws import normal_draws, uniform_draws
from calm_kernels.warmup import warmup

__all__ = [
    "Backend",
    "EnergyHead",
    "EnergyScoreDiagnostics",
    "advance_state",
    "agreeing_patch",
    "chunk_record",
    "decode_attention",
    "energy_head",
    "energy_score",
    "expected_distance",
    "gaussian_energy_score",
    "linear_argmax",
    "linear_cross_entropy",
    "linear_residual",
    "noise",
    "norm_linear",
    "norm_swiglu",
    "normal_draws",
    "reparameterize",
    "set_backend",
    "softmax_draws",
    "uniform_draws",
    "use_backend",
    "warmup",
]
