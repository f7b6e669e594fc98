"""Where texts end, what streams and details show, and what is refused."""

import pytest
import torch
from tiny_models import Recorder, likely_prompt, prompt, tiny_baseline, tiny_calm

from calm.decoding import Generation, generate
from calm.errors import UserError, UserNotice


def ending_model(**fields):
    """Ids 3 and 4 end a text, so that sequences end early and at different places."""
    return tiny_calm(eos_token_id=[3, 4], pad_token_id=0, vocab_size=17, **fields)


@pytest.mark.parametrize("method", ["batch", "exact"])
def test_a_sequence_ends_with_its_end_token(method):
    model, ids = ending_model(), prompt(8, 8, vocab_size=3).tolist()
    options = {
        "max_new_tokens": 24, "temperature": 0.9, "num_samples": 8, "seed": list(range(8)),
        "method": method,
    }  # fmt: skip
    details = generate(model, ids, return_details=True, **options)
    assert isinstance(details, Generation)
    model.config.eos_token_id = None
    free = generate(model, ids, **options)
    assert len(details.new_tokens.unique()) > 1
    for row, count, num_agreeing, draws, expected in zip(
        details.sequences, details.new_tokens.tolist(), details.levels, details.draws, free,
        strict=True,
    ):  # fmt: skip
        new = row[8 : 8 + count]
        assert torch.equal(new, expected[8 : 8 + count])
        is_end = torch.isin(new, torch.tensor([3, 4]))
        assert not is_end[:-1].any() and (is_end[-1] or count == 24)
        assert (row[8 + count :] == 0).all()
        is_used = torch.arange(len(num_agreeing)) < -(-count // 4)
        assert torch.equal(draws > 0, is_used) and (num_agreeing[~is_used] == 0).all()
    assert details.sequences.shape[1] == 8 + details.new_tokens.max()


def test_the_published_end_keeps_what_follows_in_its_chunk():
    model, ids = ending_model(), prompt(8, 8, vocab_size=2) + 1
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 0}
    cut = generate(model, ids, return_details=True, **options)
    kept = generate(model, ids, return_details=True, prompt_alignment="pad", **options)
    assert torch.equal(kept.new_tokens, -(-cut.new_tokens // 4) * 4)


def test_an_end_token_of_the_prompt_ends_nothing():
    model = tiny_calm(vocab_size=17)
    ids = likely_prompt(model, 1, 9)
    free = generate(model, ids, max_new_tokens=7, seed=0)
    end = ids[0, 8].item()  # in the unfinished chunk
    assert end not in free[0, 9:12], "choose another seed: the new tokens hold the end token too"
    model.config.eos_token_id = end
    assert torch.equal(generate(model, ids, max_new_tokens=7, seed=0), free)


def test_sequences_of_different_lengths_need_a_pad_token():
    model = tiny_calm()
    generate(model, prompt(2, 8), max_new_tokens=8)
    for options in ({"max_new_tokens": 8}, {"max_length": 20}):
        if "max_new_tokens" in options:
            ids = [[1] * 8, [1] * 9]
        else:
            ids, options["stop_strings"], options["tokenizer"] = prompt(2, 8), "x", object()
        with pytest.raises(
            UserError, match=r"may end at different places, but config\.pad_token_id"
        ):
            generate(model, ids, **options)


@pytest.mark.parametrize("length", [12, 14])
def test_a_stream_receives_the_returned_tokens(length):
    streamer, model = Recorder(), tiny_calm()
    ids = likely_prompt(model, 1, length)
    result = generate(model, ids, max_new_tokens=9, seed=0, streamer=streamer)
    assert torch.equal(streamer.received[0], ids) and streamer.has_ended
    sizes = [len(part) for part in streamer.received[1:]]
    assert sizes == [4 - length % 4, 4, 1 + length % 4][: len(sizes)]
    assert torch.equal(torch.cat([part.view(-1) for part in streamer.received]), result[0])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (prompt(2, 8), {}, "a streamer shows one sequence, got 2 prompts"),
        (prompt(1, 8), {"temperature": 2.0}, "temperature must lie"),
        (prompt(1, 8) + 99, {}, "input_ids must lie in"),
        (prompt(1, 8), {"max_new_tokens": 0}, "max_new_tokens must be"),
        (prompt(1, 8), {"stop_strings": "x"}, "stop_strings needs tokenizer"),
    ],
    ids=["prompts", "temperature", "ids", "length", "stop"],
)
def test_a_refused_request_ends_its_streamer(ids, options, message):
    streamer = Recorder()
    with pytest.raises(UserError, match=message):
        generate(tiny_calm(), ids, **{"max_new_tokens": 9, **options}, streamer=streamer)
    assert streamer.has_ended and not streamer.received


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_tensor_without_mask_is_noticed(side):
    model = tiny_calm(pad_token_id=0)
    ids = prompt(2, 8, vocab_size=4) + 1
    generate(model, ids, max_new_tokens=4)
    ids[0, slice(0, 3) if side == "left" else slice(5, 8)] = 0
    with pytest.warns(UserNotice, match=r"begin or end with the pad token.*pass attention_mask"):
        generate(model, ids, max_new_tokens=4)
    generate(model, ids, ids != 0, max_new_tokens=4)
    generate(model, ids.tolist(), max_new_tokens=4)  # a list needs no padding
    model.config.eos_token_id = 0
    generate(model, ids, max_new_tokens=4)  # text may begin or end with the end token


