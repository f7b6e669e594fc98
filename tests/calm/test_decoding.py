"""Generation: against the published text, a loop without a cache, and known distributions."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import likely_prompt, prompt, tiny_calm

from calm.decoding import generate
from calm.decoding.sampling.methods import build_method
from calm.decoding.sampling.seeds import advance, sequence_seeds
from calm.errors import UserError
from calm.models import MODEL_CLASSES
from calm_kernels.noise import as_seed

GOLDENS = Path(__file__).parents[1] / "goldens"
START = {"has_start_patch": True, "bos_token_id": 4}
CASES = ["energy-k1", "energy-k2", "energy-k4", "diffusion-k4", "flow-k4"]


@pytest.mark.parametrize("kind", ["whole", "ragged"])
@pytest.mark.parametrize("case", CASES)
def test_generation_gives_the_published_text(case, kind):
    model_class = MODEL_CLASSES[case.partition("-")[0]]
    model = model_class.from_pretrained(GOLDENS / case, dtype=torch.float32)
    golden = load_file(GOLDENS / case / "io.safetensors")
    result = model.generate(
        golden[f"generate.{kind}.prompt"],
        max_length=9 * model.patch_size,
        temperature=1.0,
        noise_scale=0.0,
        prompt_alignment="pad",
    )
    assert torch.equal(result, golden[f"generate.{kind}.output"])


@torch.no_grad()
def generate_without_cache(model, ids, chunks, *, seed, method="batch", **sampling):
    """The loop as the paper writes it, which reads the whole text again for every chunk."""
    chosen = build_method(method, **sampling)
    start = ids.new_full((len(ids), model.patch_size), model.start_token_id or 0)
    text = ids if model.start_token_id is None else torch.cat([start, ids], dim=1)
    for index in range(chunks):
        inputs = model.embed_patches(text)
        hidden = model.transformer(inputs_embeds=inputs).last_hidden_state[:, -1]
        here = advance(sequence_seeds(seed, len(ids), torch.device("cpu")), index)
        text = torch.cat(
            [
                text,
                chosen.choose(model.distribution(hidden), here).tokens,
            ],
            dim=1,
        )
    return text[:, text.shape[1] - ids.shape[1] - chunks * model.patch_size :]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"patch_size": 2},
        {"has_start_patch": True, "bos_token_id": 1},
        {"input_type": "both"},
    ],
    ids=["energy", "k2", "start", "both"],
)
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 0.4},
        {"temperature": 0.7, "method": "exact"},
        {"temperature": 0.5, "method": "medoid"},
        {"temperature": 0.5, "method": "noise_scale"},
    ],
    ids=lambda sampling: "-".join(map(str, sampling.values())),
)
def test_text_with_a_cache_equals_text_without(fields, sampling):
    model = tiny_calm(**fields)
    ids = prompt(2, 3 * model.patch_size)
    options = {"num_samples": 12, "seed": 5, **sampling}
    result = generate(model, ids, max_new_tokens=5 * model.patch_size, **options)
    assert torch.equal(result, generate_without_cache(model, ids, 5, **options))


@pytest.mark.parametrize("head", ["diffusion", "flow"])
def test_diffusion_and_flow_equal_a_loop_without_cache(head):
    model, ids = tiny_calm(head=head), prompt(2, 8)
    options = {"temperature": 0.5, "num_samples": 6, "seed": 5}
    result = generate(model, ids, max_new_tokens=12, **options)
    assert torch.equal(result, generate_without_cache(model, ids, 3, **options))


def test_the_seed_decides_the_text():
    model, ids = tiny_calm(), prompt(1, 8)
    texts = [generate(model, ids, max_new_tokens=32, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    torch.manual_seed(1)
    first = generate(model, ids, max_new_tokens=32)
    second = generate(model, ids, max_new_tokens=32)
    torch.manual_seed(1)
    assert torch.equal(first, generate(model, ids, max_new_tokens=32))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("alignment", ["whole", "ragged"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_sequence_with_its_own_seed_does_not_depend_on_its_batch(temperature, alignment):
    model = tiny_calm()
    ids = likely_prompt(model, 3, 12 if alignment == "whole" else 14)
    options = {"max_new_tokens": 24, "temperature": temperature, "num_samples": 20}
    together = generate(model, ids, seed=[7, 8, 9], **options)
    for row, seed in enumerate([7, 8, 9]):
        alone = generate(model, ids[row : row + 1], seed=[seed], **options)
        assert torch.equal(alone[0], together[row])
    assert torch.equal(generate(model, ids.flip(0), seed=[9, 8, 7], **options), together.flip(0))


def test_equal_prompts_in_a_batch_get_different_texts():
    ids = prompt(1, 8).expand(6, -1)
    result = generate(tiny_calm(), ids, max_new_tokens=16, temperature=1.0, seed=0)
    assert len({tuple(row.tolist()) for row in result}) == 6


def chunk_probabilities(model, ids, draws=40_000):
    """The share of draws after `ids` that give each chunk, by its tokens."""
    hidden = model.transformer(inputs_embeds=model.embed_patches(ids)).last_hidden_state[:, -1]
    latents = model.generative_head.sample(hidden, num_samples=draws, seed=as_seed(11, "cpu"))
    drawn = model.decode_latents(latents)[:, 0]
    chunks, counts = drawn.unique(dim=0, return_counts=True)
    shares = (counts / draws).tolist()
    return {tuple(chunk): share for chunk, share in zip(chunks.tolist(), shares, strict=True)}


def check_shares(samples, probabilities, slack=0.01):
    """`samples` ``[rows, K]`` follow `probabilities` within four standard errors."""
    for chunk, chance in probabilities.items():
        share = (samples == torch.tensor(chunk)).all(-1).double().mean().item()
        assert abs(share - chance) < 4 * (chance * (1 - chance) / len(samples)) ** 0.5 + slack


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.4])
def test_the_next_chunk_follows_the_sharpened_distribution(temperature):
    model, ids = tiny_calm(patch_size=2, vocab_size=3), prompt(1, 6, vocab_size=3)
    probabilities = {
        chunk: chance ** (1 / temperature)
        for chunk, chance in chunk_probabilities(model, ids).items()
    }
    total = sum(probabilities.values())
    batch = ids.expand(3000, -1)
    result = generate(
        model, batch, max_new_tokens=2, temperature=temperature, num_samples=100, seed=2
    )
    check_shares(result[:, 6:], {chunk: chance / total for chunk, chance in probabilities.items()})


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_an_unfinished_chunk_conditions_the_next(temperature):
    model, ids = tiny_calm(patch_size=2, vocab_size=3), prompt(1, 7, vocab_size=3)
    probabilities = chunk_probabilities(model, ids[:, :6])
    probabilities = {
        chunk: p ** (1 / temperature) for chunk, p in probabilities.items() if chunk[0] == ids[0, 6]
    }
    total = sum(probabilities.values())
    batch = ids.expand(1500, -1)
    result = generate(
        model, batch, max_new_tokens=1, temperature=temperature, num_samples=60, seed=2
    )
    assert torch.equal(result[:, :7], batch)
    check_shares(result[:, 6:8], {chunk: chance / total for chunk, chance in probabilities.items()})


@pytest.mark.parametrize("length", [12, 13, 14, 15])
@pytest.mark.parametrize("new_tokens", [1, 3, 4, 7])
def test_prompts_of_any_length_are_kept_and_continued(length, new_tokens):
    model = tiny_calm()
    ids = likely_prompt(model, 2, length)
    result = generate(model, ids, max_new_tokens=new_tokens, temperature=1.0, seed=0)
    assert result.shape == (2, length + new_tokens)
    assert torch.equal(result[:, :length], ids)
    longer = generate(model, ids, max_length=length + new_tokens, temperature=1.0, seed=0)
    assert torch.equal(longer, result)


def test_alignments_agree_on_whole_chunks():
    model, ids = tiny_calm(pad_token_id=0), prompt(2, 8, vocab_size=4) + 1
    texts = [
        generate(model, ids, max_length=24, seed=1, prompt_alignment=alignment)
        for alignment in ("condition", "pad")
    ]
    kept = [row[row != 0] for row in texts[0]]  # padding as published also drops drawn pad tokens
    for row, expected in zip(texts[1], kept, strict=True):
        assert torch.equal(row[: len(expected)], expected) and (row[len(expected) :] == 0).all()


def test_a_published_length_overshoots_by_less_than_a_chunk():
    model, ids = tiny_calm(pad_token_id=0), prompt(1, 8).tolist()
    options = {"prompt_alignment": "pad", "temperature": 1.0, "seed": 0}
    assert generate(model, ids, max_length=17, **options).shape == (1, 20)
    assert generate(model, ids, max_new_tokens=9, **options).shape == (1, 17)
    assert generate(model, ids, max_length=17, temperature=1.0).shape == (1, 17)


def test_a_start_chunk_stands_before_every_text():
    model = tiny_calm(has_start_patch=True, bos_token_id=2, vocab_size=5)
    ids = prompt(1, 3)
    result = generate(model, ids, max_new_tokens=9, temperature=1.0, seed=0)
    assert torch.equal(result[:, :3], ids) and result.shape == (1, 12)
    spelled = torch.full((1, 4), 2)
    model.config.has_start_patch = False
    expected = generate(
        model, torch.cat([spelled, ids], 1), max_new_tokens=9, temperature=1, seed=0
    )
    assert torch.equal(result, expected[:, 4:])


def test_a_start_chunk_begins_texts_from_nothing():
    model = tiny_calm(has_start_patch=True, bos_token_id=2)
    model_without = tiny_calm(has_start_patch=False)
    result = generate(model, [[]], max_new_tokens=8, temperature=1.0, seed=0)
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 0}
    assert torch.equal(result, generate(model_without, [[2] * 4], **options)[:, 4:])
    with pytest.raises(UserError, match="the prompt is empty, and this model never learned how"):
        generate(model_without, [[]], **options)


def test_a_short_prompt_without_a_start_chunk_is_padded_with_one_warning():
    model, ids = tiny_calm(pad_token_id=0), prompt(1, 2).clamp(min=1)
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 0}
    with pytest.warns(
        UserWarning, match="a prompt of 2 tokens is shorter than a chunk of 4"
    ) as all_:
        result = generate(model, ids.expand(3, -1), **options)
    assert len(all_) == 1
    assert torch.equal(result[:, :2], ids.expand(3, -1)) and result.shape == (3, 10)
    padded = torch.cat([ids, torch.zeros(1, 2, dtype=torch.int64)], 1)
    assert torch.equal(result[0, 2:], generate(model, padded.tolist(), **options)[0, 4:])
