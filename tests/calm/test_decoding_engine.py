"""The engine: lean backbone, ragged batches, fixed steps, stop strings, what is kept."""

import pytest
import torch
from tiny_models import BACKBONE, Recorder, prompt, tiny_baseline, tiny_calm
from transformers import LlamaConfig

from calm.decoding import generate, loop, warmup
from calm.decoding.engine.backbone import CachedBackbone
from calm.decoding.engine.decode_step import DecodeState, decode_step
from calm.decoding.sampling.methods import build_method
from calm.decoding.text.stopping import StopStrings
from calm.errors import UserError
from calm.models.backbone import Backbone

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "grouped-heads": {},
    "all-heads": {"num_key_value_heads": 4},
    "one-head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide-heads": {"head_dim": 32},
    "gelu": {"hidden_act": "gelu"},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "original_max_position_embeddings": 16,
            **LLAMA3,
        }
    },
}  # fmt: skip


def make_backbone(**fields):
    """A backbone whose norms and biases are not what they start as."""
    torch.manual_seed(0)
    model = Backbone(LlamaConfig(**{**BACKBONE, "vocab_size": 5, **fields})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


def uncached(backbone, embeds, lengths, steps):
    """The last state of each sequence alone and after each step, ``[B, 1 + steps, H]``.

    A sequence is its first chunks of `embeds`, then what the steps bring, the last of `embeds`.
    """
    rows = [torch.cat([row[:length], row[len(row) - steps :]])
            for row, length in zip(embeds, lengths, strict=True)]  # fmt: skip
    return torch.stack([read(backbone, row)[-1 - steps :] for row in rows])


def step(cached, embeds, cache):
    """A decode step, whose column is counted."""
    hidden = cached.decode_step(embeds, cache)
    cache.lengths += 1
    cache.length += 1
    return hidden


def read(backbone, row):
    return backbone(inputs_embeds=row[None], use_cache=False).last_hidden_state[0]


@torch.no_grad()
@pytest.mark.parametrize("is_fixed", [False, True], ids=["growing", "fixed"])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 3, 1]], ids=["equal", "ragged"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_the_cached_backbone_equals_the_backbone(fields, lengths, is_fixed):
    backbone = make_backbone(**fields)
    embeds = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(1))
    cached = CachedBackbone(backbone)
    cache = cached.allocate(3, 16, is_fixed=is_fixed)
    states = [cached.prefill(embeds[:, :5], lengths, cache)]
    states += [step(cached, embeds[:, column : column + 1], cache) for column in range(5, 11)]
    expected = uncached(backbone, embeds, lengths, 6)
    assert torch.allclose(torch.stack(states, 1), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("is_fixed", "device", "is_pinned"), [
    (True, "cuda", True), (False, "cuda", False), (True, "cpu", False),
])  # fmt: skip
def test_a_decode_step_with_a_mask_pins_its_attention(monkeypatch, is_fixed, device, is_pinned):
    """Two backends are left on a GPU, none of which plans anew; all is as before afterwards."""
    backbone = CachedBackbone(tiny_calm().transformer)
    cache = backbone.allocate(2, 8, is_fixed=is_fixed)
    backbone.prefill(torch.randn(2, 3, 32), [3, 3], cache)
    enabled, attention = [], torch.nn.functional.scaled_dot_product_attention

    def backends():
        cuda = torch.backends.cuda
        return [
            cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(),
        ]  # fmt: skip

    def record(*arguments, **options):
        enabled.append(backends())
        return attention(*arguments, **options)

    before = backends()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    monkeypatch.setattr(CachedBackbone, "device", torch.device(device))
    with torch.no_grad():
        backbone.decode_step(torch.randn(2, 1, 32), cache)
    assert enabled == [[False, False, True, True] if is_pinned else before] * 2
    assert backends() == before


@torch.no_grad()
def test_the_cached_backbone_rounds_no_worse_in_bfloat16():
    exact, backbone = make_backbone(), make_backbone().bfloat16()
    embeds = torch.randn(2, 9, 32).bfloat16()
    expected = uncached(exact, embeds.float(), [5, 5], 4)
    plain = uncached(backbone, embeds, [5, 5], 4)
    cached = CachedBackbone(backbone)
    cache = cached.allocate(2, 9)
    states = [cached.prefill(embeds[:, :5], [5, 5], cache)]
    states += [step(cached, embeds[:, column : column + 1], cache) for column in range(5, 9)]
    lean = torch.stack(states, 1)
    assert lean.dtype == torch.bfloat16
    assert (lean - expected).norm() <= 1.1 * (plain - expected).norm()


