"""Decoding candidates slot by slot: the choices of decoding everything, with less of it."""

import pytest
import torch

from calm.decoding.sampling.lazy_decode import Candidates, decode_and_vote, decode_matching
from calm_kernels import agreeing_patch

WIDTH, VOCABULARY = 8, 11


class Projection:
    """Hidden states are one-hot, so any patch can be asked for; counts its rows."""

    def __init__(self):
        self.rows = 0

    def __call__(self, hidden):
        assert hidden.dim() == 2 and len(hidden), "nothing to project"
        self.rows += len(hidden)
        return hidden.argmax(-1)


def slots_of(patches):
    """``[N, B, K, V]`` from patches ``[B, N, K]``."""
    return torch.nn.functional.one_hot(patches, VOCABULARY).float().transpose(0, 1)


def draw(shape, distinct, generator):
    """Patches whose agreement falls slot by slot."""
    return (torch.rand(shape, generator=generator) ** 2 * distinct).long()


@pytest.mark.parametrize("temperature", [1.0, 0.9, 0.5, 0.4, 1 / 3, 0.21, 0.05, 0.01])
@pytest.mark.parametrize("distinct", [1, 2, 4, 11])
@pytest.mark.parametrize("shape", [(70, 30, 4), (5, 200, 3), (9, 1, 2), (30, 7, 1)], ids=str)
def test_the_vote_is_that_of_decoding_everything(shape, distinct, temperature, generator):
    patches = draw(shape, distinct, generator)
    seed = torch.stack([torch.arange(len(patches)), torch.zeros(len(patches)).long()], 1)
    expected = agreeing_patch(patches, 1 / temperature, seed=seed)
    candidates = Candidates(slots_of(patches), Projection())
    actual = decode_and_vote(candidates, temperature, seed=seed)
    for value, wanted in zip(actual, expected, strict=True):
        assert torch.equal(value, wanted)


def test_only_what_can_matter_is_projected():
    # Five share a first token, four the first two, two all three; two others share another start.
    text = ["abc", "abc", "abd", "abe", "ace", "fgh", "fij", "kaa", "baa"]
    patches = torch.tensor([[[ord(c) - ord("a") for c in word] for word in text]])
    project = Projection()
    candidates = Candidates(slots_of(patches), project)
    seed = torch.tensor([0, 0])
    tokens, level = decode_and_vote(candidates, 1 / 2, seed=seed)
    assert tokens.tolist() == [[0, 1, 2]] and level.tolist() == [2]
    # All first tokens; seven of shared ones; then only the four that still agree.
    assert project.rows == candidates.projected == 9 + 7 + 4
    project = Projection()
    tokens, level = decode_and_vote(Candidates(slots_of(patches), project), 1 / 3, seed=seed)
    assert tokens.tolist() == [[0, 1, 2]] and level.tolist() == [2]
    # No three agree in the end, and "f.." cannot beat the pair: its two are never read on ...
    assert project.rows == 9 + 5 + 4 + 2  # ... but they tie with it until their second token


def test_candidates_that_nobody_shares_cost_one_slot(generator):
    patches = torch.stack([torch.arange(11), *torch.randint(11, (3, 11), generator=generator)], -1)
    project = Projection()
    tokens, level = decode_and_vote(
        Candidates(slots_of(patches[None]), project), 0.5, seed=torch.tensor([3, 0])
    )
    assert project.rows == 11 + 3  # the chosen one is completed
    assert (patches == tokens).all(-1).any() and level.tolist() == [1]


def test_rows_need_different_depths(generator):
    """One sequence agrees on everything, one on nothing; neither changes the other."""
    patches = torch.randint(11, (2, 40, 4), generator=generator)
    patches[0] = patches[0, :1]
    seed = torch.tensor([[1, 0], [2, 0]])
    together = decode_and_vote(Candidates(slots_of(patches), Projection()), 0.25, seed=seed)
    for row in range(2):
        alone = decode_and_vote(
            Candidates(slots_of(patches[row, None]), Projection()), 0.25, seed=seed[row, None]
        )
        for value, wanted in zip(alone, together, strict=True):
            assert torch.equal(value[0], wanted[row])


def test_groups_are_equal_patches(generator):
    patches = draw((6, 50, 3), 4, generator)
    candidates = Candidates(slots_of(patches), Projection())
    candidates.split(2)
    groups = candidates.groups
    same = (patches[:, :, None] == patches[:, None]).all(-1)
    assert torch.equal(groups[:, :, None] == groups[:, None], same)
    index = torch.tensor([0, 3, 9, 27, 41, 49])
    assert torch.equal(candidates.tokens(index), patches[torch.arange(6), index])


@pytest.mark.parametrize("lengths", [[0, 1, 2, 3], [0, 0, 0, 0], [3, 3, 3, 3]], ids=str)
def test_matching_and_voting_given_tokens(lengths, generator):
    patches = draw((4, 60, 3), 3, generator)
    given, length = patches[:, 7].clone(), torch.tensor(lengths)
    slots, project = slots_of(patches), Projection()
    fits = decode_matching(slots, project, given, length)
    known = torch.arange(3) < length[:, None]
    expected = ((patches == given[:, None]) | ~known[:, None]).all(-1)
    assert torch.equal(fits.T, expected)
    assert project.rows <= sum(60 * r for r in lengths)
    seed = torch.tensor([[8, 0]])
    for row in range(4):
        kept, part = fits[:, row], slice(row, row + 1)
        project = Projection()
        candidates = Candidates(slots[kept][:, part], project, given[part], length[part])
        tokens, level = decode_and_vote(candidates, 0.4, seed=seed)
        wanted = agreeing_patch(patches[part, kept], 2.5, seed=seed)
        assert torch.equal(tokens, wanted[0]) and torch.equal(level, wanted[1])
        assert project.rows <= int(kept.sum()) * (3 - lengths[row])


def test_matching_reads_no_further_than_the_first_difference():
    patches = torch.tensor([[[1, 2, 3], [1, 3, 3], [2, 2, 3], [2, 2, 3]]])
    project = Projection()
    fits = decode_matching(slots_of(patches), project, torch.tensor([[1, 2, 3]]), torch.tensor([3]))
    assert fits.T.tolist() == [[True, False, False, False]]
    assert project.rows == 4 + 2 + 1
