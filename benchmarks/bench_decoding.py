"""A prompt continued, against the reference decoding, where candidates agree and where not."""

from functools import partial

import pytest
import torch

from benchmarks.measure import Baseline, Requirement, compare
from benchmarks.models import as_published, autoencoder_config, calm_config
from benchmarks.reference_decoding import (
    chunk_noise,
    eligible_chunks,
    reference_candidates,
    reference_generate,
)
from benchmarks.shapes import DECODING
from calm import EnergyTransformer

REFERENCE = "reference decoding"
REFERENCE_N200 = "reference decoding, T=1/2, N=200"
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
    """From now on all candidates agree, though their latents differ."""
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


def reference(model, **options):
    return reference_generate(model, prompt(), max_new_tokens=DECODING.new_tokens, **options)


def our_noise(index, count):
    return chunk_noise(SEED, index, count, DECODING.noise_size)


def no_noise(index, count):
    return torch.zeros(count, 1, DECODING.noise_size)


@torch.no_grad()
def first_candidates(model):
    """Candidates of the reference for the first chunk, with the noise of ours."""
    hidden = model.transformer(inputs_embeds=model.embed_patches(prompt())).last_hidden_state
    noise = our_noise(0, DECODING.num_samples)
    return [tuple(row) for row in reference_candidates(model, hidden[:, -1], noise)[:, 0].tolist()]


def run(benchmark, ours, name, baseline, min_speedup):
    compare(
        benchmark,
        ours,
        {name: baseline},
        shape=DECODING,
        requirements=(Requirement(name, min_speedup=min_speedup),),
        rounds=ROUNDS,
    )


@pytest.mark.benchmark(group="decoding, T=1")
def bench_direct(benchmark, low_agreement):
    model, plain = low_agreement

    def same_text():
        for noise, scale in ((our_noise, 1.0), (no_noise, 0.0)):
            expected = reference(plain, temperature=1.0, noise=noise)
            assert torch.equal(ours(model, temperature=1.0, noise_scale=scale), expected)

    baseline = Baseline(partial(reference, plain, temperature=1.0), same_text)
    run(benchmark, partial(ours, model, temperature=1.0), REFERENCE, baseline, 1.5)


@pytest.mark.benchmark(group="decoding, T=1/2, N=200, low agreement")
def bench_batch_low_agreement(benchmark, low_agreement):
    model, plain = low_agreement
    options = {"temperature": 0.5, "num_samples": DECODING.num_samples}

    def eligible_first_chunk():
        eligible, level = eligible_chunks(first_candidates(plain), 2)
        found = ours(model, return_details=True, **options)
        first = found.sequences[0, DECODING.prompt_tokens :][: DECODING.patch_size]
        assert tuple(first.tolist()) in eligible
        assert int(found.levels[0, 0]) == level
        assert float(found.levels.double().mean()) < 1.5, "candidates agree: not what is measured"

    baseline = Baseline(partial(reference, plain, **options), eligible_first_chunk)
    run(benchmark, partial(ours, model, **options), REFERENCE, baseline, 2.5)


@pytest.mark.benchmark(group="decoding, T=1/2, N=200, full agreement")
def bench_batch_full_agreement(benchmark, full_agreement):
    model, plain = full_agreement
    options = {"temperature": 0.5, "num_samples": DECODING.num_samples}

    def same_text():
        assert len(set(first_candidates(plain))) == 1
        assert torch.equal(ours(model, **options), reference(plain, noise=our_noise, **options))

    baseline = Baseline(partial(reference, plain, **options), same_text)
    run(benchmark, partial(ours, model, **options), REFERENCE, baseline, 1.1)


@pytest.mark.benchmark(group="decoding, medoid, N=32, low agreement")
def bench_medoid(benchmark, low_agreement):
    model, plain = low_agreement
    options = {"method": "medoid", "num_samples": 32}

    def same_text_without_noise():
        expected = reference(plain, temperature=1.0, noise=no_noise)
        assert torch.equal(ours(model, noise_scale=0.0, **options), expected)

    baseline = Baseline(partial(reference, plain, temperature=0.5), same_text_without_noise)
    run(benchmark, partial(ours, model, **options), REFERENCE_N200, baseline, 5.0)