def test_an_interrupted_stream_is_ended():
    class Interrupting(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.received) == 3:
                raise KeyboardInterrupt

    for model in (tiny_calm(), tiny_baseline()):
        streamer = Interrupting()
        with pytest.raises(KeyboardInterrupt):
            model.generate(prompt(1, 8, vocab_size=3), max_new_tokens=40, streamer=streamer)
        assert streamer.has_ended


def test_details_hold_one_column_per_chunk():
    model, ids = tiny_calm(), prompt(2, 8)
    details = generate(
        model, ids, max_new_tokens=12, temperature=0.5, num_samples=30, seed=0, return_details=True
    )
    assert details.levels.shape == (2, 3) and (details.draws == 30).all()
    assert details.draws.shape == details.saved.shape == (2, 3)
    assert details.fallbacks.dtype == torch.bool and not details.fallbacks.any()
    assert ((details.levels == 1) | (details.levels == 2)).all()
    assert details.new_tokens.tolist() == [12, 12]
    assert details.seconds == details.prefill_seconds + details.decode_seconds > 0
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
        ({"num_samples": 0}, "num_samples must be at least 1, .*got 0"),
        ({"method": "direct"}, "temperature must be 1, got 0.5"),
        ({"method": "exact", "max_draws": 1}, "max_draws must be at least 2"),
        ({"noise_scale": -1.0}, "noise_scale must be finite and at least 0, got -1.0"),
        ({"method": "nucleus"}, "method must be one of direct, batch, .*; got 'nucleus'"),
        ({"prompt_alignment": "left"}, "prompt_alignment must be one of condition, pad"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1; got 0"),
        ({"max_new_tokens": 4.0}, "max_new_tokens must be a whole number, at least 1; got 4.0"),
        ({"max_new_tokens": None, "max_length": 9.5}, "max_length must be a whole number.*9.5"),
        ({"max_new_tokens": None}, "pass either max_new_tokens or max_length"),
        ({"max_length": 20}, "pass either max_new_tokens or max_length"),
        ({"max_new_tokens": None, "max_length": 8}, "max_length must exceed the 8 tokens"),
        ({"max_new_tokens": 300}, "8 tokens. and 300 new tokens exceed the context of 256"),
        ({"seed": [1, 2]}, "seed must hold one number per sequence, 1; got 2"),
        ({"seed": [1.5]}, "seed must hold whole numbers of 64 bits, got 1.5"),
        ({"seed": [2**63]}, "seed must hold whole numbers of 64 bits, got 9223372036854775808"),
        ({"input_ids": torch.tensor([[1, 2, 3, 5]])}, r"must lie in \[0, 5\), the vocabulary"),
        ({"input_ids": torch.tensor([[1, 2, 3, -1]])}, "got ids from -1 to 3"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "the prompt is empty"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.int64)}, "must hold at least one prompt"),
        ({"input_ids": [[1, 2, 3, 0.5]]}, r"input_ids\[0\] must be a list of token ids"),
        ({"input_ids": ["text"]}, r"input_ids\[0\] must be a list of token ids"),
        ({"input_ids": torch.zeros(8)}, r"input_ids must be int64 \[B, T\], got torch.float32"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1]])}, "row 0 has a hole"),
        ({"attention_mask": torch.ones(1, 7)}, "attention_mask must have the shape of input_ids"),
        ({"stop_strings": "x"}, "stop_strings needs tokenizer="),
        ({"stop_strings": "", "tokenizer": 1}, "one or more non-empty strings, got ''"),
    ],
)
def test_bad_arguments_are_named(options, message):
    arguments = {"input_ids": prompt(1, 8), "max_new_tokens": 4, **options}
    with pytest.raises(UserError, match=message):
        generate(tiny_calm(), **arguments)


