"""Brier-n of models: against the published numbers, and against enumerated distributions."""

from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_baseline, tiny_calm

from calm.errors import UserError
from calm.evaluation import brier_scores, rollout, samplers
from calm.models import MODEL_CLASSES
from calm_kernels.noise import as_seed

GOLDENS = Path(__file__).parents[1] / "goldens"
ORDERS = ("brier1", "brier2", "brier3", "brier4")


def stacked(scores):
    return torch.stack([scores[order] for order in ORDERS], dim=-1)  # [B, 4]


def random_ids(shape, vocab_size=3, seed=1):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("brier_draws", [2, None])
@pytest.mark.parametrize("case", ["energy-k1", "energy-k2", "energy-k4", "diffusion-k4", "flow-k4"])
def test_the_published_scores_without_noise(case, brier_draws):
    model_class = MODEL_CLASSES[case.partition("-")[0]]
    model = model_class.from_pretrained(GOLDENS / case, dtype=torch.float32)
    golden = load_file(GOLDENS / case / "io.safetensors")
    scores = brier_scores(
        model, golden["brier.input_ids"], noise_scale=0.0, brier_draws=brier_draws
    )
    for order in ORDERS:
        assert scores[order].shape == (2,)
        assert scores[order].mean().item() == pytest.approx(golden[f"zero_noise.{order}"].item())


def mean_over_seeds(model, input_ids, seeds, **options):
    """Mean and standard error over seeds, as rows of one batch that draw independently."""
    batch = input_ids.expand(seeds, -1)
    scores = stacked(brier_scores(model, batch, **options))
    return scores.mean(0), scores.std(0) / seeds**0.5


@torch.no_grad()
def exact_baseline(model, tokens):
    """Brier-1 to Brier-4 of one sequence by enumerating every n-gram after every prefix."""

    def distribution(prefix):
        return model(torch.tensor([prefix])).logits[0, -1].double().softmax(-1)

    def squares(prefix, order):  # sum over n-grams of P(n-gram)^2
        here = distribution(prefix)
        if order == 1:
            return here.square().sum()
        return sum(
            here[token] ** 2 * squares([*prefix, token], order - 1) for token in range(len(here))
        )

    starts = range(1, len(tokens) - 4)  # the first S - 4 of S = T - 1 predicted tokens
    total = torch.zeros(4, dtype=torch.float64)
    for start in starts:
        chance = 1.0
        for order in range(1, 5):
            chance *= distribution(tokens[: start + order - 1])[tokens[start + order - 1]]
            total[order - 1] += 2 * chance - squares(tokens[:start], order)
    return total / len(starts)


def test_the_baseline_is_unbiased():
    model, ids = tiny_baseline(), random_ids((1, 8))
    exact = exact_baseline(model, ids[0].tolist())
    errors = []
    for brier_draws in (None, 2):
        mean, error = mean_over_seeds(model, ids, 2000, brier_draws=brier_draws)
        # Brier-1 needs no draw; the tolerance is that of float32.
        assert ((mean - exact).abs() < 4 * error + 1e-5).all(), (mean, exact, error)
        errors.append(error)
    assert (errors[0][1:] < errors[1][1:]).all()  # exact chances vary less than a second draw


