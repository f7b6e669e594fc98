"""Floating-point operations of a model, part by part, a token.

A weight of a matrix costs two operations a use (a multiplication and an addition). Attention costs
4 S d a layer and position: each query meets all S keys, each probability all S values, d wide in
all heads together; the half that a causal kernel skips is counted, as papers do. A backward pass
costs twice its forward. Not counted: embedding lookups, norms, activations, biases, the optimizer,
and what checkpointing computes again.

Counted is what this code executes. What a head computes from the hidden state alone is therefore
counted once a chunk, however many latents are drawn; the published code computes it for every draw.

Source: the convention reproduces table 1 of CALM (arXiv 2510.27688), inference and training, within
4 %. With the hidden state's part counted for every draw, training of CALM-M, -L and -XL lies 4, 6
and 11 % above the table, instead of 4 and 3 % below and 2 % above it. The paper does not give its
formula: what remains is unexplained.
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from calm.models import Autoencoder, BaselineTransformer, ContinuousTransformer
from calm.models.agreement import MAX_ORDER
from calm.models.autoencoder import Decoder
from calm.models.backbone import Backbone
from calm.models.heads.base import GenerativeHead
from calm.models.heads.denoising import DenoisingHead
from calm.models.heads.steered import SteeredHead
from calm.models.readout import TokenReadout
from calm_kernels.energy_head import EnergyHead

__all__ = [
    "PEAK",
    "AutoencoderFlops",
    "BaselineFlops",
    "CALMFlops",
    "Flops",
    "HeadFlops",
    "flops_of",
    "peak_of",
]


PEAK = 989e12  # operations a second, dense bfloat16, of an H100 or H200 (SXM)
# Likewise, by the words in a GPU's name, as their makers state it; the first that fits counts.
PEAKS = {
    ("B200",): 2250e12,
    ("H200", "NVL"): 835e12,
    ("H200",): PEAK,
    ("GH200",): PEAK,
    ("H100", "NVL"): 835e12,
    ("H100", "PCIe"): 756e12,
    ("H100",): PEAK,
    ("A100",): 312e12,
    ("L40S",): 362e12,
    ("L4",): 121e12,
    ("4090",): 165e12,
}


@dataclass(frozen=True)
class AutoencoderFlops:
    """Forward of a chunk of K tokens.

    Attributes:
        patch_size: K.
        encoder: K tokens to a latent.
        decoder: a latent to the logits of K tokens.
        projection: of a latent to its teacher's width, where it has one; else 0.
        teacher: K tokens to its middle layer; likewise.
    """

    patch_size: int
    encoder: int
    decoder: int
    projection: int = 0
    teacher: int = 0

    def training(self) -> float:
        """Operations to learn from a token: 3 (E + D) / K, and `training_terms`."""
        return 3 * self.inference() + sum(self.training_terms().values())

    def training_terms(self) -> dict[str, float]:
        """What a teacher costs a token, by the term's name: ``alignment``, (3 P + T) / K."""
        cost = (3 * self.projection + self.teacher) / self.patch_size
        return {"alignment": cost} if cost else {}

    def inference(self, num_draws: int = 1) -> float:
        """Operations to read a token and write it `num_draws` times: (E + N D) / K."""
        return (self.encoder + num_draws * self.decoder) / self.patch_size


@dataclass(frozen=True)
class BaselineFlops:
    """Forward of a token.

    Attributes:
        backbone: its layers, with attention.
        output: hidden state to logits.
    """

    backbone: int
    output: int

    def training(self) -> float:
        """Operations to learn from a token: 3 (B + O)."""
        return 3 * self.inference()

    def inference(self, num_draws: int = 1) -> float:
        """Operations to generate a token: B + O, as its candidates are the vocabulary."""
        return self.backbone + self.output


class HeadFlops(NamedTuple):
    """Forward of a head: ``once`` for a hidden state, ``draw`` for each of its draws."""

    once: int
    draw: int

    def of(self, num_draws: int) -> int:
        """Once + N draw."""
        return self.once + num_draws * self.draw


