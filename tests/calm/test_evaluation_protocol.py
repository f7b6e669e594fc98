"""From sums per block to BrierLM with its interval, and the record that goes with it."""

import json

import datasets
import pytest
import torch
from tiny_models import tiny_baseline, tiny_calm

from calm.data.packing import pack_documents
from calm.data.tokenizer import byte_tokenizer
from calm.errors import UserError
from calm.evaluation import brier_scores, evaluate
from calm.evaluation.bootstrap import (
    bootstrap_interval,
    brier_lm,
    brier_lm_error,
    corpus_means,
    standard_errors,
)


def random_blocks(count, length=16, vocab_size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(vocab_size, (count, length), generator=generator))


@pytest.mark.parametrize(
    ("brier", "expected"),
    [
        ((0.2181, 0.0688, 0.0259, 0.0125), 4.70),  # the paper's table 5
        ((1.0, 1.0, 1.0, 1.0), 100.0),
        ((-1.0, -1.0, -1.0, -1.0), 0.0),  # the product alone would give 100
        ((0.5, -0.1, -0.1, 0.5), 0.0),
        ((0.5, 0.1, 0.0, 0.5), 0.0),
    ],
    ids=["paper", "perfect", "four-negative", "two-negative", "zero"],
)
def test_brier_lm(brier, expected):
    value = brier_lm(torch.tensor(brier, dtype=torch.float64))
    assert value.item() == pytest.approx(expected, abs=0.01)


def test_positions_count_equally_whatever_their_block():
    sums = torch.tensor([[3.0] * 4, [1.0] * 4], dtype=torch.float64)
    counts = torch.tensor([9.0, 1.0], dtype=torch.float64)
    assert corpus_means(sums, counts).tolist() == pytest.approx([0.4] * 4)


