"""Muon with AdamW: updates against torch's own two optimizers, schedules, checkpoints."""

import copy

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from calm.training.muon import MuonAdamW, orthogonal

RATES = {"muon_lr": 2e-2, "lr": 1e-2, "weight_decay": 0.1}


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 6), nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 5)
    )


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        ids = torch.arange(11) * (step + 1) % 11
        model(ids).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 5, 5), (2, 4, 30), (1, 30, 4)], ids=str)
def test_orthogonal_evens_out_the_singular_values(shape):
    torch.manual_seed(1)
    # Singular values far from each other, none of them near zero.
    rows, columns = shape[1:]
    smaller = min(rows, columns)
    left = torch.linalg.qr(torch.randn(shape[0], rows, smaller))[0]
    right = torch.linalg.qr(torch.randn(shape[0], columns, smaller))[0]
    spread = torch.logspace(-1, 1, smaller)
    evened = orthogonal(left * spread @ right.mT).float()
    values = torch.linalg.svdvals(evened)
    assert values.min() > 0.6
    assert values.max() < 1.3
    # The singular vectors stay: left^T evened right is diagonal.
    middle = left.mT @ evened @ right
    off_diagonal = middle - torch.diag_embed(middle.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 0.03


@pytest.mark.parametrize(
    ("name", "arguments"), [("polynomial", {"power": 2}), ("cosine_with_min_lr", {"min_lr": 1e-3})]
)
def test_schedules_that_ask_for_the_rate(name, arguments):
    """They read it from the optimizer's defaults."""
    optimizer = MuonAdamW.for_model(small_model(), **RATES)
    schedule = get_scheduler(name, optimizer, 0, 4, scheduler_specific_kwargs=arguments)
    assert schedule.get_last_lr() == [RATES["muon_lr"], RATES["lr"], RATES["lr"]]


def test_updates_equal_those_of_torch():
    ours, theirs = small_model(), small_model()
    matrices = [layer.weight for layer in theirs if isinstance(layer, nn.Linear)]
    plain = [parameter for parameter in theirs.parameters() if parameter.dim() == 1]
    muon = torch.optim.Muon(
        matrices, lr=RATES["muon_lr"], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [{"params": [theirs[0].weight]}, {"params": plain, "weight_decay": 0.0}],
        lr=RATES["lr"], betas=(0.9, 0.95), weight_decay=0.1,
    )  # fmt: skip
    both = MuonAdamW.for_model(ours, **RATES)
    for _ in range(3):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in (both, muon, adamw):
            optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # torch orthogonalises in bfloat16.
        is_matrix = any(other is matrix for matrix in matrices)
        tolerance = 0.02 * 3 * RATES["muon_lr"] if is_matrix else 1e-6
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    moved = (ours[3].weight - small_model()[3].weight).square().mean().sqrt()
    assert moved > 0.2 * RATES["muon_lr"]  # an update's size, well above the tolerance


def test_biases_and_gains_do_not_decay():
    model = small_model()
    optimizer = MuonAdamW.for_model(model, **RATES)
    decays = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(decays) == len(list(model.parameters()))
    for parameter in model.parameters():
        assert decays[id(parameter)] == (0.1 if parameter.dim() > 1 else 0.0)


def test_frozen_weights_and_the_output_embedding_are_no_matrices():
    model = small_model()
    model[1].requires_grad_(False)
    model.get_output_embeddings = lambda: model[4]
    optimizer = MuonAdamW.for_model(model, **RATES)
    assert [id(weight) for weight in optimizer.param_groups[0]["params"]] == [id(model[3].weight)]
    trained = sum(len(group["params"]) for group in optimizer.param_groups)
    assert trained == sum(parameter.requires_grad for parameter in model.parameters())


def test_a_schedule_scales_every_rate():
    optimizer = MuonAdamW.for_model(small_model(), **RATES)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()  # nothing has a gradient: no update
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-3, 5e-3]


def test_a_resumed_run_equals_the_one_never_stopped():
    whole, stopped = small_model(), small_model()
    train(whole, MuonAdamW.for_model(whole, **RATES), 6)
    optimizer = MuonAdamW.for_model(stopped, **RATES)
    train(stopped, optimizer, 3)
    resumed = copy.deepcopy(stopped)
    continued = MuonAdamW.for_model(resumed, **RATES)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(resumed, continued, 3, start=3)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
