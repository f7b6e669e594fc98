"""Generation with the token-by-token baseline."""

import pytest
import torch
from tiny_models import Recorder, prompt, tiny_baseline

from calm.decoding import generate
from calm.errors import UserError
from calm_kernels import noise
from calm_kernels.softmax_draws import draw_tokens


def test_the_baseline_samples_from_its_softmax():
    model, ids = tiny_baseline(), prompt(1, 5, vocab_size=3)
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    for temperature in (1.0, 0.5):
        result = generate(
            model, ids.expand(3000, -1), max_new_tokens=1, temperature=temperature, seed=0
        )
        probabilities = (logits / temperature).softmax(-1)
        shares = torch.bincount(result[:, -1], minlength=3) / 3000
        assert (
            (shares - probabilities).abs()
            < 4 * (probabilities * (1 - probabilities) / 3000).sqrt() + 1e-4
        ).all()


def test_seeds_of_the_baseline():
    """Where the model has no pad token, its end token stands in."""
    model, ids = tiny_baseline(eos_token_id=2), prompt(3, 5, vocab_size=2)
    options = {"max_new_tokens": 12, "temperature": 1.0}
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    together = generate(model, ids, seed=[4, 5, 6], **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    for row, seed in enumerate([4, 5, 6]):
        alone = generate(model, ids[row : row + 1], seed=seed, **options)[0]
        assert torch.equal(together[row, : len(alone)], alone)
        assert (together[row, len(alone) :] == 2).all()  # ends where it has no pad token


def test_the_baseline_streams_and_truncates():
    streamer, model = Recorder(), tiny_baseline(max_position_embeddings=16)
    ids = prompt(1, 12, vocab_size=3)
    with pytest.raises(UserError, match="exceed the context of 16 tokens"):
        generate(model, ids, max_new_tokens=8)
    result = generate(model, ids, max_new_tokens=8, truncate=True, seed=0, streamer=streamer)
    assert torch.equal(result[:, :8], ids[:, -8:]) and streamer.has_ended
    assert (
        torch.cat([part.reshape(-1) for part in streamer.received]).tolist() == result[0].tolist()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature must lie in \(0, 1\], got 0.0"),
        ({"temperature": 1.5}, r"temperature must lie in \(0, 1\], got 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1"),
        ({"seed": [1, 2]}, "seed must hold one number per sequence, 1; got 2"),
        ({"input_ids": torch.tensor([[3]])}, r"must lie in \[0, 3\)"),
        ({"input_ids": [[1], []]}, "the prompt is empty"),
        ({"noise_scale": 0.5}, "noise_scale must be 1 for a BaselineTransformer"),
        ({"method": "direct", "temperature": 0.5}, "temperature must be 1, got 0.5"),
    ],
)
def test_bad_arguments_for_the_baseline(options, message):
    arguments = {"input_ids": prompt(1, 4, vocab_size=3), "max_new_tokens": 4, **options}
    with pytest.raises(UserError, match=message):
        generate(tiny_baseline(), **arguments)


def test_logits_of_the_baseline_that_overflow_are_reported():
    model = tiny_baseline()
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    with pytest.raises(UserError, match="latents or logits that are not finite"):
        model.generate(prompt(1, 4, vocab_size=3), max_new_tokens=4)


def test_the_baseline_continues_as_without_a_cache():
    """Reading the whole text again for every token gives the same text for the same draws."""
    model, ids = tiny_baseline(vocab_size=7), prompt(2, 5)
    result = model.generate(ids, max_new_tokens=12, temperature=0.7, seed=[3, 4])
    for length in range(5, 17):
        for row, seed in enumerate((3, 4)):
            here = torch.tensor([[seed, length - 5]])
            drawn = noise.uniform(
                1, 1, stream=noise.Stream.VOTE, seed=here, dtype=torch.float64
            ).item()
            with torch.no_grad():
                logits = model(result[row : row + 1, :length]).logits[0, -1]
            reached = (logits / 0.7).softmax(-1).cumsum(0)
            assert result[row, length] == (reached <= drawn).sum()


def test_a_token_of_probability_zero_is_never_drawn():
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75], [0.5, 0.5, 0.0, 0.0]])
    uniforms = torch.tensor([[0.0, 0.25, 0.9], [0.0, 0.5, 0.999]], dtype=torch.float64)
    assert draw_tokens(probabilities, uniforms).tolist() == [[1, 3, 3], [0, 1, 1]]
