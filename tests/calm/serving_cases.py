"""A server of tiny untrained models on loopback, and what tests ask it."""

import threading
import time
from contextlib import contextmanager

import httpx2 as httpx
import torch
from tiny_models import calm_with_readout, tiny_baseline, tiny_calm

from calm.data.tokenizer import byte_tokenizer
from calm.serving.app import make_app
from calm.serving.models import Limits, ServedModel
from calm.serving.server import bind, make_server

FIELDS = {"vocab_size": 259, "eos_token_id": 257, "pad_token_id": 258}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
SMALL = Limits(num_slots=4, max_waiting=6, max_num_samples=32)


def served(name="calm", model=None, *, template=None, limits=SMALL, **options):
    """A tiny model of bytes, ready to be served."""
    if model is None:
        model = tiny_calm(**FIELDS, max_position_embeddings=32)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return ServedModel(name, model, tokenizer, limits, num_samples=16, **options)


def all_kinds():
    """A CALM, ones with a readout and a tempered head, the token baseline with a template."""
    tempered = tiny_calm(**FIELDS, max_position_embeddings=32)
    torch.nn.init.normal_(tempered.add_tempered_head((0.3, 0.8)).temperature_embd.weight, std=2.0)
    baseline = tiny_baseline(**FIELDS, max_position_embeddings=96)
    return [
        served(),
        served("readout", calm_with_readout(**FIELDS, max_position_embeddings=32)),
        served("tempered", tempered),
        served("baseline", baseline, template=TEMPLATE),
    ]


@contextmanager
def running(models, access=None, **options):
    """A server on a free port, in a thread; its base URL."""
    with bind("127.0.0.1", 0) as sock:
        server = make_server(make_app(models, access), shutdown_seconds=5, **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.005)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def until(condition, seconds=20.0):
    """Wait for what another thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def error_of(response, status):
    """The error in a reply, after its shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def client_of(url, **options):
    return httpx.Client(base_url=url, timeout=60, **options)
