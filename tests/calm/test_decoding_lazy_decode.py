"""Decoding token by token: the same choices as decoding everything, with fewer projections."""

import pytest
import torch

from calm.decoding.sampling.lazy_decode import Candidates, decode_and_vote, decode_matching
from calm_kernels import agreeing_patch

WIDTH, VOCABULARY = 8, 11


class Projection:
    """Hidden states are one-hot, so that a test can give any chunk; counts the rows."""

    def __init__(self):
        self.rows = 0

    def __call__(self, hidden):
        assert hidden.dim() == 2 and len(hidden), "nothing to project"
        self.rows += len(hidden)
        return hidden.argmax(-1)


def slots_of(chunks):
    """``[N, B, K, V]`` from chunks ``[B, N, K]``."""
    return torch.nn.functional.one_hot(chunks, VOCABULARY).float().transpose(0, 1)


def draw(shape, distinct, generator):
    """Chunks whose agreement falls slot by slot."""
    return (torch.rand(shape, generator=generator) ** 2 * distinct).long()


@pytest.mark.parametrize("temperature", [1.0, 0.9, 0.5, 0.4, 1 / 3, 0.21, 0.05, 0.01])
@pytest.mark.parametrize("distinct", [1, 2, 4, 11])
@pytest.mark.parametrize("shape", [(70, 30, 4), (5, 200, 3), (9, 1, 2), (30, 7, 1)], ids=str)
def test_the_vote_equals_the_vote_over_all_tokens(shape, distinct, temperature, generator):
    chunks = draw(shape, distinct, generator)
    seed = torch.stack([torch.arange(len(chunks)), torch.zeros(len(chunks)).long()], 1)
    expected = agreeing_patch(chunks, 1 / temperature, seed=seed)
    candidates = Candidates(slots_of(chunks), Projection())
    actual = decode_and_vote(candidates, temperature, seed=seed)
    for value, wanted in zip(actual, expected, strict=True):
        assert torch.equal(value, wanted)


def test_only_slots_that_can_matter_are_projected():
    # Five share a first token, four the first two, two all three; two others share another start.
    text = ["abc", "abc", "abd", "abe", "ace", "fgh", "fij", "kaa", "baa"]
    chunks = torch.tensor([[[ord(c) - ord("a") for c in letters] for letters in text]])
    project = Projection()
    candidates = Candidates(slots_of(chunks), project)
    seed = torch.tensor([0, 0])
    tokens, num_agreeing = decode_and_vote(candidates, 1 / 2, seed=seed)
    assert tokens.tolist() == [[0, 1, 2]] and num_agreeing.tolist() == [2]
    # All first tokens; seven of shared ones; then only the four that still agree.
    assert project.rows == candidates.projected == 9 + 7 + 4
    project = Projection()
    tokens, num_agreeing = decode_and_vote(Candidates(slots_of(chunks), project), 1 / 3, seed=seed)
    assert tokens.tolist() == [[0, 1, 2]] and num_agreeing.tolist() == [2]
    # No three agree in the end, and "f.." cannot beat the pair: its two are never read on ...
    assert project.rows == 9 + 5 + 4 + 2  # ... but they tie with it until their second token


def test_candidates_with_unique_first_tokens_cost_one_projection(generator):
    chunks = torch.stack([torch.arange(11), *torch.randint(11, (3, 11), generator=generator)], -1)
    project = Projection()
    tokens, num_agreeing = decode_and_vote(
        Candidates(slots_of(chunks[None]), project), 0.5, seed=torch.tensor([3, 0])
    )
    assert project.rows == 11 + 3  # the chosen one is completed
    assert (chunks == tokens).all(-1).any() and num_agreeing.tolist() == [1]


def test_sequences_are_decoded_to_different_depths(generator):
    """One sequence agrees on everything, one on nothing; neither changes the other."""
    chunks = torch.randint(11, (2, 40, 4), generator=generator)
    chunks[0] = chunks[0, :1]
    seed = torch.tensor([[1, 0], [2, 0]])
    together = decode_and_vote(Candidates(slots_of(chunks), Projection()), 0.25, seed=seed)
    for row in range(2):
        alone = decode_and_vote(
            Candidates(slots_of(chunks[row, None]), Projection()), 0.25, seed=seed[row, None]
        )
        for value, wanted in zip(alone, together, strict=True):
            assert torch.equal(value[0], wanted[row])


def test_groups_are_equal_chunks(generator):
    chunks = draw((6, 50, 3), 4, generator)
    candidates = Candidates(slots_of(chunks), Projection())
    candidates.split(2)
    groups = candidates.groups
    same = (chunks[:, :, None] == chunks[:, None]).all(-1)
    assert torch.equal(groups[:, :, None] == groups[:, None], same)
    index = torch.tensor([0, 3, 9, 27, 41, 49])
    assert torch.equal(candidates.tokens(index), chunks[torch.arange(6), index])


@pytest.mark.parametrize("lengths", [[0, 1, 2, 3], [0, 0, 0, 0], [3, 3, 3, 3]], ids=str)
def test_matching_and_voting_given_tokens(lengths, generator):
    chunks = draw((4, 60, 3), 3, generator)
    given, length = chunks[:, 7].clone(), torch.tensor(lengths)
    slots, project = slots_of(chunks), Projection()
    fits = decode_matching(slots, project, given, length)
    is_given = torch.arange(3) < length[:, None]
    expected = ((chunks == given[:, None]) | ~is_given[:, None]).all(-1)
    assert torch.equal(fits.T, expected)
    assert project.rows <= sum(60 * r for r in lengths)
    seed = torch.tensor([[8, 0]])
    for row in range(4):
        kept, part = fits[:, row], slice(row, row + 1)
        project = Projection()
        candidates = Candidates(slots[kept][:, part], project, given[part], length[part])
        tokens, num_agreeing = decode_and_vote(candidates, 0.4, seed=seed)
        wanted = agreeing_patch(chunks[part, kept], 2.5, seed=seed)
        assert torch.equal(tokens, wanted[0]) and torch.equal(num_agreeing, wanted[1])
        assert project.rows <= int(kept.sum()) * (3 - lengths[row])


def test_matching_stops_at_the_first_mismatch():
    chunks = torch.tensor([[[1, 2, 3], [1, 3, 3], [2, 2, 3], [2, 2, 3]]])
    project = Projection()
    fits = decode_matching(slots_of(chunks), project, torch.tensor([[1, 2, 3]]), torch.tensor([3]))
    assert fits.T.tolist() == [[True, False, False, False]]
    assert project.rows == 4 + 2 + 1