@torch.no_grad()
def test_a_cache_can_be_reset_and_selected():
    backbone = make_backbone()
    cached, embeds = CachedBackbone(backbone), torch.randn(3, 8, 32)
    cache = cached.allocate(3, 8)
    for lengths in ([6, 3, 5], [4, 6, 6]):
        cached.prefill(embeds[:, :6], lengths, cache)
        rest = cache.select(torch.tensor([2, 0]))
        state = cached.decode_step(embeds[[2, 0], 6:7], rest)
        expected = uncached(backbone, embeds[:, :7], lengths, 1)[[2, 0], -1]
        assert torch.allclose(state, expected, atol=1e-5)
    with pytest.raises(UserError, match="the cache holds 8 chunks, 6 of them in use; 3 more do"):
        cache.reserve(3)


@pytest.mark.parametrize("head", ["energy", "flow", "baseline"])
def test_half_precision_generates(head):
    model = make_model(head, pad_token_id=0).bfloat16()
    ids = [[1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3, 4]]
    result = generate(model, ids, max_new_tokens=9, temperature=0.5, num_samples=16, seed=0)
    assert result.shape == (2, 17) and result.dtype == torch.int64


# Batches


RAGGED = [[1, 2, 3, 4, 1, 2, 3, 4, 2, 2], [1, 2, 3, 4], [4, 3, 2, 1, 1, 2, 3, 4, 1, 2, 3, 4, 1]]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 0.4, "method": "exact"},
        {"temperature": 0.5, "method": "medoid"},
    ],
    ids=lambda sampling: "-".join(map(str, sampling.values())),
)
@pytest.mark.parametrize("has_start_patch", [False, True])
def test_prompts_of_different_lengths_do_not_affect_each_other(has_start_patch, sampling):
    model = tiny_calm(has_start_patch=has_start_patch, bos_token_id=1, pad_token_id=0)
    prompts = [*RAGGED, [], [3]] if has_start_patch else RAGGED
    options = {"num_samples": 16, "max_new_tokens": 10, **sampling}
    seeds = list(range(40, 40 + len(prompts)))
    together = generate(model, prompts, seed=seeds, **options)
    for row, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = generate(model, [ids], seed=[seed], **options)[0]
        assert alone[: len(ids)].tolist() == ids and len(alone) == len(ids) + 10
        assert torch.equal(together[row, : len(alone)], alone)
        assert (together[row, len(alone) :] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_tensors_give_the_text_of_lists_of_prompts(side):
    width = max(map(len, RAGGED))
    missing = [width - len(ids) for ids in RAGGED]
    rows, masks = [], []
    for ids, count in zip(RAGGED, missing, strict=True):
        fill, seen = [0] * count, [1] * len(ids)
        rows.append(fill + ids if side == "left" else ids + fill)
        masks.append(fill + seen if side == "left" else seen + fill)
    model = tiny_calm(pad_token_id=0)
    options = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    result = generate(model, torch.tensor(rows), torch.tensor(masks), **options)
    assert torch.equal(result, generate(model, RAGGED, **options))
    as_tensors = [torch.tensor(ids) for ids in RAGGED]
    assert torch.equal(result, generate(model, as_tensors, **options))


def test_lengths_count_from_each_prompt():
    model = tiny_calm(pad_token_id=0)
    details = generate(model, RAGGED, max_length=20, seed=0, return_details=True, temperature=1.0)
    assert details.new_tokens.tolist() == [10, 16, 7] and details.sequences.shape == (3, 20)
    with pytest.raises(UserError, match="max_length must exceed the 13 tokens of the prompt"):
        generate(model, RAGGED, max_length=13)


def test_the_baseline_takes_ragged_prompts_too():
    model = tiny_baseline(vocab_size=5, pad_token_id=0)
    options = {"max_new_tokens": 7, "temperature": 0.8}
    together = model.generate(RAGGED, seed=[1, 2, 3], **options)
    for row, (ids, seed) in enumerate(zip(RAGGED, (1, 2, 3), strict=True)):
        alone = model.generate([ids], seed=[seed], **options)[0]
        assert torch.equal(together[row, : len(alone)], alone)


# Fixed steps, as a graph replays them


CAPTURABLE = [("batch", 1.0), ("batch", 0.5), ("batch", 0.4), ("medoid", 0.5), ("noise_scale", 0.5)]


def make_model(head, **fields):
    return (
        tiny_baseline(vocab_size=5, **fields) if head == "baseline" else tiny_calm(head, **fields)
    )


def predictor_of(model, method, temperature):
    chosen = build_method(method, temperature=temperature, num_samples=8)
    return model.make_predictor(chosen, temperature)


@torch.no_grad()
@pytest.mark.parametrize(
    ("head", "method", "temperature"),
    [
        *(("energy", *sampling) for sampling in CAPTURABLE),
        ("flow", "batch", 0.5),
        ("diffusion", "medoid", 0.5),
        ("baseline", "batch", 0.5),
    ],
)
def test_a_captured_step_does_not_synchronise(head, method, temperature):
    """Tensors without data: reading one, or a shape that depends on data, raises."""
    predictor = predictor_of(make_model(head).to("meta"), method, temperature)
    assert predictor.is_capturable
    state = DecodeState.allocate(predictor, batch_size=2, capacity=64, is_fixed=True)
    seed = state.seed.data_ptr()
    record = decode_step(state)
    assert record.shape == (2, predictor.patch_size + 5) and state.seed.data_ptr() == seed


def test_methods_without_fixed_shapes_are_not_captured():
    assert not predictor_of(tiny_calm(), "exact", 0.5).is_capturable


class ReplayedStep:
    """What `CapturedStep` is on a GPU, without the graph: fixed memory, one record reused."""

    def __init__(self, predictor, batch_size, capacity):
        self.state = DecodeState.allocate(
            predictor, batch_size=batch_size, capacity=capacity, is_fixed=True
        )
        self.num_steps = 0

    def replay(self):
        self.num_steps += 1
        return decode_step(self.state)


@pytest.mark.parametrize("head", ["energy", "flow", "baseline"])
def test_replayed_steps_give_the_same_text(monkeypatch, head):
    """Reading the chunks every few steps runs past the end of a text, which changes nothing."""
    model = make_model(head, eos_token_id=4, pad_token_id=0, max_position_embeddings=128)
    options = {"max_new_tokens": 43, "temperature": 0.8, "num_samples": 8, "seed": [5, 6, 7]}
    prompts = RAGGED if head != "baseline" else [[1], [1, 2], [3]]
    expected = generate(model, prompts, return_details=True, **options)
    made = {}

    def captured_step(predictor, *, batch_size, capacity):
        made.setdefault("step", ReplayedStep(predictor, batch_size, capacity + 5))
        return made["step"]

    monkeypatch.setattr(loop, "_is_captured", lambda predictor: True)
    monkeypatch.setattr(loop, "captured_step", captured_step)
    for _ in range(2):  # on the same memory again
        result = generate(model, prompts, return_details=True, **options)
        for name in ("sequences", "new_tokens", "levels", "draws", "fallbacks"):
            assert torch.equal(getattr(result, name), getattr(expected, name)), name
    assert result.warmup_seconds >= 0
    watched = Recorder()
    before = made["step"].num_steps
    del made["step"]
    text = generate(model, prompts[:1], streamer=watched, **{**options, "seed": [5]})
    assert torch.equal(torch.cat([part.view(-1) for part in watched.received]), text[0])
    assert before > 0


def test_warmup_without_a_gpu_captures_nothing():
    assert warmup(tiny_calm(), max_length=64, temperature=1.0) > 0
    with pytest.raises(UserError, match=r"temperature must lie in \(0, 1\]"):
        warmup(tiny_calm(), max_length=64, temperature=2.0)


# Stop strings


class Letters:
    """A tokenizer whose tokens are a few letters each."""

    words = ("ab", "b", "c", "abc", "")

    def decode(self, tokens, **options):
        return "".join(self.words[token] for token in tokens)


@pytest.mark.parametrize(
    ("tokens", "fresh", "strings", "left"),
    [
        ([0, 1, 2], 3, "bb", 2),
        ([0, 1, 2, 2], 2, ["bbc"], 3),  # across a border of chunks
        ([0, 1, 2, 2], 1, ["cc", "x"], 4),
        ([3, 3, 3], 3, "ca", 2),  # inside a token: the token stays
        ([0, 4, 4, 4, 2], 1, "bc", 5),  # tokens without text between
        ([0, 1, 2], 3, "ac", None),
        ([2, 2] * 20 + [0, 2], 2, "abc", 42),
    ],
)
def test_stop_strings(tokens, fresh, strings, left):
    assert StopStrings(strings, Letters()).cut([], tokens, fresh) == left


def test_generation_ends_after_a_stop_string():
    model, ids = tiny_calm(pad_token_id=4), prompt(3, 8).tolist()
    options = {"max_new_tokens": 30, "temperature": 1.0, "seed": 1, "return_details": True}
    free = generate(model, ids, **options)
    stopped = generate(model, ids, stop_strings=["cb", "bcc"], tokenizer=Letters(), **options)
    assert len(stopped.new_tokens.unique()) > 1
    for row, count in enumerate(stopped.new_tokens.tolist()):
        new = stopped.sequences[row, 8 : 8 + count].tolist()
        assert new == free.sequences[row, 8 : 8 + count].tolist()
        text = Letters().decode(new)
        assert any(stop in text for stop in ("cb", "bcc")) or count == 30
        assert not any(stop in Letters().decode(new[:-1]) for stop in ("cb", "bcc"))
        assert (stopped.sequences[row, 8 + count :] == 4).all()
