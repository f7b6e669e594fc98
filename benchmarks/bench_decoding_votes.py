"""From the candidates' latents to the chosen chunk, against decoding every candidate."""

import random
from dataclasses import dataclass

import pytest
import torch

from benchmarks.measure import Baseline, Requirement, compare
from benchmarks.models import as_published, autoencoder_config
from benchmarks.reference_decoding import reference_tokens, reference_vote
from benchmarks.shapes import DECODING
from calm import Autoencoder
from calm.decoding.sampling.lazy_decode import Candidates, decode_and_vote
from calm_kernels import agreeing_patch, use_backend

REFERENCE = "reference: all logits, a counter"
TEMPERATURE = 0.5
ROUNDS = 15


@dataclass(frozen=True)
class Agreement:
    """How alike the latents are, and the speed-up that is required then."""

    spread: float
    shared: tuple[float, float]  # candidates that share their first token: at least, at most
    min_speedup: float


AGREEMENTS = {
    "low agreement": Agreement(30.0, (0.0, 0.1), 2.0),
    "full agreement": Agreement(1e-4, (1.0, 1.0), 1.0),
}


def make_autoencoder():
    torch.manual_seed(0)
    return Autoencoder(autoencoder_config(DECODING, initializer="fan_in", embedding_std=1.0)).eval()


def make_latents(spread):
    """Candidates around one latent, ``[N, 1, L]``."""
    generator = torch.Generator().manual_seed(1)
    center = torch.randn(1, 1, DECODING.latent_size, generator=generator)
    size = (DECODING.num_samples, 1, DECODING.latent_size)
    return center + spread * torch.randn(size, generator=generator)


def reference(autoencoder, latents):
    """Full logits ``[N, K, V]``, their argmax, a counter."""
    with use_backend("reference"):
        tokens = reference_tokens(autoencoder.decoder, latents[:, 0])
    return reference_vote(list(map(tuple, tokens.tolist())), 2, random.Random(0))


def ours(decoder, latents, seed):
    candidates = Candidates(decoder.expand(latents), decoder.project)
    return decode_and_vote(candidates, TEMPERATURE, seed=seed)


@pytest.mark.parametrize("name", AGREEMENTS)
@torch.no_grad()
def bench_decoding_and_voting(benchmark, name):
    benchmark.group = f"decoding and voting, {name}"
    agreement, autoencoder, seed = AGREEMENTS[name], make_autoencoder(), torch.tensor([3, 0])
    latents, plain = make_latents(agreement.spread), as_published(autoencoder)

    def same_choice():
        chunks = reference_tokens(plain.decoder, latents[:, 0])
        _, place, counts = chunks[:, 0].unique(return_inverse=True, return_counts=True)
        least, most = agreement.shared
        assert least <= (counts[place] > 1).float().mean() <= most
        expected = agreeing_patch(chunks[None], 1 / TEMPERATURE, seed=seed, backend="reference")
        for mine, other in zip(ours(autoencoder.decoder, latents, seed), expected, strict=True):
            assert torch.equal(mine, other)

    compare(
        benchmark,
        lambda: ours(autoencoder.decoder, latents, seed),
        {REFERENCE: Baseline(lambda: reference(plain, latents), same_choice)},
        shape=DECODING,
        requirements=(Requirement(REFERENCE, min_speedup=agreement.min_speedup),),
        rounds=ROUNDS,
    )
