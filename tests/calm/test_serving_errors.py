"""What `calm serve` cannot serve: every error in its protocol, and nothing else disturbed."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse

import httpx2 as httpx
import pytest
from serving_cases import client_of, error_of, running, served, until

from calm.errors import UserError
from calm.serving.app import Access
from calm.serving.errors import APIError
from calm.serving.models import Limits
from calm.serving.schema import CompletionRequest
from calm.serving.server import bind, is_loopback

GOOD = {"model": "calm", "prompt": "Returns the ", "max_tokens": 8, "seed": 1}
KEY = "secret"


@pytest.fixture(scope="module")
def lane_and_http():
    model = served()
    access = Access(max_body=5000, body_seconds=0.5, read_seconds=1.0)
    with running([model], access) as url, client_of(url) as client:
        yield model.lane, client


@pytest.fixture
def lane(lane_and_http):
    return lane_and_http[0]


@pytest.fixture
def http(lane_and_http):
    """After each test the same request has the same answer, and no slot is taken."""
    lane, client = lane_and_http
    before = client.post("/v1/completions", json=GOOD).json()["choices"]
    yield client
    assert client.post("/v1/completions", json=GOOD).json()["choices"] == before
    until(lambda: lane.num_texts == 0)


REFUSED = [
    ({"prompt": None}, "prompt", "valid string"),
    ({"prompt": []}, "prompt", "prompt: Input should be a valid string; got []"),
    ({"prompt": ""}, "prompt", "the prompt is empty"),
    ({"prompt": [1, 2, 3, 259]}, "prompt", "must lie in [0, 259)"),
    ({"prompt": "x" * 130}, "prompt", "the context of calm is 128 tokens; the prompt has 130"),
    ({"max_tokens": 117}, "prompt", "the prompt has 12, and max_tokens asks for 117 more"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1; got 0"),
    ({"max_tokens": "8"}, "max_tokens", "valid integer; got '8'"),
    ({"max_tokens": True}, "max_tokens", "valid integer; got True"),
    ({"temperature": 1.2}, "temperature", "must lie in [0, 1] for a CALM, got 1.2"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": 5e-324}, "calm", "temperature must be so large that 1/T is finite"),
    ({"n": 129}, "n", "less than or equal to 128"),
    ({"n": 11}, "n", "the request asks for 11 texts; this server takes at most 10"),
    ({"seed": 2**63}, "seed", "less than"),
    ({"stop": ""}, "stop", "at least 1 character"),
    ({"stop": ["x"] * 17}, "stop", "valid string"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"top_p": 0.9}, "top_p", "top_p must be 1: a CALM draws latents and knows no probabilities"),
    ({"top_k": 40}, "top_k", "top_k must be 0 or -1: a CALM draws latents"),
    ({"logprobs": 5}, "logprobs", "knows no probabilities of tokens"),
    ({"presence_penalty": 0.5}, "presence_penalty", "do not depend on how often"),
    ({"echo": True}, "echo", "the prompt is not repeated"),
    ({"max_token": 8}, "max_token", "unknown argument max_token"),
    ({"calm": {"num_samples": 33}}, "calm", "must be at most 32, got 33"),
    ({"calm": {"max_draws": 801}}, "calm", "must be at most 800, got 801"),
    ({"calm": {"method": "beam"}}, "calm", "calm.method: Input should be 'batch', 'exact'"),
    ({"calm": {"method": "readout"}}, "calm", "train it with token_loss_weight=1"),
    ({"calm": {"method": "direct"}, "temperature": 0.5}, "calm", "temperature must be 1, got 0.5"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_arguments_that_cannot_be_served(http, change, param, message):
    error = error_of(http.post("/v1/completions", json={**GOOD, **change}), 400)
    assert error["param"] == param and message in error["message"], error
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 300


def test_too_many_texts_are_refused_before_they_are_made():
    request = CompletionRequest(model="calm", prompt=[[1, 2, 3, 4]] * 6, n=2)
    with pytest.raises(APIError, match="asks for 12 texts; this server takes at most 10"):
        served().completion_prompts(request)


def test_neutral_values_are_accepted(http):
    neutral = {
        "top_p": 1.0, "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {},
        "logprobs": None, "echo": False, "best_of": 1, "user": "me", "suffix": None, "stop": None,
        "stream": False, "stream_options": None,
    }  # fmt: skip
    plain, same = (http.post("/v1/completions", json={**GOOD, **more}) for more in ({}, neutral))
    assert same.status_code == 200 and same.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the body is no JSON"),
        (b'{"model": "\xff"}', "error parsing the body"),
        (b"[1, 2]", "the body must be a JSON object"),
        (b'{"model": "calm"}', "prompt is missing"),
        (b'{"model": "calm", "prompt": "\\ud800"}', "prompt"),
        (b'{"model": "calm", "prompt": "abcd", "temperature": NaN}', "finite number"),
    ],
)
def test_bodies_that_are_no_request(http, content, message):
    headers = {"content-type": "application/json"}
    response = http.post("/v1/completions", content=content, headers=headers)
    assert message in error_of(response, 400)["message"]


def test_unknown_models_paths_and_methods(http):
    error = error_of(http.post("/v1/completions", json={**GOOD, "model": "gpt"}), 404)
    assert error["code"] == "model_not_found" and "there is calm" in error["message"]
    assert error_of(http.get("/v1/models/gpt"), 404)["param"] == "model"
    assert error_of(http.get("/v1/nothing"), 404)["type"] == "not_found_error"
    assert error_of(http.get("/v1/completions"), 405)["message"] == "Method Not Allowed"


def test_large_bodies_are_refused(http):
    """With their length announced or not."""
    error = error_of(http.post("/v1/completions", json={**GOOD, "user": "x" * 5000}), 413)
    assert error["message"] == "the body is larger than 5000 bytes"
    parts = (b"x" * 1000 for _ in range(6))
    assert error_of(http.post("/v1/completions", content=parts), 413)["message"] == error["message"]


def connect(http):
    """A plain connection to the server."""
    url = http.base_url
    return socket.create_connection((url.host, url.port), timeout=20)


def head(length):
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def test_a_body_that_never_ends_is_given_up(http):
    with connect(http) as sock:
        sock.sendall(head(100) + b"{")
        assert sock.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_head_that_never_ends_is_given_up(monkeypatch):
    """Of the first request of a connection, or of a later one; a text may take longer."""
    with running([model := served()], idle_seconds=1) as url, client_of(url) as http:
        step = model.lane.slots.step
        monkeypatch.setattr(model.lane.slots, "step", lambda: time.sleep(1.2) or step())
        body = json.dumps(GOOD).encode()
        with connect(http) as silent, connect(http) as begun, connect(http) as later:
            begun.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            later.sendall(head(len(body)) + body)
            reply = HTTPResponse(later)
            reply.begin()
            assert reply.status == 200 and reply.read()
            later.sendall(b"GET /health HTTP/1.1\r\n")
            for sock in (silent, begun, later):
                assert sock.recv(4000) == b""


class Paused:
    """Holds the worker between two steps."""

    def __init__(self, lane, monkeypatch):
        self.go, step = threading.Event(), lane.slots.step

        def wait():
            assert self.go.wait(20)
            return step()

        monkeypatch.setattr(lane.slots, "step", wait)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(http, lane, monkeypatch, stream):
    paused = Paused(lane, monkeypatch)
    body = json.dumps({**GOOD, "n": 6, "max_tokens": 100, "stream": stream}).encode()
    with connect(http) as sock:
        sock.sendall(head(len(body)) + body)
        until(lambda: len(lane.active) == 4 and len(lane.waiting) == 2)
        texts = [*lane.active.values(), *lane.waiting]
    until(lambda: all(text.is_cancelled for text in texts))
    paused.go.set()
    until(lambda: lane.num_texts == 0)


def test_a_full_queue_is_429(http, lane, monkeypatch):
    paused, replies = Paused(lane, monkeypatch), []

    def ask():
        replies.append(http.post("/v1/completions", json={**GOOD, "n": 10}))

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: len(lane.active) == 4 and len(lane.waiting) == 6)
    response = http.post("/v1/completions", json=GOOD)
    error = error_of(response, 429)
    assert error["type"] == "rate_limit_error" and response.headers["retry-after"] == "1"
    assert http.get("/health").json()["texts"]["calm"] == {"active": 4, "waiting": 6}
    paused.go.set()
    thread.join()
    assert len(replies[0].json()["choices"]) == 10


def test_a_step_that_fails_ends_its_texts_alone(http, lane, monkeypatch, caplog):
    def fail():
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(lane.slots, "step", fail)
        error = error_of(http.post("/v1/completions", json=GOOD), 500)
        streamed = http.post("/v1/completions", json={**GOOD, "stream": True}).text
    assert error["type"] == "server_error" and "decode step failed" in error["message"]
    first, last, end = streamed.split("\n\n")
    assert '"choices"' in first and '"server_error"' in last and end == ""
    assert "out of luck" in caplog.text


def test_weights_that_are_not_finite_end_one_text(http, lane, monkeypatch):
    begin = lane.slots.begin

    def damaged(*arguments):
        return begin(*arguments)._replace(is_finite=False)

    with monkeypatch.context() as patch:
        patch.setattr(lane.slots, "begin", damaged)
        error = error_of(http.post("/v1/completions", json=GOOD), 500)
    assert "not finite" in error["message"]


def test_the_key_is_asked_for():
    with running([served()], Access(api_key=KEY)) as url, client_of(url) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
            response = client.post("/v1/completions", content=b"{", headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
        assert client.get("/health").status_code == 200
        right = {"authorization": f"Bearer {KEY}"}
        assert client.get("/v1/models", headers=right).status_code == 200


def test_texts_are_finished_before_the_server_ends():
    model, body = served(limits=Limits(num_slots=2)), {**GOOD, "max_tokens": 64, "n": 4}
    with ThreadPoolExecutor(1) as pool:
        with running([model]) as url:
            reply = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
            until(lambda: model.lane.num_texts == 4)
        assert len(reply.result().json()["choices"]) == 4
    assert not model.lane.num_texts


def test_ports_in_use_and_addresses_that_are_not_there():
    with bind("127.0.0.1", 0) as sock:
        assert is_loopback(sock)
        port = sock.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: cannot be used on 127.0.0.1 \("):
            bind("127.0.0.1", port)
    with pytest.raises(UserError, match=r"no such address|cannot be used"):
        bind("host.invalid", 0)
    with bind("0.0.0.0", 0) as sock:
        assert not is_loopback(sock)