@dataclass(frozen=True)
class CALMFlops:
    """Forward of a chunk of K tokens.

    Attributes:
        patch_size: K.
        num_samples: N of training.
        backbone: its layers, with attention.
        compressor: what makes the backbone's input of a chunk, without the encoder.
        reads_latents: whether the encoder is part of that.
        learning: the head in training; a draw is one evaluation of its network.
        drawing: the head at generation; a draw is one latent, 1 (energy), 20 (flow) or 100
            (diffusion) evaluations.
        encoder: of the autoencoder.
        decoder: likewise.
        readout: of the K tokens from the hidden state, with ``token_loss_weight``; else 0.
        token_score: decoding the draws that ``token_score_weight`` scores to probabilities; else 0.
        score_share: of the training steps in which they are scored.
    """

    patch_size: int
    num_samples: int
    backbone: int
    compressor: int
    reads_latents: bool
    learning: HeadFlops
    drawing: HeadFlops
    encoder: int
    decoder: int
    readout: int = 0
    token_score: int = 0
    score_share: float = 0.0

    def training(self) -> float:
        """Operations to learn from a token: (3 (B + C + H₁ + N H) + E) / K, and `training_terms`.

        The autoencoder is frozen: it encodes the targets, and inputs that are latents once more.
        """
        learned = self.backbone + self.compressor + self.learning.of(self.num_samples)
        encoded = (1 + self.reads_latents) * self.encoder
        return (3 * learned + encoded) / self.patch_size + sum(self.training_terms().values())

    def training_terms(self) -> dict[str, float]:
        """What terms beside the head's loss cost a token, those that are on, by their names.

        ``token_loss``: 3 R / K. ``token_score``: 2 T / K in a share of the steps, as the decoder's
        weights are frozen.
        """
        costs = {
            "token_loss": 3 * self.readout / self.patch_size,
            "token_score": 2 * self.token_score * self.score_share / self.patch_size,
        }
        return {name: cost for name, cost in costs.items() if cost}

    def inference(self, num_draws: int = 1) -> float:
        """Operations to generate a token from N candidates: (B + C + H₁ + N (H + D)) / K.

        Every candidate is decoded. Inputs that are latents cost E more.
        """
        drawn = self.drawing.of(num_draws) + num_draws * self.decoder
        return (self._reading() + drawn) / self.patch_size

    def inference_by_readout(self) -> float:
        """Operations to generate a token by ``method="readout"``: (B + C + R) / K at any T."""
        return (self._reading() + self.readout) / self.patch_size

    def _reading(self) -> int:
        """A chunk to the hidden state after it."""
        return self.backbone + self.compressor + self.reads_latents * self.encoder


Flops = AutoencoderFlops | BaselineFlops | CALMFlops


def peak_of(device: torch.device) -> float | None:
    """Operations a second of `device`, dense bfloat16; None where that is not known."""
    if device.type != "cuda":
        return None
    words = re.split(r"[\s-]+", torch.cuda.get_device_name(device))
    return next((peak for named, peak in PEAKS.items() if set(named) <= set(words)), None)


def flops_of(model: PreTrainedModel, context: int = 2048) -> Flops:
    """Operations of `model`, which may be on the meta device.

    Args:
        model: an autoencoder, a CALM or the token baseline.
        context: S, positions that attention reads: chunks of a CALM, tokens of the baseline. The
            paper's tables fit 2048 of either. An autoencoder's teacher reads the tokens of so many
            chunks.

    Raises:
        ValueError: another kind of model, or a context below 1.
    """
    if context < 1:
        raise ValueError(f"context must be at least 1 position, got {context}")
    if isinstance(model, Autoencoder):
        return AutoencoderFlops(
            model.patch_size, *_autoencoder(model), *_teacher(model, model.patch_size * context)
        )
    if isinstance(model, BaselineTransformer):
        return BaselineFlops(_backbone(model.model, context), _matrices(model.lm_head))
    if not isinstance(model, ContinuousTransformer):
        raise ValueError(f"model must be one of calm.models, got {type(model).__name__}")
    encoder, decoder = _autoencoder(model.ae_model)
    readout, token_score = _training_terms(model)
    learning, drawing = _head(model.generative_head)
    compressors = (getattr(model, name, None) for name in ("embed_proj", "latent_proj"))
    return CALMFlops(
        patch_size=model.patch_size,
        num_samples=model.config.num_samples,
        backbone=_backbone(model.transformer, context),
        compressor=sum(_matrices(part) for part in compressors if part is not None),
        reads_latents=model.config.input_type != "tokens",
        learning=learning,
        drawing=drawing,
        encoder=encoder,
        decoder=decoder,
        readout=readout,
        token_score=token_score,
        score_share=1.0 - model.config.token_score_start,
    )


