"""The energy score of a set of samples: strictly proper, likelihood-free, unbiased."""

from calm_kernels.energy_score.api import (
    EnergyScoreDiagnostics,
    energy_score,
    expected_distance,
    gaussian_energy_score,
)

__all__ = [
    "EnergyScoreDiagnostics",
    "energy_score",
    "expected_distance",
    "gaussian_energy_score",
]
