"""Generation: against the published text, against a loop without cache, and against known laws."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import Recorder, prompt, tiny_baseline, tiny_calm

from calm.decoding import Generation, generate, generate_tokens
from calm.decoding.sampling import advance, draw_patches, sequence_seeds
from calm.decoding.temperature import vote
from calm.errors import UserError
from calm.models import MODEL_CLASSES
from calm_kernels.noise import as_seed

GOLDENS = Path(__file__).parents[1] / "goldens"
START = {"has_start_patch": True, "bos_token_id": 4}
CASES = ["energy-k1", "energy-k2", "energy-k4", "diffusion-k4", "flow-k4"]


def likely_prompt(model, batch, length):
    """Text of the model's own: an unfinished chunk at its end has a continuation."""
    return generate(model, prompt(batch, 8), max_length=40, temperature=1.0, seed=1)[:, :length]


@pytest.mark.parametrize("kind", ["whole", "ragged"])
@pytest.mark.parametrize("case", CASES)
def test_the_published_text(case, kind):
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
def generate_without_cache(model, ids, chunks, *, temperature, num_samples, seed):
    """The loop in the words of the paper, reading the whole text again for every chunk."""
    for index in range(chunks):
        inputs = model.embed_patches(torch.cat([model.start_tokens(len(ids)), ids], dim=1))
        hidden = model.transformer(inputs_embeds=inputs).last_hidden_state[:, -1]
        here = advance(sequence_seeds(seed, len(ids), ids.device), index)
        count = 1 if temperature == 1.0 else num_samples
        candidates = draw_patches(model, hidden, num_samples=count, seed=here).transpose(0, 1)
        chunk, _ = vote(candidates, temperature, seed=here)
        ids = torch.cat([ids, chunk], dim=1)
    return ids


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1 / 3, 0.4])
@pytest.mark.parametrize(
    "fields",
    [{}, {"patch_size": 2}, START, {"input_type": "both"}, {"head": "flow"}],
    ids=lambda fields: "-".join(map(str, fields.values())) or "energy",
)
def test_the_cache_changes_nothing(fields, temperature):
    model = tiny_calm(**fields)
    ids = prompt(2, 3 * model.patch_size)
    options = {"temperature": temperature, "num_samples": 12, "seed": 5}
    result = generate(model, ids, max_new_tokens=6 * model.patch_size, **options)
    assert torch.equal(result, generate_without_cache(model, ids, 6, **options))


def test_one_seed_one_text():
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


def test_votes_follow_algorithm_2():
    """Three A and two B, n = 2: weights C(3, 2) = 3 and C(2, 2) = 1 (the paper's worked case)."""
    candidates = torch.tensor([[1, 1], [2, 2], [1, 1], [2, 2], [1, 1]]).expand(4000, -1, -1)
    tokens, level = vote(candidates, 0.5, seed=as_seed(0, "cpu"))
    share = (tokens[:, 0] == 1).double().mean().item()
    assert share == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 4000) ** 0.5)
    assert (level == 2).all()


def chunk_law(model, ids, draws=40_000):
    """How often each chunk follows `ids`, by its tokens."""
    hidden = model.transformer(inputs_embeds=model.embed_patches(ids)).last_hidden_state[:, -1]
    drawn = draw_patches(model, hidden, num_samples=draws, seed=as_seed(11, "cpu"))[:, 0]
    chunks, counts = drawn.unique(dim=0, return_counts=True)
    shares = (counts / draws).tolist()
    return {tuple(chunk): share for chunk, share in zip(chunks.tolist(), shares, strict=True)}


