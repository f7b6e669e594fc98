"""The field `calm.candidates`: what the candidates of each chunk's vote were, if a client asks."""

import json

import pytest
from serving_cases import client_of, error_of, running, served
from tiny_models import calm_with_readout

from calm.decoding.chunk import ChunkRecord
from calm.decoding.text.edges import text_after
from calm.serving.models import Settings
from calm.serving.replies import Reply
from calm.serving.texts import Piece

PROMPT = "Returns the "
GOOD = {"model": "calm", "prompt": PROMPT, "max_tokens": 14, "seed": 1, "temperature": 0.5}
CHUNK_FIELDS = ["tokens", "draws", "draws_saved", "level", "is_fallback"]


@pytest.fixture(scope="module")
def http():
    readout = calm_with_readout(
        vocab_size=259, eos_token_id=257, pad_token_id=258, max_position_embeddings=32
    )
    with running([served(), served("readout", readout)]) as url, client_of(url) as client:
        yield client


def ask(http, candidates=None, **change):
    """The reply to a request, without what differs from one to the next."""
    body = {**GOOD, **change}
    if candidates is not None:
        body["calm"] = {**body.get("calm", {}), "candidates": candidates}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        return [response.json()]
    lines = response.text.split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def chunks_of(events):
    return [event["choices"][0] for event in events]


def check_sums(event):
    """A vote's numbers add up to its draws; the most frequent chunks come first."""
    vote, draws = event["calm"]["vote"], event["calm"]["draws"]
    counts = [candidate["count"] for candidate in vote["candidates"]]
    assert sum(counts) + vote["others"] + vote["rejected"] == draws
    assert len(counts) <= 4 and counts[:3] == sorted(counts[:3], reverse=True)
    (chosen,) = (c for c in vote["candidates"] if c["is_chosen"])
    assert chosen["count"] >= event["calm"]["level"]
    return chosen["ids"], vote["rejected"]


def test_the_numbers_of_a_vote_add_up_to_its_draws(http):
    """Also where the prompt ends within a chunk, which rejects draws."""
    events = chunks_of(ask(http, 3, stream=True))
    found = [check_sums(event) for event in events]
    assert len(events) == 4 and not any(rejected for _, rejected in found)
    prompt = [*PROMPT.encode(), found[0][0][0]]
    events = chunks_of(ask(http, 3, prompt=prompt, stream=True))
    (ids, rejected), *others = map(check_sums, events)
    assert len(ids) == 3 and rejected > 0
    assert not any(rejected for _, rejected in others)


def test_a_prompt_that_no_draw_continues_has_no_candidates(http):
    """At temperature 0.5 the untrained model draws no letter v within its cap."""
    first = chunks_of(ask(http, 3, prompt=PROMPT + "v", stream=True))[0]
    assert first["calm"]["is_fallback"] and first["calm"]["tokens"] == 0
    rejected = first["calm"]["draws"]
    assert first["calm"]["vote"] == {"candidates": [], "others": 0, "rejected": rejected}


def test_candidates_are_text(http):
    """All of them where enough are asked for; those chosen are the text that was written."""
    events = chunks_of(ask(http, 100, stream=True))
    ids, tokenizer = list(PROMPT.encode()), served().tokenizer
    for event in events:
        vote = event["calm"]["vote"]
        assert vote["others"] == vote["rejected"] == 0
        for candidate in vote["candidates"]:
            text = text_after(tokenizer, ids, candidate["ids"], skip_special_tokens=False)
            assert candidate["text"] == text and len(candidate["ids"]) == 4
        (chosen,) = (c for c in vote["candidates"] if c["is_chosen"])
        ids += chosen["ids"]
    written = text_after(tokenizer, list(PROMPT.encode()), ids[len(PROMPT) :][:14])
    assert "".join(event["text"] for event in events) == written


@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_asks_for_changes_nothing(http, stream):
    """The same bytes but for identifier and time, and the same text with votes."""
    plain, with_votes = (ask(http, candidates, stream=stream) for candidates in (None, 5))
    for reply, other in zip(plain, with_votes, strict=True):
        expected = [*reply["choices"][0]["calm"]]
        assert "vote" not in expected and "votes" not in expected
        votes = other["choices"][0]["calm"].pop("vote" if stream else "votes")
        assert votes if stream else len(votes) == 4
        if stream:
            assert expected == CHUNK_FIELDS
        other.update(id=reply["id"], created=reply["created"])
        assert json.dumps(reply) == json.dumps(other)


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({"temperature": 1}, 4),
        ({"calm": {"method": "noise_scale"}}, 4),
        ({"model": "readout", "calm": {"method": "readout"}}, 4),
    ],
)
def test_a_chunk_without_a_vote_says_null(http, change, count):
    (reply,) = ask(http, 5, **change)
    assert reply["choices"][0]["calm"]["votes"] == [None] * count


def test_texts_of_one_step_have_their_own_votes(http):
    """Two texts in slots at once tell what each would tell alone."""
    both = ask(http, 2, n=2, stream=True)
    first = [choice["calm"] for choice in chunks_of(both) if choice["index"] == 0]
    alone = [choice["calm"] for choice in chunks_of(ask(http, 2, stream=True))]
    assert first == alone
    second = [choice["calm"] for choice in chunks_of(both) if choice["index"] == 1]
    assert second != first


@pytest.mark.parametrize("many", [{"n": 6}, {"prompt": [PROMPT] * 6}])
def test_all_candidates_of_a_request_are_bounded(http, many):
    response = http.post("/v1/completions", json={**GOOD, **many, "calm": {"candidates": 100}})
    error = error_of(response, 400)
    assert error["param"] == "calm"
    assert error["message"] == (
        "calm.candidates must be at most 500 over all texts, got 100 for each of 6"
    )


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_stream_keeps_no_votes(is_stream):
    """They were sent; a long text would hold them to its end."""
    settings = Settings(method="batch", temperature=0.5, num_samples=9, noise_scale=1.0,
                        max_draws=None, seed=1)  # fmt: skip
    reply = Reply(served(), settings, num_texts=1, prompt_tokens=1, is_chat=False, has_votes=True,
                  is_stream=is_stream)  # fmt: skip
    vote = {"candidates": [], "others": 9, "rejected": 0}
    piece = Piece("a", 1, ChunkRecord([1], 1, 9, False, True, 0), "stop", vote)
    assert reply.add(0, piece)["choices"][0]["calm"]["vote"] == vote
    kept = reply.whole()["choices"][0]["calm"]["votes"]
    assert kept == [None if is_stream else vote]


@pytest.mark.parametrize("candidates", [0, 101, True])
def test_counts_that_cannot_be_shown(http, candidates):
    response = http.post("/v1/completions", json={**GOOD, "calm": {"candidates": candidates}})
    assert "calm.candidates: Input should be" in error_of(response, 400)["message"]
