"""Rewards of drawn chunks: the leave-one-out Brier reward, and functions of text or tokens.

A reward sees a group: the draws of a chunk at one position, with the text before it. What a policy
gradient needs beside it, a baseline that does not depend on the draw itself, is the reward's own to
say, for a Brier reward depends on the other draws as well.

Shapes: m draws of a group, R positions, K tokens of a chunk.
"""

import math
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calm.decoding.text.edges import CONTEXT, text_after
from calm.errors import UserError
from calm.labels import IGNORE_INDEX
from calm.training.objectives.reward_functions import Length, Pattern, Repetition

__all__ = ["READS", "BrierReward", "FunctionReward", "Group", "Reward", "load_reward"]

READS = ("text", "tokens")
FORMS = "brier, length, repetition, repetition:N, regex:PATTERN or module:function"
Function = Callable[[list[Any], list[Any]], Any]
Ids = tuple[int, ...]


class Group(NamedTuple):
    """Draws of the same chunks.

    Attributes:
        draws: token ids, ``[m, R, K]``.
        labels: what the text has there, ``[R, K]``, -100 where it has ended.
        contexts: ids before each chunk, as far back as the reward may look; R lists, none for a
            reward that does not read them.
    """

    draws: Tensor
    labels: Tensor
    contexts: Sequence[Sequence[int]]


class Reward(Protocol):
    """A reward of drawn chunks."""

    @property
    def reads_contexts(self) -> bool:
        """Whether it depends on the text before a chunk, beyond its labels."""

    @property
    def least_draws(self) -> int:
        """The fewest draws of a group from which `advantages` are known."""

    def rewards(self, group: Group) -> Tensor:
        """Of each draw, float32 ``[m, R]``; two draws or more."""

    def value(self, group: Group, rewards: Tensor) -> Tensor:
        """Unbiased estimate of what the reward raises, ``[R]``."""

    def advantages(self, group: Group, rewards: Tensor) -> Tensor:
        """Rewards minus a baseline from the other draws alone, ``[m, R]``.

        The mean over the draws of advantage times gradient of the log-density is an unbiased
        gradient of the expected `value`.
        """


@dataclass(frozen=True)
class BrierReward:
    """What a draw adds to the expected Brier score of the whole chunk.

    r_j = 2·1{x_j = y} - 2/(m-1) Σ_{k≠j} 1{x_j = x_k}

    The mean of r_j ∇log π(x_j) is unbiased for ∇ (2 P(y) - Σ_x P(x)²), the gradient of a strictly
    proper score: the reward cannot be raised by concentrating more than the text does. The other
    rewards r_k depend on x_j, so that their mean is no baseline: it would leave a gradient of
    2 P(y) - (m-2)/(m-1) Σ_x P(x)². The baseline is their mean as it is without x_j.

    Where the text ends within a chunk, the tokens before its end alone are compared.
    """

    least_draws, reads_contexts = 3, False

    def rewards(self, group: Group) -> Tensor:
        """See `Reward`."""
        matches, collisions = self._counts(group)
        return 2 * matches - 2 * collisions / (len(matches) - 1)

    def value(self, group: Group, rewards: Tensor) -> Tensor:
        """See `Reward`: the Brier score itself, which the mean of the rewards is not."""
        matches, collisions = self._counts(group)
        return (2 * matches - collisions / (len(matches) - 1)).mean(0)

    def advantages(self, group: Group, rewards: Tensor) -> Tensor:
        """See `Reward`; m >= 3."""
        matches, collisions = self._counts(group)
        others = len(matches) - 1
        right = (matches.sum(0) - matches) / others
        pairs = collisions.sum(0) - 2 * collisions  # ordered ones, without those that have x_j
        return rewards - 2 * right + 2 * pairs / (others * (others - 1))

    @staticmethod
    def _counts(group: Group) -> tuple[Tensor, Tensor]:
        """1{x_j = y} and Σ_{k≠j} 1{x_j = x_k}, float32 ``[m, R]``."""
        is_text = group.labels != IGNORE_INDEX
        draws = group.draws.where(is_text, IGNORE_INDEX)
        matches = (draws == group.labels).all(-1).float()
        collisions = torch.stack([(draws == draw).all(-1).float().sum(0) - 1 for draw in draws])
        return matches, collisions


