"""The kernel score of tokens: its formula, that it is proper, its gradients, its pieces."""

import itertools
import math

import pytest
import tiny
import torch

from calm.models.token_score import mixture_scores, token_scores

V, N, R, SLOTS = 5, 3, 4, 3


def distributions(*shape, seed=0):
    """Random distributions of the last dimension, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1)


def by_loops(p, tokens):
    """The formula as it is written, for one chunk: p ``[N, n, V]``, tokens ``[n]``."""
    draws, scores = range(len(p)), []
    for n in range(1, len(tokens) + 1):
        hits = sum(math.prod(p[i, j, tokens[j]].item() for j in range(n)) for i in draws)
        meetings = sum(
            math.prod((p[i, j] * p[other, j]).sum().item() for j in range(n))
            for i, other in itertools.permutations(draws, 2)
        )
        scores.append(2 / len(p) * hits - meetings / (len(p) * (len(p) - 1)))
    return scores


def test_formula():
    probabilities = distributions(N, R, SLOTS, V)
    tokens = torch.randint(V, (R, SLOTS), generator=torch.Generator().manual_seed(1))
    scores = mixture_scores(probabilities, tokens)
    for row in range(R):
        expected = by_loops(probabilities[:, row], tokens[row])
        assert scores[row].tolist() == pytest.approx(expected, rel=1e-12)


def test_one_draw_against_another_by_hand():
    one, other = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    probabilities = torch.stack([one, other])[:, None, None].expand(2, 1, 2, 2)
    scores = mixture_scores(probabilities, torch.tensor([[0, 1]]))
    # 2 (1/2 + 1/4) / 2 - 1/2, and 2 (1/4 + 3/16) / 2 - 1/4
    assert scores.tolist() == [[0.25, 0.1875]]


class TestPropriety:
    """Three kinds of draws, two tokens out of three, everything enumerated."""

    CHANCES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def expected(self, kinds, truth):
        """Mean of S_1, S_2 over all pairs of independent draws and over the tokens of `truth`."""
        total = torch.zeros(2, dtype=torch.float64)
        grams = list(itertools.product(range(3), repeat=2))
        tokens, weights = torch.tensor(grams), truth.flatten()[:, None]
        for i, other in itertools.product(range(3), repeat=2):
            pair = kinds[[i, other]][:, None].expand(-1, len(grams), -1, -1)
            chance = self.CHANCES[i] * self.CHANCES[other]
            total += chance * (weights * mixture_scores(pair, tokens)).sum(0)
        return total

    def mixture(self, kinds):
        """q(x_1, x_2), ``[3, 3]``."""
        return torch.einsum("i,ia,ib->ab", self.CHANCES, kinds[:, 0], kinds[:, 1])

    def test_it_is_an_unbiased_brier_score(self):
        """E S_n = 2 Σ p q - Σ q², which is Σ p² - Σ (p - q)²."""
        kinds, truth = distributions(3, 2, 3), distributions(9, seed=7).reshape(3, 3)
        q = self.mixture(kinds)
        first = (2 * truth.sum(1) * q.sum(1) - q.sum(1) ** 2).sum().item()
        both = (2 * truth * q - q**2).sum().item()
        assert self.expected(kinds, truth).tolist() == pytest.approx([first, both], rel=1e-12)

    def test_the_truth_scores_best(self):
        kinds = distributions(3, 2, 3)
        truth = self.mixture(kinds)
        best = self.expected(kinds, truth)
        others = [distributions(3, 2, 3, seed=seed) for seed in range(1, 6)]
        others += [kinds.square() / kinds.square().sum(-1, keepdim=True)]  # too sure
        others += [kinds.mean(0, keepdim=True).expand(3, 2, 3)]  # tokens that agree by chance
        for other in others:
            found = self.expected(other, truth)
            lost = (self.mixture(other) - truth).square().sum()
            assert found[1] == pytest.approx((best[1] - lost).item(), abs=1e-12)
            assert found[1] < best[1] and found[0] <= best[0] + 1e-12


class TestThroughTheDecoder:
    def case(self):
        torch.manual_seed(0)
        decoder = tiny.autoencoder(initializer_range=0.5).double().requires_grad_(False).decoder
        latents = torch.randn(2, 2, 3, tiny.LATENT, dtype=torch.float64, requires_grad=True)
        return decoder, latents, tiny.tokens(batch=2, chunks=3).reshape(2, 3, 4)

    def test_gradients_reach_the_draws_alone(self):
        decoder, latents, labels = self.case()
        labels[0, 1, 2:] = -100
        assert torch.autograd.gradcheck(lambda z: token_scores(decoder, z, labels), latents)
        token_scores(decoder, latents, labels).sum().backward()
        assert latents.grad.abs().amin((-1, 0)).gt(0).all()
        assert not any(weight.requires_grad for weight in decoder.parameters())

    def test_it_is_the_mean_of_the_scores_of_probabilities(self):
        decoder, latents, labels = self.case()
        logits = decoder(latents.flatten(0, 1)).unflatten(0, (2, 2)).unflatten(2, (3, 4))
        scores = mixture_scores(logits.softmax(-1).flatten(1, 2), labels.flatten(0, 1)).mean(-1)
        torch.testing.assert_close(token_scores(decoder, latents, labels).flatten(), scores)

    def test_pieces_change_nothing(self):
        """Of two chunks and of one, each computed again for its backward pass."""
        decoder, latents, labels = self.case()
        whole = token_scores(decoder, latents, labels)
        (gradient,) = torch.autograd.grad(whole.square().sum(), latents)
        of_chunk = 2 * 4 * tiny.VOCAB
        for limit in (4 * of_chunk, 2 * of_chunk, 1):
            parts = token_scores(decoder, latents, labels, max_logits=limit)
            (again,) = torch.autograd.grad(parts.square().sum(), latents)
            torch.testing.assert_close((parts, again), (whole, gradient), rtol=1e-12, atol=1e-14)

    def test_labels_that_do_not_count(self):
        """S_n needs all of its n labels; what follows changes nothing."""
        decoder, latents, labels = self.case()
        cut = labels.clone()
        cut[0, 0, 1:] = cut[1, 2, 0] = -100
        with torch.no_grad():
            whole, found = (token_scores(decoder, latents, chosen) for chosen in (labels, cut))
            first = token_scores(decoder, latents, labels[..., :1])
        assert found[0, 0] == pytest.approx(first[0, 0].item() / 4, rel=1e-12)
        assert found[1, 2] == 0
        torch.testing.assert_close(found[0, 1:], whole[0, 1:], rtol=0, atol=0)

    def test_of_a_long_chunk_four_tokens_are_scored(self):
        decoder = tiny.autoencoder(patch_size=6).requires_grad_(False).decoder
        latents, labels = torch.randn(2, 5, tiny.LATENT), torch.ones(5, 6, dtype=torch.int64)
        labels[:, 4:] = -100
        found = token_scores(decoder, latents, labels)
        labels[:, 4:] = 2
        torch.testing.assert_close(token_scores(decoder, latents, labels), found, rtol=0, atol=0)
        assert found.shape == (5,) and found.ne(0).all()