def simulated_blocks(blocks, generator):
    """Sums and counts of blocks whose positions share a level: far from independent."""
    counts = torch.randint(5, 40, (blocks,), generator=generator).double()
    level = 0.3 + 0.1 * torch.randn(blocks, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(blocks, 4, generator=generator, dtype=torch.float64)
    factor = torch.tensor([1.0, 0.5, 0.3, 0.2], dtype=torch.float64)
    return counts[:, None] * level * factor + counts.sqrt()[:, None] * 0.5 * factor * noise, counts


def test_standard_errors_are_the_spread_between_corpora():
    generator = torch.Generator().manual_seed(0)
    corpora = [simulated_blocks(60, generator) for _ in range(400)]
    spread = torch.stack([corpus_means(*corpus) for corpus in corpora]).std(0)
    stated = torch.stack([standard_errors(*corpus) for corpus in corpora]).mean(0)
    torch.testing.assert_close(stated, spread, rtol=0.1, atol=0)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(1)
    truth = torch.tensor([0.3, 0.15, 0.09, 0.06], dtype=torch.float64)
    truth = torch.cat([truth, brier_lm(truth)[None]])
    covered = torch.zeros(5)
    for _ in range(200):
        low, high = bootstrap_interval(*simulated_blocks(60, generator), resamples=300)
        covered += (low <= truth) & (truth <= high)
    assert ((covered / 200 - 0.95).abs() < 0.06).all(), covered / 200


def test_intervals_repeat_themselves_and_agree_with_standard_errors():
    sums, counts = simulated_blocks(200, torch.Generator().manual_seed(2))
    low, high = bootstrap_interval(sums, counts, seed=5)
    assert torch.equal(bootstrap_interval(sums, counts, seed=5)[0], low)
    assert not torch.equal(bootstrap_interval(sums, counts, seed=6)[0], low)
    errors = [*standard_errors(sums, counts), brier_lm_error(sums, counts)]
    torch.testing.assert_close((high - low) / 2, 1.96 * torch.stack(errors), rtol=0.1, atol=0)
    sums[:, 3] = -1
    assert brier_lm_error(sums, counts).isnan() and brier_lm_error(sums[:1], counts[:1]).isnan()


@pytest.mark.parametrize("make", [tiny_calm, tiny_baseline], ids=["calm", "baseline"])
def test_the_batch_size_changes_nothing(make):
    model, blocks = make(vocab_size=5), random_blocks(5)
    one, three = (evaluate(model, blocks, batch_size=size, seed=3) for size in (1, 3))
    assert one.protocol == three.protocol
    for order, value in one.brier.items():
        assert value == pytest.approx(three.brier[order], abs=1e-6)
    assert one.brier_lm_interval == pytest.approx(three.brier_lm_interval, abs=1e-4)


def test_it_averages_what_brier_scores_gives():
    model, blocks = tiny_calm(), random_blocks(3)
    scores = brier_scores(model, torch.stack(blocks), seed=3)
    result = evaluate(model, blocks, seed=3)
    for order, value in result.brier.items():
        assert value == pytest.approx(scores[order].mean().item())
    errors = {order: (values.std() / 3**0.5).item() for order, values in scores.items()}
    assert result.standard_errors == pytest.approx(errors)


def test_labels_take_padding_out():
    model, blocks = tiny_calm(), random_blocks(3)
    padded = [{"input_ids": block, "labels": block.clone()} for block in blocks]
    padded[-1]["labels"][8:] = -100
    result = evaluate(model, padded)
    assert result.protocol["positions"] == 3 + 3 + 1
    assert result.protocol["data_sha256"] != evaluate(model, blocks).protocol["data_sha256"]
    entirely = {"input_ids": blocks[0], "labels": torch.full((16,), -100)}
    assert evaluate(model, [*padded, entirely]).brier == result.brier


BEGIN, END = 256, 257
DOCUMENTS = ["abcdefg", "hijklmnopq", "r", "stuvwx yz and more", "0123"]


def aligned_blocks(block_size, patch_size, start_token_id=BEGIN):
    """The documents as blocks, each after a start chunk."""
    documents = datasets.Dataset.from_dict({"text": DOCUMENTS})
    layout = {"block_size": block_size, "patch_size": patch_size, "start_token_id": start_token_id}
    packed = pack_documents(documents, byte_tokenizer(), **layout)
    return [packed[index] for index in range(len(packed))]


def starting_calm(patch_size):
    return tiny_calm(
        patch_size=patch_size, vocab_size=259, has_start_patch=True, bos_token_id=BEGIN
    )


@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 5, 8])
def test_first_chunks_of_documents_count_and_no_n_gram_leaves_its_document(patch_size):
    (block,) = aligned_blocks(120, patch_size)
    lengths = [len(text) + 1 for text in DOCUMENTS]  # with the end token
    expected = sum((length - 4) // patch_size + 1 for length in lengths if length >= 4)
    protocol = evaluate(starting_calm(patch_size), [block]).protocol
    assert protocol["positions"] == expected and protocol["start_chunks"] is True


def test_a_block_from_the_middle_of_a_document_begins_without_a_prediction():
    blocks = aligned_blocks(16, 4)
    begins_inside = [block["labels"][:4].min() >= 0 for block in blocks]
    assert 0 < sum(begins_inside) < len(blocks)
    whole = evaluate(starting_calm(4), aligned_blocks(120, 4)).protocol["positions"]
    assert evaluate(starting_calm(4), blocks).protocol["positions"] == whole - sum(begins_inside)


def test_a_first_chunk_is_scored_after_its_start_chunk_alone():
    model = starting_calm(4)
    (block,) = aligned_blocks(256, 4)
    first = {name: values[:8] for name, values in block.items()}
    alone = torch.tensor([[BEGIN] * 4 + list(b"abcd")])
    scores = brier_scores(model, alone, seed=0)
    result = evaluate(model, [first])
    assert result.protocol["positions"] == 1
    for order, value in result.brier.items():
        assert value == pytest.approx(scores[order].item())


def test_the_hash_names_the_text_not_its_layout():
    model = starting_calm(4)
    protocols = [evaluate(model, aligned_blocks(64, 4, start)).protocol for start in (BEGIN, None)]
    tokens = sum(len(text) + 1 for text in DOCUMENTS)
    assert [protocol["tokens"] for protocol in protocols] == [tokens, tokens]
    assert protocols[0]["data_sha256"] == protocols[1]["data_sha256"]
    assert protocols[0]["blocks"] > protocols[1]["blocks"]


def test_the_record_holds_the_protocol():
    blocks = random_blocks(4)
    result = evaluate(
        tiny_calm(), blocks, num_samples=4, brier_draws=2, seed=9, max_blocks=3,
        skip_repeats=True, describe={"model": "runs/x"},
    )  # fmt: skip
    record = json.loads(result.to_json())
    protocol = record["protocol"]
    assert protocol["model"] == "runs/x"
    assert {key: protocol[key] for key in ("block_size", "blocks", "positions", "seed")} == {
        "block_size": 16, "blocks": 3, "positions": 9, "seed": 9,
    }  # fmt: skip
    assert protocol["estimator"] == "two draws, as published"
    assert protocol["num_samples"] == 4 and protocol["brier_draws"] == 2
    assert protocol["noise_scale"] == 1.0 and protocol["skip_repeats"] is True
    assert protocol["versions"]["torch"] == torch.__version__
    assert len(protocol["data_sha256"]) == 64
    low, high = record["brier_lm_interval"]
    assert low <= record["brier_lm"] <= high
    table = result.to_table()
    for word in ("Brier-1 (%)", "Brier-4 (%)", "BrierLM", "block_size", "data_sha256", "95 %"):
        assert word in table


def test_one_block_has_no_interval():
    result = evaluate(tiny_calm(), random_blocks(1))
    assert result.brier_lm_interval is result.standard_errors is result.brier_intervals is None
    assert "NaN" not in result.to_json()
    assert "one block only" in result.to_table()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], "there are no blocks to evaluate"),
        ([*random_blocks(1), *random_blocks(1, 24)], "blocks must have one length; got 16 and 24"),
        (
            [{"input_ids": [1] * 16, "labels": [-100] * 16}],
            "no position is left to score",
        ),
    ],
    ids=["none", "lengths", "masked"],
)
def test_blocks_that_cannot_be_scored(blocks, message):
    with pytest.raises(UserError, match=message):
        evaluate(tiny_calm(), blocks)