def check_law(samples, law, slack=0.01):
    """`samples` ``[rows, K]`` follow `law` within four standard errors."""
    for chunk, chance in law.items():
        share = (samples == torch.tensor(chunk)).all(-1).double().mean().item()
        assert abs(share - chance) < 4 * (chance * (1 - chance) / len(samples)) ** 0.5 + slack


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.4])
def test_the_next_chunk_follows_the_sharpened_law(temperature):
    model, ids = tiny_calm(patch_size=2, vocab_size=3), prompt(1, 6, vocab_size=3)
    law = {chunk: chance ** (1 / temperature) for chunk, chance in chunk_law(model, ids).items()}
    total = sum(law.values())
    batch = ids.expand(3000, -1)
    result = generate(
        model, batch, max_new_tokens=2, temperature=temperature, num_samples=100, seed=2
    )
    check_law(result[:, 6:], {chunk: chance / total for chunk, chance in law.items()})


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_an_unfinished_chunk_conditions_the_next(temperature):
    model, ids = tiny_calm(patch_size=2, vocab_size=3), prompt(1, 7, vocab_size=3)
    law = chunk_law(model, ids[:, :6])
    law = {chunk: p ** (1 / temperature) for chunk, p in law.items() if chunk[0] == ids[0, 6]}
    total = sum(law.values())
    batch = ids.expand(1500, -1)
    result = generate(
        model, batch, max_new_tokens=1, temperature=temperature, num_samples=60, seed=2
    )
    assert torch.equal(result[:, :7], batch)
    check_law(result[:, 6:8], {chunk: chance / total for chunk, chance in law.items()})


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
    model, ids = tiny_calm(pad_token_id=0), prompt(1, 8)
    options = {"prompt_alignment": "pad", "temperature": 1.0, "seed": 0}
    assert generate(model, ids, max_length=17, **options).shape == (1, 20)
    assert generate(model, ids, max_new_tokens=9, **options).shape == (1, 17)
    assert generate(model, ids, max_length=17, temperature=1.0).shape == (1, 17)


def test_a_start_patch_needs_no_whole_chunk():
    model, ids = tiny_calm(**START), prompt(2, 3)
    result = generate(model, ids, max_new_tokens=9, temperature=1.0, seed=0)
    assert torch.equal(result[:, :3], ids) and result.shape == (2, 12)
    with pytest.raises(UserError, match="the prompt must hold at least one chunk of 4 tokens"):
        generate(tiny_calm(), ids, max_new_tokens=9)


def ending_model():
    """Ids 3 and 4 end a text, so that sequences end early and at different places."""
    return tiny_calm(eos_token_id=[3, 4], pad_token_id=0, vocab_size=17)


