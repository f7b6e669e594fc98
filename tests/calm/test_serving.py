"""`calm serve` as OpenAI's client sees it: texts, streams, choices, models, errors."""

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving_cases import all_kinds, client_of, running

from calm.decoding.text.edges import text_after
from calm.serving.replies import event as event_of

PROMPT = "Returns the "  # three chunks of four bytes


@pytest.fixture(scope="module")
def models():
    return {served.name: served for served in all_kinds()}


@pytest.fixture(scope="module")
def url(models):
    with running(list(models.values())) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(url):
    with client_of(url) as client:
        yield client


def alone(served, prompt, count, *, seed, row=0, **sampling):
    """What `generate` gives: text and number of tokens of row `row`."""
    ids = served._encoder.prompt(prompt)
    found = served.model.generate(
        [ids] * (row + 1), max_new_tokens=count, seed=seed, return_details=True, **sampling
    )
    number = int(found.new_tokens[row])
    new = found.sequences[row, len(ids) : len(ids) + number].tolist()
    return text_after(served.tokenizer, ids, new), number


SAMPLING = [
    ("calm", {"temperature": 1}, {}),
    ("calm", {"temperature": 0.5}, {"method": "batch"}),
    ("calm", {"temperature": 0.5}, {"method": "exact", "num_samples": 8, "max_draws": 16}),
    ("tempered", {"temperature": 0.5}, {"method": "amortized"}),
    ("readout", {"temperature": 1.5}, {"method": "readout"}),
    ("baseline", {"temperature": 0.7}, {}),
]


