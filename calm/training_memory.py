"""Memory of a training step on one GPU, by formula.

Assumed: data parallel training, so that every GPU holds the whole model, or its part of weights in
shards (`calm.training.sharding`); float32 weights under autocast; AdamW; attention and operations
on a GPU, so that neither attention's probabilities nor logits are stored; eager PyTorch. Not
counted: buffers of libraries, gradients on their way through a layer, fragmentation.
`TrainingMemory.fits` leaves 20 % of the sum for them.

Activations of a layer and position, for width d, heads h and shared heads k wide in all, inner
width f, and a bytes an element of a matmul (2 in bfloat16, else 4):

    8 d                         residual stream before each norm, float32
    2 a d                       normalised, before attention and before the MLP
    2 a (h + k) + 4 heads       queries, keys, values, output, log-sum-exp
    4 a f                       gate, SiLU(gate), up, their product

With gradient checkpointing, a layer keeps its input (4 d) alone, as does a block of the head;
`head_recompute` is that for the head alone. One layer and one block are then whole in memory, while
their backward pass runs.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from calm.models import Autoencoder, BaselineTransformer
from calm.models.agreement import MAX_ORDER
from calm.models.slot_mixing import INNER_FACTOR
from calm.models.token_score import MAX_LOGITS
from calm.plan import Run
from calm.training.sharding.weights import units_of
from calm_kernels.energy_head import EnergyHead

__all__ = ["TrainingMemory", "memory_of"]

FLOAT32 = 4
GPU_BYTES = 80e9  # of an A100 or H100
MARGIN = 1.2


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes a GPU.

    Attributes:
        weights: float32, a frozen autoencoder or teacher included.
        gradients: float32, of what is trained.
        optimizer: two float32 moments of AdamW.
        buckets: gradients once more, as DistributedDataParallel exchanges them among GPUs.
        copies: trained linear layers in bfloat16, which autocast keeps until the step ends.
        activations: of one micro-batch, saved for the backward pass.
        gathered: with shards: units that are whole at a time, with their gradients (the heads, what
            is no unit, and two layers), and the largest one's gradient in float32 on its way.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    copies: int
    activations: int
    gathered: int = 0

    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())

    def fits(self) -> bool:
        """Whether a GPU of 80 GB holds it, with `MARGIN` for what is not counted."""
        return self.total() * MARGIN <= GPU_BYTES


def memory_of(
    model: PreTrainedModel, run: Run, gpus: int, *, is_sharded: bool = False
) -> TrainingMemory:
    """Memory to train `model`, which may be on the meta device, as `run` says on so many GPUs.

    With `is_sharded` its weights are split among them.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    alignment: Any = getattr(model, "alignment", None)
    taught = alignment.teacher.parameters() if alignment is not None else ()
    size = sum(weight.numel() for weight in trained)
    weights = sum(weight.numel() for weight in (*model.parameters(), *taught))
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    matrices = sum(weight.numel() for weight in linears if weight.requires_grad)
    parts, split = gpus if is_sharded else 1, weights - _repeated(model) if is_sharded else 0
    return TrainingMemory(
        weights=FLOAT32 * (weights - split + _share(split, parts)),
        gradients=FLOAT32 * _share(size, parts),
        optimizer=2 * FLOAT32 * _share(size, parts),
        buckets=FLOAT32 * size if gpus > 1 and not is_sharded else 0,
        copies=2 * matrices if run.is_bf16 and not is_sharded else 0,
        activations=_activations(model, run),
        gathered=_gathered(model, split, run) if is_sharded else 0,
    )


def _share(elements: int, parts: int) -> int:
    return math.ceil(elements / parts)


def _repeated(model: PreTrainedModel) -> int:
    return sum(_numel(part) for part in units_of(model).repeated)


def _gathered(model: PreTrainedModel, split: int, run: Run) -> int:
    """Of the `split` weights those that are whole at a time."""
    units = units_of(model)
    layers = [_numel(layer) for layer in units.layers]
    kept = split - sum(layers)
    heads = [_numel(head) for head in units.heads]
    largest = max(*layers, *heads, kept - sum(heads))
    element = 2 if run.is_bf16 else FLOAT32
    return 2 * element * (kept + 2 * max(layers, default=0)) + FLOAT32 * largest


