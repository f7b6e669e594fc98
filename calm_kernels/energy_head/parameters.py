"""The head's parameters by their published names."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

__all__ = [
    "NORM_EPS",
    "BlockParameters",
    "HeadParameters",
    "Pair",
    "flatten_parameters",
    "gather_parameters",
    "parameters_by_name",
    "unflatten_parameters",
]

NORM_EPS = 1e-6


class Pair(NamedTuple):
    """Weight and bias of a linear or a layer norm."""

    weight: Tensor
    bias: Tensor


class BlockParameters(NamedTuple):
    """One residual block; the first half of `first.weight`'s columns belongs to the sample."""

    norm: Pair
    first: Pair  # [C, 2C]
    second: Pair  # [C, C]
    gate_up: Pair  # [2C, C]
    down: Pair  # [C, C]


class HeadParameters(NamedTuple):
    """The whole head."""

    noise_embd: Pair  # [C, Z]
    norm_noise: Pair
    hidden_embd: Pair  # [C, C]
    norm_hidden: Pair
    blocks: tuple[BlockParameters, ...]
    final_norm: Pair
    final_first: Pair  # [C, C]
    final_second: Pair  # [L, C]


def parameters_by_name(module: nn.Module) -> dict[str, Tensor]:
    """`dict(module.named_parameters())` in a third of its time: a decode step calls it."""
    named: dict[str, Tensor] = {}
    _add_parameters(module, "", named)
    return named


def _add_parameters(module: nn.Module, prefix: str, named: dict[str, Tensor]) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            named[prefix + name] = parameter
    for name, child in module._modules.items():
        if child is not None:
            _add_parameters(child, f"{prefix}{name}.", named)


def gather_parameters(named: Mapping[str, Tensor]) -> HeadParameters:
    """Sort a state dict of `EnergyHead` into a `HeadParameters`.

    Raises:
        ValueError: a name is missing.
    """

    def pair(name: str) -> Pair:
        try:
            return Pair(named[f"{name}.weight"], named[f"{name}.bias"])
        except KeyError as missing:
            raise ValueError(
                f"parameters must hold {missing}, as in EnergyHead.state_dict()"
            ) from None

    num_blocks = 0
    while f"mlp_blocks.{num_blocks}.in_ln.weight" in named:
        num_blocks += 1
    blocks = tuple(
        BlockParameters(
            norm=pair(f"mlp_blocks.{index}.in_ln"),
            first=pair(f"mlp_blocks.{index}.linears.0"),
            second=pair(f"mlp_blocks.{index}.linears.2"),
            gate_up=pair(f"mlp_blocks.{index}.linears.4"),
            down=pair(f"mlp_blocks.{index}.down_proj"),
        )
        for index in range(num_blocks)
    )
    return HeadParameters(
        noise_embd=pair("noise_embd"),
        norm_noise=pair("norm_noise"),
        hidden_embd=pair("hidden_embd"),
        norm_hidden=pair("norm_hidden"),
        blocks=blocks,
        final_norm=pair("final_layer.in_ln"),
        final_first=pair("final_layer.linears.0"),
        final_second=pair("final_layer.linears.2"),
    )


def flatten_parameters(head: HeadParameters) -> list[Tensor]:
    """All tensors: weight and bias of each pair, in the order of the fields."""
    inputs = (head.noise_embd, head.norm_noise, head.hidden_embd, head.norm_hidden)
    blocks = [pair for block in head.blocks for pair in block]
    outputs = (head.final_norm, head.final_first, head.final_second)
    return [tensor for pair in (*inputs, *blocks, *outputs) for tensor in pair]


def unflatten_parameters(tensors: Sequence[Tensor]) -> HeadParameters:
    """The inverse of `flatten_parameters`."""
    pairs = [Pair(*tensors[index : index + 2]) for index in range(0, len(tensors), 2)]
    inputs, inner, outputs = pairs[:4], pairs[4:-3], pairs[-3:]
    size = len(BlockParameters._fields)
    blocks = [BlockParameters(*inner[index : index + size]) for index in range(0, len(inner), size)]
    noise_embd, norm_noise, hidden_embd, norm_hidden = inputs
    return HeadParameters(noise_embd, norm_noise, hidden_embd, norm_hidden, tuple(blocks), *outputs)
