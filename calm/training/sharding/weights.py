"""Weights split among processes: FSDP 2, and the one place that decides what is gathered together.

Each process keeps a part of every weight, of its gradient and of the optimizer's state, in the
weight's dtype, and gathers a unit's weights when it needs them (`shard_model`). `whole_weights`
gathers all of them, for code that reads weights without calling the modules that hold them.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from calm.models.autoencoder import ResidualBlock

__all__ = [
    "Units",
    "is_sharded",
    "mixed_precision",
    "shard_model",
    "units_of",
    "whole_weights",
]

# Modules whose weights are gathered together, one after the other.
LAYERS = (LlamaDecoderLayer, ResidualBlock)


class Units(NamedTuple):
    """Parts of a model whose weights are gathered together, each on its own.

    Attributes:
        layers: decoder layers; of an autoencoder its blocks.
        heads: generative heads.
        repeated: not split, but whole in every process, because training does not change them: the
            autoencoder of a language model, the teacher of an autoencoder.
    """

    layers: list[nn.Module]
    heads: list[Any]
    repeated: list[nn.Module]


def units_of(model: PreTrainedModel) -> Units:
    """The units of a model of any stage."""

    def present(*parts: Any) -> list[Any]:
        return [part for part in parts if part is not None]

    alignment = getattr(model, "alignment", None)
    repeated = present(getattr(model, "ae_model", None), getattr(alignment, "teacher", None))
    inside = {module for part in repeated for module in part.modules()}
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    heads = present(*(getattr(model, name, None) for name in ("generative_head", "tempered_head")))
    return Units([layer for layer in layers if layer not in inside], heads, repeated)


def mixed_precision(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """Weights gathered in `dtype`, gradients summed in float32; None gathers them as they are.

    The model runs under autocast as without sharding: activations keep the dtype that it gives
    them, and are not cast between layers.
    """
    if dtype is None:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def shard_model(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy | None = None,
    *,
    reshard_after_forward: bool = True,
) -> None:
    """Split the weights of `model` among the processes of `mesh`, in place.

    What is gathered together are the units of `units_of`, and all that is left. A head and what is
    left stay gathered from their first use to the backward pass, which begins with them.

    Args:
        model: of any stage, equal in all processes.
        mesh: 1-dimensional; with two dimensions weights are split along the second and repeated
            along the first. Its device type says where the model goes.
        policy: dtypes of what is gathered and summed, see `mixed_precision`.
        reshard_after_forward: let a layer's weights go between forward and backward pass: less
            memory, one more gathering.

    Raises:
        ValueError: `model` is sharded already.
    """
    if is_sharded(model):
        raise ValueError(f"model must not be sharded yet, got a {type(model).__name__}")
    units = units_of(model)
    for part in units.repeated:
        part.to(_device(mesh))
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy or mixed_precision(None),
        "ignored_params": {weight for part in units.repeated for weight in part.parameters()},
    }
    for layer in units.layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **settings)
    for head in units.heads:
        head.register_forward_hook(lambda module, inputs, output: _owned(output))
        fully_shard(head, reshard_after_forward=False, **settings)
        for name in head.entry_points:
            setattr(head, name, _without_views(getattr(head, name)))
            register_fsdp_forward_method(head, name)
    fully_shard(model, **settings)
    # Else the first unit that is called, say a head that samples, would take itself for the root.
    fully_shard.state(model)._lazy_init()  # type: ignore[attr-defined] # of torch's decorator


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` has split the weights of `model`."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Meanwhile every process has all weights of `model`, in the dtype they are gathered in.

    For generation and whatever else reads weights without calling the modules that hold them. All
    processes must enter and leave it, and what they do in between needs no other process, unless
    they call a layer. A model that is not sharded stays as it is.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def _device(mesh: DeviceMesh) -> torch.device:
    """Where this process keeps what `mesh` splits."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


def _without_views(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, whose results own their memory.

    FSDP gathers weights for the backward pass when a result gets its gradient; a view would lose
    that if it were changed in place, of which FSDP warns.
    """

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _owned(method(*args, **kwargs))

    return call


def _owned(output: Any) -> Any:
    """Tensors in `output` that are views as copies of the same layout."""
    return tree_map_only(Tensor, lambda part: part.clone() if part._is_view() else part, output)