def _numel(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _activations(model: Any, run: Run) -> int:
    """Of one micro-batch."""
    element, tokens = 2 if run.is_bf16 else FLOAT32, run.micro_batch * run.block_size
    if isinstance(model, Autoencoder):
        return _of_autoencoder(model.config, tokens, element)
    if isinstance(model, BaselineTransformer):
        width, weight = model.config.hidden_size, model.lm_head.weight
        logits = tokens * (element + FLOAT32) * width + FLOAT32 * weight.numel()
        return _of_layers(model.config, tokens, element, run) + logits
    config, chunks = model.config, tokens // model.patch_size
    compressor = chunks * config.hidden_size * (element * (config.patch_size + 4) + FLOAT32)
    return (
        _of_layers(config, chunks, element, run)
        + compressor
        + chunks * _of_head(model.generative_head, config, element, run)
        + _of_terms(model, chunks, element)
    )


def _of_terms(model: Any, chunks: int, element: int) -> int:
    """Training terms: gradients of a readout; a piece of the chunks whose tokens are scored."""
    config, ae_config, total = model.config, model.ae_model.config, 0
    if model.token_readout is not None:
        size, width = config.patch_size, config.hidden_size
        slots = size * (element + FLOAT32)
        if model.token_readout.is_causal:  # tokens of each lag; the block's sum and its matmuls
            slots += element * size * (size - 1) // 2 + size * (FLOAT32 + 5 * element)
        total += chunks * slots * width + FLOAT32 * config.vocab_size * width
    if config.token_score_weight:
        draws, slots = config.token_score_samples, min(MAX_ORDER, config.patch_size)
        logits = draws * slots * config.vocab_size
        blocks = ae_config.num_decoder_layers // 2 * (1 + slots) * _of_block(ae_config, element)
        # The logits, their probabilities and the gradients of these.
        chunk = draws * blocks + (element + 2 * FLOAT32) * logits
        total += min(chunks, max(1, MAX_LOGITS // logits)) * chunk
    return total


def _of_layers(config: Any, positions: int, element: int, run: Run) -> int:
    """Layers of the backbone; see above."""
    width, heads = config.hidden_size, config.num_attention_heads
    rows = config.head_dim * (heads + config.num_key_value_heads)
    layer = (2 * FLOAT32 + 2 * element) * width + 2 * element * rows + FLOAT32 * heads
    layer += 4 * element * config.intermediate_size
    if run.is_checkpointed:  # inputs of all, and what one of them computes again
        return positions * (config.num_hidden_layers * FLOAT32 * width + layer)
    return positions * config.num_hidden_layers * layer


def _of_head(head: Any, config: Any, element: int, run: Run) -> int:
    """A chunk of the head: N draws of residual streams, matmuls, latents and their gradients."""
    width, blocks = config.hidden_size, config.num_mlp_layers
    whole = 1 if run.is_checkpointed or config.head_recompute else blocks  # blocks at a time
    latents = 2 * FLOAT32 * config.latent_size
    if isinstance(head, EnergyHead):  # as its kernels save them
        streams, matmuls = FLOAT32 * (blocks + 1), element * (4 * whole + 1)
        draw = (streams + matmuls) * width + latents
        return config.num_samples * draw + element * (blocks + 1) * width
    # Autograd saves 11 arrays a block of the denoiser, its input among them, and 12 besides.
    arrays = 10 * whole + blocks + 12
    return config.num_samples * (element * arrays * width + latents)


def _of_autoencoder(config: Any, tokens: int, element: int) -> int:
    """Residual blocks of tokens and of chunks, K slots between them, and the logits' gradients.

    A block that mixes slots is like one of tokens, whose inner width is 4 H.
    """
    width, chunks = config.hidden_size, tokens // config.patch_size
    blocks = (config.num_encoder_layers + config.num_decoder_layers) // 2
    slots = 2 * element * config.patch_size * width
    logits = tokens * (element + FLOAT32) * width + FLOAT32 * config.vocab_size * width
    slots += (
        2
        * config.num_mixing_layers
        * config.patch_size
        * ((FLOAT32 + 2 * element + 4 * element * INNER_FACTOR) * width)
    )
    return blocks * _of_block(config, element) * (tokens + chunks) + chunks * slots + logits


def _of_block(config: Any, element: int) -> int:
    """A residual block of the autoencoder, a row."""
    return (FLOAT32 + 2 * element) * config.hidden_size + 4 * element * config.intermediate_size