@torch.no_grad()
def enumerated_calm(model, tokens, draws=20_000):
    """Brier-1 to Brier-4 for K < 4 from the distribution of every chunk after every prefix."""
    size = model.patch_size
    outcomes = torch.tensor(list(product(range(model.config.vocab_size), repeat=size)))
    powers = model.config.vocab_size ** torch.arange(size - 1, -1, -1)

    @cache
    def distribution_after(prefix):
        inputs = model.embed_patches(torch.tensor([prefix]))
        hidden = model.transformer(inputs_embeds=inputs).last_hidden_state[:, -1]
        latents = model.generative_head.sample(hidden, num_samples=draws, seed=as_seed(None, "cpu"))
        drawn = model.decode_latents(latents)[:, 0]
        return torch.bincount((drawn * powers).sum(-1), minlength=len(outcomes)).double() / draws

    def distribution(prefix):
        return distribution_after(tuple(prefix))

    def prefix_probabilities(probabilities, order):  # of the first `order` tokens of a chunk
        index = (outcomes[:, :order] * powers[-order:]).sum(-1)
        return torch.zeros(len(outcomes), dtype=torch.float64).index_add(0, index, probabilities)

    def squares(prefix, order):
        here = distribution(prefix)
        if order <= size:
            return prefix_probabilities(here, order).square().sum()
        following = [squares([*prefix, *chunk.tolist()], order - size) for chunk in outcomes]
        return (here.square() * torch.stack(following)).sum()

    def chance(prefix, following):
        here = distribution(prefix)
        index = (torch.tensor(following[:size]) * powers[-len(following[:size]) :]).sum()
        first = prefix_probabilities(here, min(len(following), size))[index]
        if len(following) <= size:
            return first
        return first * chance([*prefix, *following[:size]], following[size:])

    chunks = -(-4 // size)
    starts = range(1, len(tokens) // size - chunks)
    total = torch.zeros(4, dtype=torch.float64)
    for start in starts:
        prefix, rest = tokens[: start * size], tokens[start * size :]
        for order in range(1, 5):
            total[order - 1] += 2 * chance(prefix, rest[:order]) - squares(prefix, order)
    return total / len(starts)


@pytest.mark.parametrize(
    ("patch_size", "vocab_size", "num_chunks"),
    [(2, 3, 4), (3, 2, 4), (1, 2, 6)],
    ids=["K2", "K3", "K1"],
)
@pytest.mark.parametrize("brier_draws", [None, 2], ids=["all", "published"])
def test_rollouts_are_unbiased(patch_size, vocab_size, num_chunks, brier_draws):
    model = tiny_calm(patch_size=patch_size, vocab_size=vocab_size)
    ids = random_ids((1, num_chunks * patch_size), vocab_size)
    torch.manual_seed(0)
    expected = enumerated_calm(model, ids[0].tolist())
    mean, error = mean_over_seeds(model, ids, 1500, num_samples=6, brier_draws=brier_draws)
    # The enumeration is itself estimated, from 20,000 draws a prefix: 4 * sqrt(1/4 / 20000).
    assert ((mean - expected).abs() < 4 * error + 0.014).all(), (mean, expected, error)


def test_all_draws_vary_less_than_the_published_two():
    model, ids = tiny_calm(patch_size=2, vocab_size=3), random_ids((1, 12))
    _, published = mean_over_seeds(model, ids, 500, brier_draws=2)
    _, all_draws = mean_over_seeds(model, ids, 500)
    assert (all_draws < 0.75 * published).all()


def test_two_of_many_draws_are_the_two():
    model, ids = tiny_calm(), random_ids((2, 24), 5)
    two = stacked(brier_scores(model, ids, num_samples=2))
    of_many = stacked(brier_scores(model, ids, num_samples=8, brier_draws=2))
    assert torch.equal(two, of_many)


@pytest.mark.parametrize("head", ["energy", "diffusion", "flow"])
def test_every_head_scores_and_repeats_itself(head):
    model, ids = tiny_calm(head), random_ids((1, 12), 5)
    first, again = (stacked(brier_scores(model, ids, seed=3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, stacked(brier_scores(model, ids, seed=4)))
    assert (first.abs() <= 1).all()


@pytest.mark.parametrize("patch_size", [1, 2], ids=["K1", "K2"])
def test_branches_see_their_own_prefix_only(patch_size):
    model, ids = tiny_calm(patch_size=patch_size), random_ids((2, 6 * patch_size), 5)
    inputs = model.embed_patches(ids)
    steps = [model.embed_patches(random_ids((2, 3 * patch_size), 5, seed)) for seed in (2, 3)]
    starts = torch.tensor([0, 2, 5])
    with torch.no_grad():
        branches = rollout.Branches(model.transformer, inputs)
        for _ in range(2):  # a second round finds the cache as the first did
            branches.begin(starts)
            hidden = [branches.extend(step) for step in steps]
        for place, start in enumerate(starts.tolist()):
            alone = [inputs[:, : start + 1], *(step[:, place : place + 1] for step in steps)]
            expected = model.transformer(inputs_embeds=torch.cat(alone, 1)).last_hidden_state
            for depth in (0, 1):
                torch.testing.assert_close(
                    hidden[depth][:, place], expected[:, start + 1 + depth], rtol=1e-5, atol=1e-5
                )


@pytest.mark.parametrize("make", [tiny_calm, tiny_baseline], ids=["calm", "baseline"])
def test_branches_advance_in_groups_without_changing_the_score(make, monkeypatch):
    model = make(**({"patch_size": 2} if make is tiny_calm else {}), vocab_size=3)
    ids = random_ids((2, 20))
    whole = stacked(brier_scores(model, ids))
    monkeypatch.setattr(rollout, "MAX_BRANCHES", 3)
    torch.testing.assert_close(stacked(brier_scores(model, ids)), whole)


def test_draws_in_slices_are_the_same_draws(monkeypatch):
    model, ids = tiny_calm(), random_ids((2, 24), 5)
    whole = stacked(brier_scores(model, ids))
    monkeypatch.setattr(samplers, "DRAWS_AT_A_TIME", 24)  # three rows of eight
    torch.testing.assert_close(stacked(brier_scores(model, ids)), whole)
    baseline = tiny_baseline(vocab_size=5)
    whole = stacked(brier_scores(baseline, ids))
    monkeypatch.setattr(samplers, "LOGITS_AT_A_TIME", 15)
    torch.testing.assert_close(stacked(brier_scores(baseline, ids)), whole)


@pytest.mark.parametrize("make", [tiny_calm, tiny_baseline], ids=["calm", "baseline"])
def test_eager_attention_scores_the_same_and_unmasked_attention_is_refused(make):
    model = make(**({"patch_size": 2} if make is tiny_calm else {}), vocab_size=3)
    ids = random_ids((2, 20))
    expected = stacked(brier_scores(model, ids))
    model.set_attn_implementation("eager")
    torch.testing.assert_close(stacked(brier_scores(model, ids)), expected)
    backbone = model.transformer if make is tiny_calm else model.model
    branches = rollout.Branches(backbone, torch.zeros(1, 3, 32))
    branches.begin(torch.tensor([0]))
    backbone.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="load the model with attn_implementation='sdpa'"):
        branches.extend(torch.zeros(1, 1, 32))


@pytest.mark.parametrize(("patch_size", "positions"), [(4, 5), (8, 5), (2, 3), (3, 3)])
def test_the_published_positions_are_counted(patch_size, positions):
    model = tiny_calm(patch_size=patch_size)
    ids = random_ids((1, 6 * patch_size), 5)
    # Without noise every position scores 1 or -1, so a score is a multiple of 2 / positions.
    score = stacked(brier_scores(model, ids, noise_scale=0.0))
    times = (score + 1) * positions / 2
    torch.testing.assert_close(times, times.round(), rtol=0, atol=1e-9)
    scored = brier_scores(model, ids, labels=mask_all_but_last_window(ids, patch_size, positions))
    assert not stacked(scored).isnan().any()


def mask_all_but_last_window(ids, patch_size, positions):
    """Labels that leave the last scored n-gram alone."""
    chunks = max(1, -(-4 // patch_size))
    predicted = positions if chunks == 1 else positions + chunks
    first = ids.shape[1] - (predicted - positions + 1) * patch_size
    labels = torch.full_like(ids, -100)
    labels[:, first : first + 4] = ids[:, first : first + 4]
    return labels


def test_padding_is_left_out():
    model, ids = tiny_calm(), random_ids((1, 24), 5)
    labels = ids.clone()
    labels[:, 18:] = -100  # the fifth chunk is half text, half padding
    padded = brier_scores(model, ids, labels=labels)
    cut = brier_scores(model, ids[:, :16])
    torch.testing.assert_close(stacked(padded), stacked(cut))
    nothing = brier_scores(model, ids, labels=torch.full_like(ids, -100))
    assert stacked(nothing).isnan().all()


def test_windows_of_one_token_can_be_left_out():
    model, ids = tiny_calm(), random_ids((1, 16), 5)
    repeated = ids.clone()
    repeated[:, 8:12] = 3
    labels = repeated.clone()
    labels[:, 8:12] = -100
    skipped = stacked(brier_scores(model, repeated, skip_repeats=True))
    torch.testing.assert_close(skipped, stacked(brier_scores(model, repeated, labels=labels)))
    assert not torch.equal(skipped, stacked(brier_scores(model, repeated)))


def test_scoring_leaves_the_model_as_it_was():
    model = tiny_calm().train()
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    scores = brier_scores(model, random_ids((1, 16), 5))
    assert model.training and not model.ae_model.training
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not scores["brier1"].requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"brier_draws": 9}, "brier_draws lie between 2 and num_samples; got num_samples="),
        ({"noise_scale": -1.0}, "noise_scale must be finite and at least 0, got -1.0"),
        ({"labels": torch.zeros(1, 4, dtype=torch.int64)}, "labels must have the shape"),
        ({"input_ids": torch.zeros(1, 6, dtype=torch.int64)}, "multiple of the chunk size 4"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.int64)}, "at least 8; got 4 tokens"),
        ({"input_ids": torch.zeros(8)}, r"input_ids must be int64 \[B, T\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments_are_named(options, message):
    arguments = {"input_ids": torch.zeros(1, 8, dtype=torch.int64), **options}
    with pytest.raises(UserError, match=message):
        brier_scores(tiny_calm(), **arguments)


def test_the_baseline_has_no_noise_to_scale():
    with pytest.raises(UserError, match="noise_scale must be 1 for a BaselineTransformer"):
        brier_scores(tiny_baseline(), random_ids((1, 8)), noise_scale=0.5)


def test_other_models_are_refused():
    with pytest.raises(UserError, match="model must be a CALM or the token baseline"):
        brier_scores(torch.nn.Linear(1, 1), random_ids((1, 8)))
