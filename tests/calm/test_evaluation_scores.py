"""Scores position by position: where they lie in the text, and differences at shared positions."""

from dataclasses import replace

import datasets
import pytest
import torch
from tiny_models import tiny_baseline, tiny_calm

from calm.data.packing import pack_documents
from calm.data.tokenizer import byte_tokenizer
from calm.errors import UserError
from calm.evaluation import evaluate, score_text, summarise
from calm.evaluation.bootstrap import bootstrap_interval
from calm.evaluation.paired import METRICS, common_positions, paired_difference

BEGIN, END = 256, 257
DOCUMENTS = ["abcdefghijklmnopqr", "stu", "vwx yz and more, and more still", "0123456789" * 9]


def text_blocks(patch_size, *, start=None, block_size=32, documents=DOCUMENTS, max_blocks=None):
    table = datasets.Dataset.from_dict({"text": documents})
    packed = pack_documents(
        table, byte_tokenizer(), block_size=block_size, patch_size=patch_size,
        start_token_id=start, max_blocks=max_blocks,
    )  # fmt: skip
    return [packed[index] for index in range(len(packed))]


def scored(patch_size, *, start=None, **layout):
    """Scores of a tiny model: K = 1 is the baseline."""
    if patch_size == 1:
        model = tiny_baseline(vocab_size=259)
    else:
        begins = {} if start is None else {"has_start_patch": True, "bos_token_id": start}
        model = tiny_calm(patch_size=patch_size, vocab_size=259, **begins)
    blocks = text_blocks(patch_size, start=start, **layout)
    return score_text(model, blocks, num_samples=2, describe={"model": f"K={patch_size}"})


LAST_START = {1: 27, 2: 26, 4: 28, 8: 24}  # last place in a block of 32 that starts an n-gram


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_offsets_are_places_in_the_text(patch_size):
    scores = scored(patch_size)
    written = [token for text in DOCUMENTS for token in (*text.encode(), END)]
    assert scores.text.tolist() == written
    assert scores.offsets.tolist() == [
        place
        for place in range(0, len(written) - 3, patch_size)
        if patch_size <= place % 32 <= LAST_START[patch_size]
    ]


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_start_chunks_take_no_place_in_the_text(patch_size):
    scores = scored(patch_size, start=BEGIN, block_size=256)
    expected, begin = [], 0
    for length in (len(text) + 1 for text in DOCUMENTS):
        expected += range(begin, begin + length - 3, patch_size)
        begin += length
    assert scores.offsets.tolist() == expected


def test_sums_are_those_of_an_evaluation():
    scores = scored(4)
    whole = evaluate(tiny_calm(vocab_size=259), text_blocks(4), num_samples=2)
    assert summarise(scores).brier == whole.brier
    sums, counts = scores.sums()
    assert len(counts) == scores.protocol["blocks"] and counts.sum() == len(scores.offsets)
    torch.testing.assert_close(sums[1], scores.terms[scores.blocks == 1].sum(0))
    grouped, sizes = scores.grouped(40)
    inside = (scores.offsets >= 40) & (scores.offsets < 80)
    torch.testing.assert_close(grouped[1], scores.terms[inside].sum(0))
    assert sizes[1] == inside.sum() and (sizes > 0).all()
    with pytest.raises(UserError, match="span must be at least 1"):
        scores.grouped(0)


def test_all_chunk_sizes_meet_at_multiples_of_the_largest():
    by_size = {size: scored(size) for size in (1, 2, 4, 8)}
    common = common_positions(list(by_size.values()))
    expected = by_size[8].offsets
    # The last 4 tokens of a block start no n-gram of the baseline; K = 8 starts 8 before the end.
    assert expected.tolist() == [p for p in range(0, 143, 8) if p % 32 and p + 4 <= 145]
    for one in common:
        assert torch.equal(one.offsets, expected)
        assert one.protocol["positions"] == len(expected)
    rows = torch.isin(by_size[2].offsets, expected)
    assert torch.equal(common[1].terms, by_size[2].terms[rows])
    eighths = by_size[1].starting_at_multiples_of(8)
    assert set(expected.tolist()) <= set(eighths.offsets.tolist())
    assert (eighths.offsets % 8 == 0).all()


