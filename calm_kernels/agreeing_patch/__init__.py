"""Low-temperature choice among drawn chunks (Algorithm 2)."""

from calm_kernels.agreeing_patch.api import agreeing_patch, vote_chances

__all__ = ["agreeing_patch", "vote_chances"]
