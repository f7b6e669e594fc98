"""The decoding benchmarks as far as a CPU can run them, and what decoding never allocates."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

pytest.importorskip("triton")

from benchmarks.gpu import decoding
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.models import as_published
from benchmarks.reference_decoding import eligible_chunks, reference_generate, reference_vote
from calm.decoding.generation import generate
from calm.norm import RMSNorm
from calm_kernels.backend import wants_overlap
from calm_kernels.linear_argmax import eager

A, B, C = (1, 2), (3, 4), (5, 6)
H200 = Ceilings(4.3e12, 0.79e15)


def test_rows_on_a_cpu():
    rows = list(decoding.rows(decoding.QUICK, "cpu", H200))
    names = ["ours"] * 4 + ["token by token"] * 2 + ["published"] * 4 + ["graph"] * 4
    assert [row["name"] for row in rows] == names
    for row in rows[-4:]:
        assert row["nodes"] >= row["longest_kernels"][0]["count"] > 0
        assert row["device_ms"] >= row["longest_kernels"][0]["ms"] > 0
    for row in rows[:-4]:
        tokens = row["batch_size"] * decoding.QUICK.new_tokens
        assert row["tokens_per_second"] == pytest.approx(1e3 * tokens / row["call_ms"])
        assert row["chunk_ms"] == pytest.approx(row["call_ms"] / 4)
    shares = [row["share_of_floor"] for row in rows if "floor_ms" in row]
    assert len(shares) == 4 and all(0 < share < 1 for share in shares)


def test_rows_of_launches_that_overlap(monkeypatch):
    """Where a GPU can, of one prompt; a text that differs is an error, and no time."""
    monkeypatch.setattr(decoding, "can_overlap", lambda device: True)
    model = decoding.make_calm(decoding.QUICK, "cpu", torch.float32)
    measurements = list(decoding._measurements(decoding.QUICK, "cpu", model, None))
    names = ["ours"] * 4 + [decoding.OVERLAPPING] * 2 + ["token by token"]
    assert [name for name, _ in measurements][:7] == names
    seen, one = [], measurements[4][1]

    def write(*_, seed, **__):
        seen.append((seed, wants_overlap()))
        return torch.tensor([len(seen) > 2])

    monkeypatch.setattr(decoding, "generate", write)
    monkeypatch.setattr(decoding, "row_of", lambda *args, **_: {"name": args[1], "batch": args[3]})
    assert one() == {"name": decoding.OVERLAPPING, "batch": 1}
    assert seen == [(decoding.SEED, False), (decoding.SEED, True)]
    del seen[0]
    with pytest.raises(AssertionError, match="texts differ where launches overlap"):
        one()


def test_the_rival_has_the_layers_of_the_published_code():
    model = decoding.make_calm(decoding.QUICK, "cpu", torch.float32)
    rival = as_published(model)
    kinds = {type(module) for module in rival.modules()}
    assert LlamaRMSNorm in kinds and RMSNorm not in kinds
    ids = decoding.prompts(decoding.QUICK, 1, "cpu")
    actual, expected = (each(ids).last_hidden_state for each in (model, rival))
    torch.testing.assert_close(actual, expected)
    assert any(type(module) is RMSNorm for module in model.modules())


def test_floors_of_the_published_size():
    with torch.device("meta"):
        model = decoding.make_calm(decoding.REFERENCE, "meta", torch.bfloat16)
    one = decoding.chunk_floor_ms(model, 1, 1, H200)
    assert 0.1 < one < 0.25  # the weights, read once
    many = decoding.chunk_floor_ms(model, 200, 1, H200)
    assert 0.1 < many < 0.5


def test_the_reference_vote():
    assert eligible_chunks([A, A, B, B, B, C], 2) == ({A: 2, B: 3}, 2)
    assert eligible_chunks([A, A, B], 3) == ({A: 2}, 2)  # nobody has three
    assert eligible_chunks([A, B], 1) == ({A: 1, B: 1}, 1)
    rng = random.Random(0)
    votes = [reference_vote([A, A, B, B, B, C], 2, rng) for _ in range(4000)]
    assert votes.count(B) / 4000 == pytest.approx(3 / 4, abs=0.03)  # C(3, 2) against C(2, 2)
    assert votes.count(C) == 0


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation returns, in elements, views included."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


VOCABULARY, CANDIDATES = 50_021, 100
SHAPE = decoding.Shape(
    **{**decoding.asdict(decoding.QUICK), "vocab_size": VOCABULARY, "num_samples": CANDIDATES}
)


def largest_of(run, *args, **options):
    with Largest() as seen:
        run(*args, **options)
    return seen.largest


@pytest.mark.parametrize("method", ["batch", "exact", "medoid", "noise_scale"])
@pytest.mark.parametrize("given", [0, 2], ids=["whole", "ragged"])
def test_no_logits_of_all_candidates(monkeypatch, method, given):
    monkeypatch.setattr(eager, "LOGITS_PER_BLOCK", 2**20)  # a few rows of this vocabulary
    model = decoding.make_calm(SHAPE, "cpu", torch.float32)
    ids = decoding.prompts(SHAPE, 1, "cpu")[:, : 8 - given]
    largest = largest_of(
        generate, model, ids, max_new_tokens=8, method=method, num_samples=CANDIDATES,
        max_draws=4 * CANDIDATES, seed=0,
    )  # fmt: skip
    weights = VOCABULARY * SHAPE.hidden_size  # the embedding, as a view
    assert largest <= weights < CANDIDATES * VOCABULARY / 2


def test_the_published_algorithm_holds_them():
    model = decoding.make_calm(SHAPE, "cpu", torch.float32)
    ids = decoding.prompts(SHAPE, 1, "cpu")
    options = {"max_new_tokens": 4, "temperature": 0.5, "num_samples": CANDIDATES}
    assert largest_of(reference_generate, model, ids, **options) >= 4 * CANDIDATES * VOCABULARY


def test_a_failure_is_a_row_and_the_others_go_on(monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(decoding, "published_row", fails)
    rows = list(decoding.rows(decoding.QUICK, "cpu", None))
    good = [row["name"] for row in rows if "error" not in row]
    assert good == ["ours"] * 4 + ["token by token"] * 2 + ["graph"] * 4
    assert [row for row in rows if "error" in row] == [
        {"name": "published", "error": "RuntimeError: out of memory"}
    ] * 4
    monkeypatch.setattr(decoding, "assert_parity", fails)
    (row,) = decoding.rows(decoding.QUICK, "cpu", None)
    assert row["name"] == "parity" and "error" in row
