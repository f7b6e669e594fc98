"""Rewards of drawn chunks: unbiased by enumeration of all groups, and what they refuse."""

from itertools import product

import pytest
import torch
from tokenizers_like import llama2_like

from calm.data.encoding import Encoder
from calm.data.tokenizer import byte_tokenizer
from calm.errors import UserError
from calm.training.objectives.rewards import BrierReward, FunctionReward, Group, load_reward

CHANCES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def all_groups(draws, label=0):
    """Every group of `draws` from three chunks of one token, and the chance of each."""
    tuples = torch.tensor(list(product(range(3), repeat=draws))).T  # [m, groups]
    labels = torch.full((tuples.shape[1], 1), label)
    group = Group(tuples[..., None], labels, [()] * tuples.shape[1])
    return group, CHANCES[tuples].prod(0)


def expected_gradient(group, chances, advantages):
    """Mean of (1/m) Σ_j A_j ∇ log P(x_j) over all groups, by the logits of P."""
    scores = torch.nn.functional.one_hot(group.draws[..., 0], 3) - CHANCES
    return (chances[:, None] * (advantages.double()[..., None] * scores).mean(0)).sum(0)


def exact_gradient(value):
    """The gradient of `value` of the chances by their logits."""
    logits = CHANCES.log().requires_grad_()
    value(logits.softmax(0)).backward()
    return logits.grad


def brier(chances, others=1.0):
    return 2 * chances[0] - others * chances.square().sum()


class TestBrier:
    @pytest.mark.parametrize("draws", [3, 4])
    def test_rewards_and_advantages_have_the_gradient_of_the_expected_score(self, draws):
        group, chances = all_groups(draws)
        rewards = BrierReward().rewards(group)
        advantages = BrierReward().advantages(group, rewards)
        for weights in (rewards, advantages):
            found = expected_gradient(group, chances, weights)
            torch.testing.assert_close(found, exact_gradient(brier), atol=1e-6, rtol=0)
        mean = (chances * BrierReward().value(group, rewards).double()).sum()
        assert mean.item() == pytest.approx(brier(CHANCES).item(), abs=1e-6)

    def test_the_mean_of_the_other_rewards_is_no_baseline(self):
        group, chances = all_groups(3)
        rewards = BrierReward().rewards(group)
        found = expected_gradient(group, chances, (rewards - rewards.mean(0)) * 3 / 2)
        biased = exact_gradient(lambda chances: brier(chances, others=1 / 2))
        torch.testing.assert_close(found, biased, atol=1e-6, rtol=0)
        assert (biased - exact_gradient(brier)).abs().max() > 0.05

    def test_a_baseline_does_not_depend_on_its_own_draw(self):
        draws = torch.tensor([[0], [1], [1], [2]])[:, None]
        group = Group(draws, torch.tensor([[1]]), [()])
        rewards = BrierReward().rewards(group)
        assert rewards[:, 0].tolist() == pytest.approx([0, 2 - 2 / 3, 2 - 2 / 3, 0])
        baseline = (rewards - BrierReward().advantages(group, rewards))[:, 0]
        for other in range(3):
            changed = draws.clone()
            changed[0] = other
            group = Group(changed, torch.tensor([[1]]), [()])
            rewards = BrierReward().rewards(group)
            again = (rewards - BrierReward().advantages(group, rewards))[0, 0]
            assert again.item() == pytest.approx(baseline[0].item(), abs=1e-6)

    def test_where_the_text_ends_its_own_tokens_alone_are_compared(self):
        draws = torch.tensor([[[5, 1]], [[5, 2]], [[6, 1]]])
        found = BrierReward().rewards(Group(draws, torch.tensor([[5, -100]]), [()]))
        assert found[:, 0].tolist() == [1.0, 1.0, 0.0]


def ask(name, contexts, chunks, reads="text"):
    """Rewards of one draw pair each: `chunks` after `contexts`, texts of equal length."""
    rows = [list(chunk.encode()) for chunk in chunks]
    draws = torch.tensor([rows, rows])
    before = [list(context.encode()) for context in contexts]
    reward = load_reward(name, byte_tokenizer(), reads)
    found = reward.rewards(Group(draws, draws[0], before))
    assert found[0].equal(found[1])
    return found[0].tolist()


