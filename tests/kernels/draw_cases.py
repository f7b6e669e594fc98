"""Addresses of draws: sizes that fill no block, numbers that leave 32 bits, seeds of rows."""

import torch

from calm_kernels import noise, normal_draws, uniform_draws
from calm_kernels.noise import Stream

# Public operation -> what it draws in plain torch.
DRAWS = {uniform_draws: noise.uniform, normal_draws: noise.normal}
SEEDS = torch.tensor([[1, 0], [-7, 3], [2**63 - 1, 7 << 33]])
# rows, width, and options
CASES = {
    "one number": (1, 1, {"seed": torch.tensor([[3, 4]])}),
    "one program and a part": (70, 13, {"seed": torch.tensor([-9, 7 << 33]), "num_draws": 3}),
    "a row that leaves 32 bits": (3, 7, {"seed": 5, "num_draws": 2, "first_row": 2**32 - 2}),
    "a row in memory": (3, 8, {"seed": 5, "first_row": torch.tensor(2**40)}),
    "a draw that leaves 32 bits": (2, 9, {"seed": 1, "num_draws": 3, "first_draw": 2**31 - 1}),
    "a seed a row": (3, 64, {"seed": SEEDS, "num_draws": 2, "first_row": 4}),
}


def drawn(function, name, stream=Stream.VOTE, **options):
    """The draws of a case."""
    rows, width, own = CASES[name]
    return function(rows, width, stream=stream, **own, **options)
