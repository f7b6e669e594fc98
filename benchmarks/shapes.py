"""Named shapes of every benchmark; the letters are those of the package (N, M, L, H, V, K)."""

from dataclasses import dataclass

__all__ = [
    "DECODING",
    "DECODING_LAYER",
    "ENERGY",
    "HEAD",
    "PROJECTION",
    "REPARAMETERIZE",
    "STEP",
    "VOTE",
    "DecodingShape",
    "StepShape",
]


@dataclass(frozen=True)
class EnergyShape:
    """Energy score: R chunks, N samples against M targets in L dimensions."""

    num_rows: int = 512
    num_samples: int = 8
    num_targets: int = 100
    latent_size: int = 128


@dataclass(frozen=True)
class HeadShape:
    """Energy head: N noisy evaluations at R positions."""

    num_rows: int = 512
    num_samples: int = 8
    hidden_size: int = 256
    latent_size: int = 128
    noise_size: int = 64
    num_blocks: int = 4


@dataclass(frozen=True)
class ReparameterizeShape:
    """Variational autoencoder: R chunks, L latent dimensions."""

    num_rows: int = 8192
    latent_size: int = 128


@dataclass(frozen=True)
class ProjectionShape:
    """Vocabulary projection: R rows of width H against V entries."""

    num_rows: int = 800
    hidden_size: int = 512
    vocab_size: int = 32768


@dataclass(frozen=True)
class VoteShape:
    """Vote: B sequences, N candidates of K tokens, n that must agree."""

    batch_size: int = 16
    num_candidates: int = 200
    patch_size: int = 4
    num_agreeing: int = 2


@dataclass(frozen=True)
class ModelShape:
    """A small CALM."""

    vocab_size: int = 8192
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 688
    num_blocks: int = 4
    noise_size: int = 64
    latent_size: int = 128
    ae_hidden_size: int = 256
    ae_intermediate_size: int = 640
    patch_size: int = 4


@dataclass(frozen=True)
class StepShape(ModelShape):
    """The bench configuration, and the batch of a training step."""

    num_samples: int = 8
    num_targets: int = 100
    batch_size: int = 4
    block_size: int = 512


@dataclass(frozen=True)
class DecodingShape(ModelShape):
    """The bench configuration, and a prompt to continue; below T = 1 with N candidates a chunk."""

    prompt_tokens: int = 32
    new_tokens: int = 64
    num_samples: int = 200


DECODING = DecodingShape()


@dataclass(frozen=True)
class DecodingLayerShape:
    """A layer of a decode step: CALM-M's, with half a context of chunks."""

    hidden_size: int = 1024
    intermediate_size: int = 2752
    num_heads: int = 16
    head_size: int = 64
    capacity: int = 256


DECODING_LAYER = DecodingLayerShape()
ENERGY = EnergyShape()
HEAD = HeadShape()
REPARAMETERIZE = ReparameterizeShape()
PROJECTION = ProjectionShape()
VOTE = VoteShape()
STEP = StepShape()