class TestFunctions:
    def test_advantages_have_the_gradient_of_the_expected_reward(self):
        worth = torch.tensor([1.0, -2.0, 5.0])
        reward = FunctionReward(lambda _, chunks: [worth[i].item() for (i,) in chunks], "worth")
        for draws in (2, 3):
            group, chances = all_groups(draws)
            rewards = reward.rewards(group)
            advantages = reward.advantages(group, rewards)
            found = expected_gradient(group, chances, advantages)
            exact = exact_gradient(lambda chances: (chances * worth).sum())
            torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)

    def test_a_match_ends_in_the_chunk_and_may_begin_before(self):
        assert ask("regex:return", ["a retu", "return ", "a"], ["rn x", "here", "retu"]) == [
            1,
            0,
            0,
        ]

    def test_matches_may_overlap(self):
        """The first match, "x-x" of the context, hides the one that ends in the chunk."""
        assert ask("regex:x-x", ["x-x-", "x-x "], ["x", "x"]) == [1, 0]

    def test_a_repetition_ends_with_the_text(self):
        reward = load_reward("repetition:1", byte_tokenizer(), "text")
        draws = torch.tensor([[[65, 257, 257, 257]], [[66, 257, 66, 65]], [[65, 65, 66, 66]]])
        found = reward.rewards(Group(draws, draws[0], [(65,)]))[:, 0]
        assert found.tolist() == [-1 / 2, 0, -3 / 4]

    @pytest.mark.parametrize("reads", ["text", "tokens"])
    def test_nothing_is_asked_about_no_position(self, reads):
        def refuses(*lists):
            raise AssertionError(lists)

        reward = FunctionReward(refuses, "mine", byte_tokenizer() if reads == "text" else None)
        draws = torch.zeros(3, 0, 4, dtype=torch.long)
        assert reward.rewards(Group(draws, draws[0], [])).shape == (3, 0)

    def test_a_chunk_is_read_after_its_context(self):
        """A sentencepiece-like tokenizer drops the space before a text's first word."""
        tokenizer, asked = llama2_like(), []
        ids = Encoder(tokenizer).prompt("the cat sat")
        cut = tokenizer.convert_ids_to_tokens(ids).index("▁cat")
        reward = FunctionReward(
            lambda *pairs: asked.extend(zip(*pairs, strict=True)) or [0.0], "mine", tokenizer
        )
        draws = torch.tensor([[ids[cut:]]] * 2)
        reward.rewards(Group(draws, draws[0], [ids[:cut]]))
        assert asked == [(tokenizer.decode(ids[:cut]), " cat sat")]

    def test_length_counts_to_the_end_token(self):
        reward = load_reward("length", byte_tokenizer(), "text")
        draws = torch.tensor([[[65, 257, 66]], [[65, 66, 67]], [[257, 257, 65]]])
        assert reward.rewards(Group(draws, draws[0], [()]))[:, 0].tolist() == [1, 3, 0]

    def test_repetition_is_the_share_of_ngrams_seen_before(self):
        assert ask("repetition:2", ["abab", "abcd", ""], ["abab", "xyxy", "aaaa"]) == [
            -1,
            -1 / 4,
            -1 / 2,
        ]
        assert ask("repetition", ["abcdabc", "abcdabc"], ["dxyz", "xyzw"]) == [-1 / 4, 0]

    @pytest.mark.parametrize("reads", ["text", "tokens"])
    def test_a_function_of_the_user_gets_equal_pairs_once(self, reads, tmp_path, monkeypatch):
        module = f"my_reward_{reads}"
        (tmp_path / f"{module}.py").write_text(
            "asked = []\n"
            "def score(contexts, continuations):\n"
            "    asked.append((contexts, continuations))\n"
            "    return [len(context) for context in contexts]\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        assert ask(f"{module}:score", ["ab", "c"], ["xy", "zw"], reads) == [2, 1]
        (asked,) = __import__(module).asked
        texts = (["ab", "c"], ["xy", "zw"])
        ids = ([(97, 98), (99,)], [(120, 121), (122, 119)])
        assert asked == (texts if reads == "text" else ids)


def of(function):
    return FunctionReward(function, "mine:score", byte_tokenizer())


def fails_on_x(_, chunks):
    if "x" in "".join(chunks):
        raise KeyError("no x")
    return [0.0] * len(chunks)


class TestRefused:
    @pytest.mark.parametrize(
        ("function", "complaint"),
        [
            (fails_on_x, r"mine:score raised KeyError for continuation 'xy' after 'a'.*Traceback"),
            (lambda *_: [1.0], "must return a list of 2 numbers, .*; got 1"),
            (lambda *_: 3.0, "must return a list of 2 numbers, .*; got float"),
            (lambda *_: [1.0, float("nan")], "finite numbers, got nan for continuation 'zw'"),
            (lambda *_: [1.0, "2"], "finite numbers, got '2' for continuation 'zw' after 'b'"),
        ],
        ids=["raises", "count", "scalar", "nan", "type"],
    )
    def test_what_a_function_may_not_do(self, function, complaint):
        draws = torch.tensor([[list(b"xy"), list(b"zw")]] * 2)
        with pytest.raises(UserError, match=f"(?s){complaint}"):
            of(function).rewards(Group(draws, draws[0], [list(b"a"), list(b"b")]))

    @pytest.mark.parametrize(
        ("name", "complaint"),
        [
            ("best", "reward must be brier, length, .*; got 'best'"),
            ("brier:2", "cannot be imported"),
            ("repetition:0", "takes a whole number of tokens, got '0'"),
            ("regex:(", "regex:.* is no regular expression"),
            ("regex:x*", "must not match the empty text"),
            ("nowhere_at_all:score", "nowhere_at_all:score cannot be imported .ModuleNotFound"),
            ("math:nothing", "math:nothing cannot be imported .AttributeError"),
            ("math:pi", "math:pi must be a function, got 3.14"),
        ],
    )
    def test_names_that_mean_nothing(self, name, complaint):
        with pytest.raises(UserError, match=complaint):
            load_reward(name, byte_tokenizer(), "text")

    @pytest.mark.parametrize("name", ["brier", "length", "repetition:2", "regex:a"])
    def test_what_a_built_in_reward_reads(self, name):
        with pytest.raises(UserError, match=f"reward_reads .*the reward {name}.*got 'tokens'"):
            load_reward(name, byte_tokenizer(), "tokens")