def test_start_chunks_and_shorter_texts_share_positions():
    plain, started = scored(1, max_blocks=4), scored(4, start=BEGIN, max_blocks=4)
    assert len(started.text) < len(plain.text)
    for pair in ([plain, started], [started, plain]):
        common = common_positions(pair)
        assert len(common[0].offsets) and torch.equal(common[0].offsets, common[1].offsets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": ["another text", *DOCUMENTS]}, "tokens differ from token 1 on"),
        ({"block_size": 64}, "K=4 and K=4 cannot be compared: block_size is 32 and 64"),
    ],
)
def test_other_texts_and_protocols_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        common_positions([scored(4), scored(4, **change)])


def test_no_shared_position_is_an_error():
    scores = scored(4)
    odd = scores.select(scores.offsets % 8 == 0)
    with pytest.raises(UserError, match="the models share no position"):
        common_positions([odd, scores.select(scores.offsets % 8 == 4)])


def groups(seed, shift=0.0, count=80):
    """Sums of two models whose scores share the level of each group; b is `shift` lower."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(5, 40, (count,), generator=generator).double()
    level = 0.4 + 0.1 * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    factor = torch.tensor([1.0, 0.5, 0.3, 0.2], dtype=torch.float64)
    noise = 0.1 * torch.randn(2, count, 4, generator=generator, dtype=torch.float64)
    sums = counts[:, None] * level * factor + counts.sqrt()[:, None] * factor * noise
    sums[1] -= shift * counts[:, None] * factor
    return sums[0], counts, sums[1]


def test_paired_differences_are_sharper_than_two_intervals():
    sums_a, counts, sums_b = groups(0, shift=0.01)
    paired = paired_difference(sums_a, counts, sums_b, seed=1)
    means = (sums_a.sum(0) - sums_b.sum(0)) / counts.sum()
    assert [paired.difference[name] for name in METRICS[:4]] == pytest.approx(means.tolist())
    low, high = bootstrap_interval(sums_a, counts)
    for index, name in enumerate(METRICS):
        inner_low, inner_high = paired.interval[name]
        assert inner_low < paired.difference[name] < inner_high
        width = inner_high - inner_low
        assert width < 0.4 * (high - low)[index]
        assert paired.standard_error[name] == pytest.approx(
            (inner_high - inner_low) / 3.92, rel=0.15
        )
    assert not paired.is_tied("brier1") and paired.share_beyond_zero["brier1"] < 0.025
    back = paired_difference(sums_b, counts, sums_a, seed=1)
    assert back.difference["brier_lm"] == pytest.approx(-paired.difference["brier_lm"])
    assert back.share_beyond_zero == paired.share_beyond_zero


def test_intervals_of_equal_models_hold_zero_as_often_as_they_say():
    rounds = 200
    tied = [paired_difference(*groups(seed), seed=seed, resamples=200) for seed in range(rounds)]
    for name in METRICS:
        assert sum(one.is_tied(name) for one in tied) / rounds == pytest.approx(0.95, abs=0.05)


def test_a_model_ties_with_itself_and_one_group_tells_nothing():
    sums, counts, _ = groups(3)
    same = paired_difference(sums, counts, sums, seed=0)
    assert set(same.difference.values()) == {0.0} and set(same.share_beyond_zero.values()) == {1.0}
    assert all(same.is_tied(name) for name in METRICS)
    one = paired_difference(sums[:1], counts[:1], 2 * sums[:1], seed=0)
    assert one.is_tied("brier1") and one.share_beyond_zero["brier1"] != 1.0
    with pytest.raises(UserError, match="must have the same groups, got 80, 79 and 80"):
        paired_difference(sums, counts, sums[:-1], seed=0)


def test_batches_and_masked_blocks_move_no_position():
    model, blocks = tiny_calm(vocab_size=259), text_blocks(4)
    entirely = {"input_ids": blocks[0]["input_ids"], "labels": torch.full((32,), -100)}
    one = score_text(model, [*blocks, entirely], batch_size=1)
    three = score_text(model, [*blocks, entirely], batch_size=3)
    alone = score_text(model, blocks, batch_size=4)
    for other in (three, alone):
        assert torch.equal(one.offsets, other.offsets) and torch.equal(one.blocks, other.blocks)
        torch.testing.assert_close(one.terms, other.terms, rtol=0, atol=1e-6)
    assert one.sums()[1][-1] == 0 and replace(one, protocol={}).terms is one.terms