@dataclass(frozen=True)
class FunctionReward:
    """A Python function of contexts and continuations.

    It is asked once for equal pairs of a micro-batch, and not at all where there is none.

    Attributes:
        function: takes two lists of equal length, contexts and continuations, and returns as many
            finite numbers.
        name: of the function, for errors.
        tokenizer: with it contexts and continuations are texts, the latter what the tokens add to
            that of the context (`text_after`); without, tuples of token ids.
    """

    function: Function
    name: str
    tokenizer: PreTrainedTokenizerBase | None = None

    least_draws, reads_contexts = 2, True

    def rewards(self, group: Group) -> Tensor:
        """See `Reward`.

        Raises:
            UserError: the function raises, or returns something else than a number for each.
        """
        contexts = [tuple(context) for context in group.contexts]
        chunks = [tuple(chunk) for chunk in group.draws.flatten(0, 1).tolist()]
        pairs = self._read(list(zip(contexts * len(group.draws), chunks, strict=True)))
        unique = list(dict.fromkeys(pairs))
        known = dict(zip(unique, self._ask(unique), strict=True))
        numbers = torch.tensor([known[pair] for pair in pairs], dtype=torch.float32)
        return numbers.view(group.draws.shape[:2]).to(group.draws.device)

    def value(self, group: Group, rewards: Tensor) -> Tensor:
        """See `Reward`: the mean reward."""
        return rewards.mean(0)

    def advantages(self, group: Group, rewards: Tensor) -> Tensor:
        """See `Reward`; the baseline is the mean of the other rewards."""
        return (rewards - rewards.mean(0)) * (len(rewards) / (len(rewards) - 1))

    def _read(self, pairs: list[tuple[Ids, Ids]]) -> list[tuple[Any, Any]]:
        """What the function sees of contexts and continuations; a text is what ids add to it."""
        if self.tokenizer is None:
            return pairs
        contexts = {
            context: self.tokenizer.decode(list(context), clean_up_tokenization_spaces=False)
            for context in dict.fromkeys(context for context, _ in pairs)
        }
        chunks = {
            (context, ids): text_after(
                self.tokenizer, context[-CONTEXT:], ids, skip_special_tokens=False
            )
            for context, ids in dict.fromkeys(pairs)
        }
        return [(contexts[pair[0]], chunks[pair]) for pair in pairs]

    def _ask(self, pairs: list[tuple[Any, Any]]) -> list[float]:
        if not pairs:
            return []
        try:
            found = self._call(pairs)
        except Exception as error:
            raise UserError(self._raised(error, pairs)) from error
        found = found.tolist() if hasattr(found, "tolist") else found
        if not isinstance(found, list | tuple) or len(found) != len(pairs):
            got = f"{len(found)}" if isinstance(found, list | tuple) else type(found).__name__
            raise UserError(
                f"reward {self.name} must return a list of {len(pairs)} numbers, one for each "
                f"continuation; got {got}"
            )
        for value, pair in zip(found, pairs, strict=True):
            if not isinstance(value, Real) or not math.isfinite(value):
                raise UserError(
                    f"reward {self.name} must return finite numbers, got {value!r} for "
                    + self._described(pair)
                )
        return [float(value) for value in found]

    def _call(self, pairs: list[tuple[Any, Any]]) -> Any:
        return self.function([context for context, _ in pairs], [chunk for _, chunk in pairs])

    def _raised(self, error: Exception, pairs: list[tuple[Any, Any]]) -> str:
        """The traceback, and the first pair that raises by itself."""
        where = "no continuation alone"
        for pair in pairs:
            try:
                self._call([pair])
            except Exception as alone:
                error, where = alone, self._described(pair)
                break
        lines = "".join(traceback.format_exception(error))
        return f"reward {self.name} raised {type(error).__name__} for {where}: {lines}"

    @staticmethod
    def _described(pair: tuple[Any, Any]) -> str:
        return f"continuation {pair[1]!r} after {pair[0]!r}"


def load_reward(name: str, tokenizer: PreTrainedTokenizerBase, reads: str) -> Reward:
    """The reward that the flag ``reward`` names.

    Args:
        name: one of `FORMS`.
        tokenizer: of the model.
        reads: what a function of the user sees, ``text`` or ``tokens``.

    Raises:
        UserError: no such reward, module or function; a pattern that is none; `reads` other than
            text for a reward that is built in.
    """
    kind, _, rest = name.partition(":")
    if built_in := _built_in(name, tokenizer):
        if reads != READS[0]:
            raise UserError(
                f"reward_reads says what a module:function gets and has no effect with the reward "
                f"{name}: take it out, got {reads!r}"
            )
        return built_in
    if not kind or not rest:
        raise UserError(f"reward must be {FORMS}; got {name!r}")
    return FunctionReward(_imported(kind, rest), name, tokenizer if reads == "text" else None)


def _built_in(name: str, tokenizer: PreTrainedTokenizerBase) -> Reward | None:
    """The reward that is no function of the user; None where `name` is none of these."""
    kind, _, rest = name.partition(":")
    match kind:
        case "brier" if not rest:
            return BrierReward()
        case "length" if not rest:
            return FunctionReward(Length(tokenizer.eos_token_id), name)
        case "repetition":
            return FunctionReward(Repetition.parse(rest, tokenizer.eos_token_id), name)
        case "regex":
            return FunctionReward(Pattern.parse(rest), name, tokenizer)
    return None


def _imported(module: str, function: str) -> Function:
    """The user's function; modules of the working directory are found too."""
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = pkgutil.resolve_name(f"{module}:{function}")
    except Exception as error:  # whatever the user's module happens to raise
        raise UserError(
            f"reward: {module}:{function} cannot be imported ({type(error).__name__}: {error}); it "
            f"is looked for in {folder} and among the installed packages"
        ) from error
    if not callable(found):
        raise UserError(f"reward: {module}:{function} must be a function, got {found!r}")
    return found