@pytest.mark.parametrize(("name", "openai_fields", "calm_fields"), SAMPLING)
def test_a_text_is_that_of_generate(client, models, name, openai_fields, calm_fields):
    reply = client.completions.create(
        model=name, prompt=PROMPT, max_tokens=11, seed=7, **openai_fields,
        extra_body={"calm": calm_fields},
    )  # fmt: skip
    options = {"num_samples": 16, **openai_fields, **calm_fields}
    text, count = alone(models[name], PROMPT, 11, seed=7, **options)
    (choice,) = reply.choices
    assert choice.text == text and reply.object == "text_completion" and reply.model == name
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (12, count)
    assert usage.total_tokens == 12 + count
    assert choice.finish_reason == ("length" if count == 11 else "stop")
    assert reply.calm["seed"] == 7
    chunks = -(-count // models[name].patch_size)
    assert choice.calm["chunks"] == chunks and choice.calm["draws"] >= chunks


def test_a_stream_has_one_event_a_chunk_and_is_the_same_text(client, models):
    options = {"model": "calm", "prompt": PROMPT, "max_tokens": 18, "seed": 1, "temperature": 0.5}
    whole = client.completions.create(**options)
    events = list(
        client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert events[-1].choices == [] and events[-1].usage == whole.usage
    pieces = [event.choices[0] for event in events[:-1]]
    assert len(pieces) == whole.choices[0].calm["chunks"] == 5
    assert "".join(piece.text for piece in pieces) == whole.choices[0].text
    reasons = [piece.finish_reason for piece in pieces]
    assert reasons == [None] * 4 + [whole.choices[0].finish_reason]
    assert [piece.calm["tokens"] for piece in pieces] == [4, 4, 4, 4, 2]
    assert all(piece.calm["draws"] == 16 for piece in pieces)


def test_the_bytes_of_a_stream(http):
    body = {"model": "baseline", "prompt": "ab", "max_tokens": 2, "stream": True, "seed": 0}
    response = http.post("/v1/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, end = response.text.split("\n\n")
    assert end == "" and events[-1] == "data: [DONE]" and len(events) == 3
    for event in events[:-1]:
        assert json.loads(event.removeprefix("data: "))["choices"][0]["index"] == 0


def test_choices_are_the_rows_of_generate(client, models):
    reply = client.completions.create(
        model="baseline", prompt=[PROMPT, "ab"], n=2, max_tokens=6, seed=3, temperature=1
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    for row, prompt in enumerate([PROMPT, PROMPT, "ab", "ab"]):
        expected, _ = alone(models["baseline"], prompt, 6, seed=3, row=row, temperature=1.0)
        assert reply.choices[row].text == expected
    assert reply.usage.prompt_tokens == len(PROMPT) + len("ab")


def test_a_prompt_may_be_ids(client):
    options = {"model": "calm", "max_tokens": 8, "seed": 5}
    ids = list(PROMPT.encode())
    texts = [client.completions.create(prompt=p, **options).choices[0].text
             for p in (PROMPT, ids, [ids])]  # fmt: skip
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("name", ["calm", "readout", "baseline"])
def test_temperature_0_is_deterministic(client, models, name):
    extra = {"calm": {"method": "readout"}} if name == "readout" else {}
    options = {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    texts = {client.completions.create(**options, seed=seed, extra_body=extra).choices[0].text
             for seed in (1, 2)}  # fmt: skip
    assert len(texts) == 1
    if name == "calm":
        expected = alone(
            models[name], PROMPT, 8, seed=0, method="direct", temperature=1.0, noise_scale=0.0
        )
    else:
        expected = alone(models[name], PROMPT, 8, seed=0, method="readout", temperature=0.0)
    assert texts == {expected[0]}


@pytest.mark.parametrize(
    ("name", "cold", "limit"), [("calm", 1e-20, 1e-3), ("calm", 1e-300, 1e-3),
                                ("baseline", 1e-40, 0), ("baseline", 1e-300, 0)],
)  # fmt: skip
def test_temperatures_near_0_are_served(client, name, cold, limit):
    """With so few draws 1e-3 is as cold as any other T."""
    options = {"model": name, "prompt": PROMPT, "max_tokens": 8, "seed": 1}
    texts = {client.completions.create(**options, temperature=t).choices[0].text
             for t in (cold, limit)}  # fmt: skip
    assert len(texts) == 1


def test_equal_draws_are_made_once(client, models):
    """At temperature 0, where the prompt ends within a chunk that the draw does not continue."""
    prompt, options = PROMPT[:-1], {"model": "calm", "max_tokens": 8, "temperature": 0}
    choice = client.completions.create(**options, prompt=prompt).choices[0]
    assert choice.calm["fallbacks"] == 1 and choice.calm["draws"] == choice.calm["chunks"] == 3
    text, _ = alone(
        models["calm"], prompt, 8, seed=0, method="direct", temperature=1.0, noise_scale=0.0
    )
    assert choice.text == text


def test_an_event_is_one_line_for_every_client():
    content = {"text": "a\u0085b\u2028c\nd"}
    line, *rest = event_of(content).splitlines()
    assert rest == [""] and json.loads(line.removeprefix("data: ")) == content


def test_stop_strings_are_not_shown(client, models):
    options = {"model": "baseline", "prompt": PROMPT, "max_tokens": 40, "seed": 2}
    free = client.completions.create(**options).choices[0].text
    stop = free[6:9]
    kept = free[: free.index(stop)]
    reply = client.completions.create(**options, stop=["never there", stop])
    assert reply.choices[0].text == kept and reply.choices[0].finish_reason == "stop"
    events = client.completions.create(**options, stop=stop, stream=True)
    assert "".join(event.choices[0].text for event in events) == kept


def test_a_chat(client, models):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    options = {"model": "baseline", "messages": messages, "max_completion_tokens": 9, "seed": 4}
    reply = client.chat.completions.create(**options, temperature=1)
    expected, _ = alone(models["baseline"], "user: Hi\nassistant:", 9, seed=4, temperature=1.0)
    message = reply.choices[0].message
    assert message.role == "assistant" and message.content == expected
    events = list(client.chat.completions.create(**options, temperature=1, stream=True))
    assert [event.choices[0].delta.role for event in events] == ["assistant"] + [None] * 8
    assert "".join(event.choices[0].delta.content for event in events) == expected
    assert events[-1].choices[0].finish_reason == "length"


def test_a_chat_without_limit_fills_the_context(client):
    messages = [{"role": "user", "content": "Hi"}]
    reply = client.chat.completions.create(model="baseline", messages=messages, seed=11)
    assert reply.choices[0].finish_reason == "stop" or reply.usage.total_tokens == 96


def test_a_tokenizer_without_chat_template_is_a_clear_400(client):
    with pytest.raises(openai.BadRequestError, match="has no chat template; use /v1/completions"):
        client.chat.completions.create(model="calm", messages=[{"role": "user", "content": "Hi"}])


def test_models_and_health(client, http, models):
    found = {model.id: model for model in client.models.list()}
    assert set(found) == set(models) and found["calm"].calm["patch_size"] == 4
    assert found["calm"].calm["context"] == 128
    assert client.models.retrieve("baseline").calm["kind"] == "BaselineTransformer"
    health = http.get("/health").json()
    assert health["status"] == "ok" and health["texts"]["calm"] == {"active": 0, "waiting": 0}


def test_requests_at_once_get_their_own_texts(client, models):
    """More than there are slots: some wait, and join while others are being written."""

    def ask(index):
        return client.completions.create(
            model="calm", prompt=PROMPT + "x" * index, max_tokens=6 + index, seed=index,
            temperature=1 / (1 + index % 2),
            extra_body={"calm": {"num_samples": 8, "max_draws": 8}},
        )  # fmt: skip

    expected = [ask(index).choices[0] for index in range(9)]
    with ThreadPoolExecutor(9) as pool:
        found = [reply.choices[0] for reply in pool.map(ask, range(9))]
    assert found == expected