def _matrices(*modules: nn.Module) -> int:
    """Two operations for each weight of the matrices in `modules`."""
    weights = (weight for module in modules for weight in module.parameters())
    return 2 * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _backbone(backbone: Backbone, context: int) -> int:
    layers: Any = backbone.layers
    width = sum(layer.self_attn.o_proj.in_features for layer in layers)
    return _matrices(layers) + 4 * context * width


def _autoencoder(model: Autoencoder) -> tuple[int, int]:
    """Encoder and decoder; half of the blocks of each run for every token of a chunk."""
    encoder, decoder = model.encoder, model.decoder
    middle = len(encoder.encoder_layers) // 2
    of_tokens, of_chunk = encoder.encoder_layers[:middle], encoder.encoder_layers[middle:]
    reading = model.patch_size * _matrices(of_tokens)
    reading += _matrices(encoder.squeeze_layer, of_chunk, encoder.hidden_to_latent)
    reading += encoder.squeeze_layer.out_features * _matrices(encoder.mixing_layers)
    return reading, _decoder(decoder, model.patch_size)


def _teacher(model: Autoencoder, context: int) -> tuple[int, int]:
    """Projection of a chunk, and its teacher's layers for K tokens, which attend to `context`."""
    alignment = model.alignment
    if alignment is None:
        return 0, 0
    return _matrices(alignment.projection), model.patch_size * _backbone(alignment.teacher, context)


def _decoder(decoder: Decoder, slots: int) -> int:
    """A latent to the logits of so many slots."""
    middle = len(decoder.decoder_layers) // 2
    of_chunk, of_tokens = decoder.decoder_layers[:middle], decoder.decoder_layers[middle:]
    writing = _matrices(decoder.latent_to_hidden, of_chunk, decoder.expand_layer)
    writing += decoder.latent_to_hidden.out_features * _matrices(decoder.mixing_layers)
    return writing + slots * (_matrices(of_tokens) + 2 * decoder.output_weight.numel())


def _training_terms(model: ContinuousTransformer) -> tuple[int, int]:
    """The readout of a chunk, and the decoding of its scored draws."""
    config, readout, score = model.config, 0, 0
    if model.token_readout is not None:
        embedding: Any = model.get_input_embeddings()
        readout = _readout(model.token_readout) + model.patch_size * _matrices(embedding)
    if config.token_score_weight:
        slots = min(MAX_ORDER, model.patch_size)
        score = config.token_score_samples * _decoder(model.ae_model.decoder, slots)
    return readout, score


def _readout(readout: TokenReadout) -> int:
    """Features of K slots: of lag d there are K - d, of what all slots share K."""
    size = readout.patch_size
    lags = sum((size - lag) * _matrices(linear) for lag, linear in enumerate(readout.earlier, 1))
    shared = (readout.gate, readout.up, readout.down) if readout.is_causal else ()
    return _matrices(readout.slots) + lags + size * _matrices(*shared)


def _head(head: GenerativeHead) -> tuple[HeadFlops, HeadFlops]:
    """The head in training and at generation."""
    if isinstance(head, EnergyHead):
        # Every block's first matrix sees [draw; hidden state]: half of it is done once.
        once = _matrices(head.hidden_embd) + 2 * head.num_blocks * head.hidden_size**2
        if isinstance(head, SteeredHead):
            once += _matrices(head.noise_policy)
        both = HeadFlops(once, _matrices(head) - once)
        return both, both
    if not isinstance(head, DenoisingHead):
        raise ValueError(f"no operations are known of a {type(head).__name__}")
    net, evaluations = head.net, head.num_evaluations
    once, time = _matrices(net.cond_embed), _matrices(net.time_embed)
    layers = (*net.res_blocks, net.final_layer)
    modulation = _matrices(*(layer.adaLN_modulation for layer in layers))
    draw = _matrices(net) - once - time - modulation
    # Each training draw has a time of its own. All that are generated take the same steps, so that
    # the modulations are computed once for a hidden state and step, and the time once for all.
    return (
        HeadFlops(once, time + modulation + draw),
        HeadFlops(once + evaluations * modulation, evaluations * draw),
    )
