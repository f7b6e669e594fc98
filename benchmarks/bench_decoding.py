"""A prompt continued, ours against the published algorithm, at both extremes of agreement."""

from functools import partial

import pytest
import torch

from benchmarks.measure import Requirement, compare
from benchmarks.models import as_published, autoencoder_config, calm_config
from benchmarks.published_decoding import eligible_chunks, published_candidates, published_generate
from benchmarks.shapes import DECODING
from calm import EnergyTransformer
from calm_kernels.noise import Stream, uniform

PUBLISHED = "published algorithm"
PUBLISHED_N200 = "published algorithm, T=1/2, N=200"
SEED = 5
ROUNDS = 5


def make_model():
    """Random weights, whose candidates rarely agree."""
    torch.manual_seed(0)
    scale = {"initializer": "fan_in", "embedding_std": 1.0}
    autoencoder = autoencoder_config(DECODING, **scale)
    config = calm_config(DECODING, ae_config=autoencoder, eos_token_id=None, **scale)
    return EnergyTransformer(config).eval()


def mute_noise(model):
    """All candidates agree from now on, though their latents differ."""
    embedding = model.mlp_generator.noise_embd
    with torch.no_grad():
        embedding.weight.mul_(1e-4)
        torch.nn.init.normal_(embedding.bias)  # a norm follows, so that noise alone has no scale
    return model


@pytest.fixture(scope="module")
def low_agreement():
    model = make_model()
    return model, as_published(model)


@pytest.fixture(scope="module")
def full_agreement():
    model = mute_noise(make_model())
    return model, as_published(model)


def prompt():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(DECODING.vocab_size, (1, DECODING.prompt_tokens), generator=generator)


def ours(model, **options):
    return model.generate(prompt(), max_new_tokens=DECODING.new_tokens, seed=SEED, **options)


def published(model, **options):
    return published_generate(model, prompt(), max_new_tokens=DECODING.new_tokens, **options)


def our_noise(index, count):
    """The head's noise that ours draws for chunk `index` of a sequence with this seed."""
    seed = torch.tensor([[SEED, index]])
    drawn = uniform(1, DECODING.noise_size, stream=Stream.HEAD, seed=seed, num_draws=count)
    return drawn - 0.5


def no_noise(index, count):
    return torch.zeros(count, 1, DECODING.noise_size)


@torch.no_grad()
def first_candidates(model):
    """The published candidates of the first chunk, from the noise of ours."""
    hidden = model.transformer(inputs_embeds=model.embed_patches(prompt())).last_hidden_state
    noise = our_noise(0, DECODING.num_samples)
    return [tuple(row) for row in published_candidates(model, hidden[:, -1], noise)[:, 0].tolist()]


def run(benchmark, ours, rivals, min_speedup):
    (rival,) = rivals
    compare(
        benchmark,
        ours,
        rivals,
        shape=DECODING,
        requirements=(Requirement(rival, min_speedup=min_speedup),),
        rounds=ROUNDS,
    )


@pytest.mark.benchmark(group="decoding, T=1")
def bench_direct(benchmark, low_agreement):
    model, rival = low_agreement
    for noise, scale in ((our_noise, 1.0), (no_noise, 0.0)):
        expected = published(rival, temperature=1.0, noise=noise)
        assert torch.equal(ours(model, temperature=1.0, noise_scale=scale), expected)
    run(
        benchmark,
        partial(ours, model, temperature=1.0),
        {PUBLISHED: partial(published, rival, temperature=1.0)},
        1.5,
    )


@pytest.mark.benchmark(group="decoding, T=1/2, N=200, low agreement")
def bench_batch_low_agreement(benchmark, low_agreement):
    model, rival = low_agreement
    options = {"temperature": 0.5, "num_samples": DECODING.num_samples}
    eligible, level = eligible_chunks(first_candidates(rival), 2)
    found = ours(model, return_details=True, **options)
    first = found.sequences[0, DECODING.prompt_tokens :][: DECODING.patch_size]
    assert tuple(first.tolist()) in eligible
    assert int(found.levels[0, 0]) == level
    assert float(found.levels.double().mean()) < 1.5, "candidates agree: not what is measured here"
    run(
        benchmark,
        partial(ours, model, **options),
        {PUBLISHED: partial(published, rival, **options)},
        2.5,
    )


@pytest.mark.benchmark(group="decoding, T=1/2, N=200, full agreement")
def bench_batch_full_agreement(benchmark, full_agreement):
    model, rival = full_agreement
    options = {"temperature": 0.5, "num_samples": DECODING.num_samples}
    assert len(set(first_candidates(rival))) == 1
    assert torch.equal(ours(model, **options), published(rival, noise=our_noise, **options))
    run(
        benchmark,
        partial(ours, model, **options),
        {PUBLISHED: partial(published, rival, **options)},
        1.1,
    )


@pytest.mark.benchmark(group="decoding, medoid, N=32, low agreement")
def bench_medoid(benchmark, low_agreement):
    model, rival = low_agreement
    expected = published(rival, temperature=1.0, noise=no_noise)
    options = {"method": "medoid", "num_samples": 32}
    assert torch.equal(ours(model, noise_scale=0.0, **options), expected)
    run(
        benchmark,
        partial(ours, model, **options),
        {PUBLISHED_N200: partial(published, rival, temperature=0.5)},
        5.0,
    )