def test_a_sequence_ends_with_the_chunk_of_its_end_token():
    model, ids = ending_model(), prompt(8, 8, vocab_size=3)
    details = generate(model, ids, max_new_tokens=40, temperature=1.0, seed=0, return_details=True)
    assert isinstance(details, Generation)
    model.config.eos_token_id = None
    free = generate(model, ids, max_new_tokens=40, temperature=1.0, seed=0)
    assert len(details.new_tokens.unique()) > 1
    for row, count, level, expected in zip(
        details.sequences, details.new_tokens.tolist(), details.levels, free, strict=True
    ):
        new = row[8 : 8 + count]
        assert torch.equal(new, expected[8 : 8 + count])
        is_end = torch.isin(new, torch.tensor([3, 4])).view(-1, 4).any(-1)
        assert not is_end[:-1].any() and (is_end[-1] or count == 40)
        assert (row[8 + count :] == 0).all()
        assert (level == (torch.arange(len(level)) < count // 4)).all()
    assert details.sequences.shape[1] == 8 + details.new_tokens.max()


def test_an_end_token_of_the_prompt_ends_nothing():
    model = tiny_calm(vocab_size=17)
    ids = likely_prompt(model, 1, 9)
    free = generate(model, ids, max_new_tokens=7, seed=0)
    end = ids[0, 8].item()  # in the unfinished chunk
    assert end not in free[0, 9:12], "choose another seed: the new tokens hold the end token too"
    model.config.eos_token_id = end
    assert torch.equal(generate(model, ids, max_new_tokens=7, seed=0), free)


def test_a_batch_that_may_end_needs_a_pad_token():
    model = tiny_calm(eos_token_id=4)
    generate(model, prompt(1, 8), max_new_tokens=8)
    with pytest.raises(UserError, match=r"config\.pad_token_id is None"):
        generate(model, prompt(2, 8), max_new_tokens=8)


@pytest.mark.parametrize("length", [12, 14])
def test_streams_hold_what_is_returned(length):
    streamer, model = Recorder(), tiny_calm()
    ids = likely_prompt(model, 2, length)
    result = generate(model, ids, max_new_tokens=9, seed=0, streamer=streamer)
    assert torch.equal(torch.cat(streamer.received, dim=1), result)
    assert torch.equal(streamer.received[0], ids) and streamer.has_ended


def test_an_interrupted_stream_is_ended():
    class Interrupting(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.received) == 3:
                raise KeyboardInterrupt

    for continue_, model in ((generate, tiny_calm()), (generate_tokens, tiny_baseline())):
        streamer = Interrupting()
        with pytest.raises(KeyboardInterrupt):
            continue_(model, prompt(1, 8, vocab_size=3), max_new_tokens=40, streamer=streamer)
        assert streamer.has_ended


def test_details_say_how_it_went():
    model, ids = tiny_calm(), prompt(2, 8)
    details = generate(
        model, ids, max_new_tokens=12, temperature=0.5, num_samples=30, seed=0, return_details=True
    )
    assert details.levels.shape == (2, 3) and details.draws == 90
    assert ((details.levels == 1) | (details.levels == 2)).all()
    assert details.new_tokens.tolist() == [12, 12]
    assert details.tokens_per_second == pytest.approx(24 / details.seconds)


@pytest.mark.parametrize(
    ("length", "new_tokens", "kept"), [(40, 24, 40), (60, 24, 40), (63, 22, 40)]
)
def test_long_prompts_are_cut_on_request(length, new_tokens, kept):
    model, ids = tiny_calm(max_position_embeddings=16), prompt(1, length)  # 64 tokens
    options = {"max_new_tokens": new_tokens, "temperature": 1.0, "seed": 0}
    if length > kept:
        with pytest.raises(UserError, match=f"the prompt .{length} tokens. and {new_tokens} new"):
            generate(model, ids, **options)
    result = generate(model, ids, truncate=True, **options)
    assert torch.equal(result[:, :kept], ids[:, -kept:]) and result.shape[1] == kept + new_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature must lie in \(0, 1\], got 0.0"),
        ({"temperature": 1.5}, r"temperature must lie in \(0, 1\], got 1.5"),
        ({"temperature": float("nan")}, r"temperature must lie in \(0, 1\], got nan"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"noise_scale": -1.0}, "noise_scale must be finite and at least 0, got -1.0"),
        ({"method": "exact"}, "method must be one of batch; got 'exact'"),
        ({"prompt_alignment": "left"}, "prompt_alignment must be one of condition, pad"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": None}, "pass either max_new_tokens or max_length"),
        ({"max_length": 20}, "pass either max_new_tokens or max_length"),
        ({"max_new_tokens": None, "max_length": 8}, "max_length must exceed the 8 tokens"),
        ({"max_new_tokens": 300}, "8 tokens. and 300 new tokens exceed the context of 256"),
        ({"seed": [1, 2]}, "seed must hold one number per sequence, 1; got 2"),
        ({"input_ids": torch.tensor([[1, 2, 3, 5]])}, r"must lie in \[0, 5\), the vocabulary"),
        ({"input_ids": torch.tensor([[1, 2, 3, -1]])}, "got ids from -1 to 3"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "input_ids must hold a token"),
        ({"input_ids": torch.zeros(8)}, r"input_ids must be int64 \[B, T\], got torch.float32"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])}, "attention_mask hides"),
    ],
)
def test_bad_arguments_are_named(options, message):
    arguments = {"input_ids": prompt(1, 8), "max_new_tokens": 4, **options}
    with pytest.raises(UserError, match=message):
        generate(tiny_calm(), **arguments)


def test_padding_needs_a_pad_token():
    with pytest.raises(UserError, match=r'prompt_alignment="pad" needs config\.pad_token_id'):
        generate(tiny_calm(), prompt(1, 9), max_new_tokens=4, prompt_alignment="pad")


def test_a_prompt_that_nothing_continues():
    ids = prompt(1, 8)
    model = tiny_calm()
    deterministic = generate(model, ids, max_new_tokens=4, noise_scale=0.0)
    never = (deterministic[:, 8:9] + 1) % 5
    with pytest.raises(UserError, match=r"none of 40 draws begins with \[\d\], the tokens at the"):
        generate(
            model, torch.cat([ids, never], 1), max_new_tokens=4,
            noise_scale=0.0, num_samples=20, max_draws=40,
        )  # fmt: skip


def test_damaged_weights_are_reported():
    model = tiny_calm()
    with torch.no_grad():
        model.mlp_generator.hidden_embd.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="latents that are not finite"):
        generate(model, prompt(1, 8), max_new_tokens=4)
