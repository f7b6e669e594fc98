"""An energy head that takes a temperature: P^(1/T) in one draw."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from calm.configuration import CALMConfig
from calm.models.heads.energy import EnergyGenerativeHead

__all__ = ["TemperedHead", "in_range", "spread_at"]

NUM_FEATURES = 8
TOLERANCE = 1e-6  # relative; 1/3 written with seven digits is 1/3


class TemperedHead(EnergyGenerativeHead):
    """An energy head on hidden states to which T has been added.

    condition = h + W φ(T),    φ_k(T) = sin(k log(1/T) / 2),    k = 1 .. 8

    W starts at zero and φ(1) is zero: begun as a copy of a trained head, it draws what that head
    draws, and learns from there (`calm.training.objectives.tempering`). The trained head stays
    beside it, for T = 1. Cost: that of the head, and 8 H a hidden state.
    """

    entry_points: ClassVar[tuple[str, ...]] = ("sample", "condition")

    def __init__(self, config: CALMConfig) -> None:
        super().__init__(config)
        self.temperature_embd = nn.Linear(NUM_FEATURES, config.hidden_size, bias=False)

    def initialize(self, module: nn.Module) -> None:
        """As the head's, and W zero."""
        super().initialize(module)
        if module is self.temperature_embd:
            init.zeros_(module.weight)

    def start_from(self, head: EnergyGenerativeHead) -> None:
        """Take the weights of `head`; W becomes zero."""
        self.load_state_dict(head.state_dict(), strict=False)  # all but W
        nn.init.zeros_(self.temperature_embd.weight)

    def condition(self, hidden: Tensor, temperature: float | Tensor) -> Tensor:
        """What `sample` takes as hidden states to draw at T.

        Args:
            hidden: ``[..., H]``.
            temperature: T in (0, 1], a number, or one for each hidden state, ``[...]``.

        Returns: ``[..., H]``.
        """
        step = torch.arange(1, NUM_FEATURES + 1, device=hidden.device, dtype=torch.float32) / 2
        if isinstance(temperature, Tensor):
            angles = step * -temperature[..., None].log()
        else:
            angles = step * -math.log(temperature)
        weight = self.temperature_embd.weight
        return hidden + self.temperature_embd(angles.sin().to(weight.dtype)).to(hidden.dtype)


def spread_at(temperature: float, knots: Sequence[Sequence[float]] | None) -> float:
    """Factor s on what the noise of a tempered head contributes at T.

    log s is linear in log T between the `knots` (T, s), and that of the nearest knot outside of
    them; without knots s is 1.
    """
    if not knots:
        return 1.0
    after = next((i for i, knot in enumerate(knots) if knot[0] >= temperature), len(knots) - 1)
    (low, below), (high, above) = knots[max(0, after - 1)], knots[after]
    share = 1.0 if low == high else math.log(temperature / low) / math.log(high / low)
    share = min(max(share, 0.0), 1.0)
    return math.exp((1 - share) * math.log(below) + share * math.log(above))


def in_range(temperature: float, bounds: Sequence[float]) -> bool:
    """Whether T lies in [least, largest], within rounding."""
    least, largest = bounds
    return least * (1 - TOLERANCE) <= temperature <= largest * (1 + TOLERANCE)