def test_padding_needs_a_pad_token():
    with pytest.raises(UserError, match=r'"pad", .* needs config\.pad_token_id'):
        generate(tiny_calm(), prompt(1, 9), max_new_tokens=4, prompt_alignment="pad")


def test_a_prompt_that_no_draw_continues():
    """Its chunk is filled with pad tokens, which the model reads but the text does not hold."""
    model, ids = tiny_calm(pad_token_id=0), prompt(1, 8)
    options = {"max_new_tokens": 5, "noise_scale": 0.0}
    deterministic = generate(model, ids.tolist(), **options)
    never = (deterministic[:, 8:9] + 1) % 5
    given = torch.cat([ids, never], 1).tolist()
    details = generate(model, given, num_samples=20, max_draws=40, return_details=True, **options)
    assert details.fallbacks.tolist() == [[True, False, False]] and details.draws[0, 0] == 40
    assert details.new_tokens.tolist() == [5] and details.sequences.shape == (1, 14)
    padded = [[*given[0], 0, 0, 0]]
    assert torch.equal(details.sequences[:, 9:], generate(model, padded, **options)[:, 12:])


@pytest.mark.parametrize(
    "name",
    [
        "mlp_generator.hidden_embd.weight",
        "transformer.layers.1.self_attn.q_proj.weight",  # attention on a CPU hides it
        "ae_model.decoder.norm.weight",  # logits that are all NaN have an argmax
    ],
)
def test_damaged_weights_are_named(name):
    model = tiny_calm()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = float("nan")
    with pytest.raises(UserError, match=f"weight {name} of the model is not finite"):
        generate(model, prompt(1, 8), max_new_tokens=4)


@pytest.mark.parametrize("method", ["batch", "exact", "medoid", "noise_scale"])
def test_latents_that_overflow_are_reported(method):
    model = tiny_calm()
    with torch.no_grad():
        model.mlp_generator.hidden_embd.weight.fill_(3e38)
    with pytest.raises(UserError, match="latents or logits that are not finite"):
        generate(model, prompt(1, 8), max_new_tokens=4, method=method)


@pytest.mark.parametrize(
    ("has_start_patch", "length", "new_tokens", "refused"),
    [
        (False, 13, 3, (14, 3)),
        (False, 15, 1, (16, 1)),
        (False, 2, 12, (2, 13)),  # shorter than a chunk: padded to one
        (True, 11, 1, (12, 1)),
        (True, 1, 11, (1, 12)),
        (True, 0, 12, (0, 13)),
    ],
)
@pytest.mark.filterwarnings("ignore:a prompt of")
def test_the_whole_context_can_be_used(has_start_patch, length, new_tokens, refused):
    """An unfinished chunk of the prompt and the first new tokens share a position."""
    model = tiny_calm(
        max_position_embeddings=4, has_start_patch=has_start_patch, bos_token_id=4, pad_token_id=0
    )
    result = generate(model, [[1] * length], max_new_tokens=new_tokens, temperature=1.0, seed=0)
    assert result.shape == (1, length + new_tokens)
    with pytest.raises(UserError, match="exceed the context of"):
        generate(model, [[1] * refused[0]], max_new_tokens=refused[1])


def test_drawn_pad_tokens_are_text_even_where_the_choice_is_flagged():
    """A vote among fewer candidates than asked for is flagged, too, but has drawn its chunk."""
    model = tiny_calm(pad_token_id=0)
    ids = likely_prompt(model, 1, 11).tolist()
    options = {"max_new_tokens": 5, "num_samples": 50, "max_draws": 50, "return_details": True}
    details = generate(model, ids, seed=0, **options)
    assert details.fallbacks[0, 0] and details.levels[0, 0] > 0, "choose another seed"
    model.config.pad_token_id = details.sequences[0, 11].item()
    again = generate(model, ids, seed=0, **options)
    assert torch.equal(again.sequences, details.sequences)
