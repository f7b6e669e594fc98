"""Commands run in this process, watched: exit status, lines, files, connections."""

import contextlib
import hashlib
import io
import logging
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import LlamaConfig

from calm import AutoencoderConfig, BaselineTransformer, CALMConfig, EnergyTransformer, cli
from calm.data.tokenizer import BYTE_VOCAB_SIZE, byte_tokenizer
from calm.models import Autoencoder
from calm_kernels.backend import Backend, set_backend

SECONDS = 60  # a case that takes longer hangs
BOS, EOS, PAD = 256, 257, 258
TEXT = "the quick brown fox jumps over the lazy dog and the small cat sleeps\n"
SIZES = "hidden_size=16,intermediate_size=24"


@dataclass
class Run:
    """What a command did.

    Attributes:
        status: its exit status, None if an exception left it.
        errors: what it wrote to standard error.
        connections: addresses that it tried to reach.
        changed: files that it made, changed or removed.
    """

    status: int | None
    errors: str
    connections: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Success, or exactly one line that begins with ``error:``; never a traceback."""
        if self.status is None or "Traceback" in self.errors:
            return False
        lines = [line for line in self.errors.splitlines() if line.startswith("error:")]
        return not lines if self.status == 0 else self.status in (1, 2) and len(lines) == 1

    @property
    def last_line(self) -> str:
        """The last line of standard error."""
        return (self.errors.strip().splitlines() or [""])[-1]


def listing(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, with a hash of its bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b"a folder"
        found[path.relative_to(folder).as_posix()] = hashlib.blake2b(content).hexdigest()
    return found


def run_command(
    words: Sequence[object], folder: Path, stdin: str = "", *, is_offline: bool = False
) -> Run:
    """`calm` with these words, in `folder`; `is_offline` tells libraries not to try the network."""
    before, errors = listing(folder), io.StringIO()
    with _surroundings(folder, stdin, errors), _blocked_sockets(is_offline) as connections:
        try:
            status: int | None = cli.main([str(word) for word in words])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException as error:
            status = None
            errors.write(f"\n{type(error).__name__}: {error}")
    after = listing(folder)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return Run(status, errors.getvalue(), connections, changed)


@contextlib.contextmanager
def _surroundings(folder: Path, stdin: str, errors: io.StringIO) -> Iterator[None]:
    """The folder, streams, time limit and environment of one command, restored afterwards."""
    here, environment, before = Path.cwd(), dict(os.environ), sys.stdin

    def stop(*_: object) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    os.chdir(folder)
    sys.stdin = io.StringIO(stdin)
    named = (logging.getLogger(name) for name in (None, "transformers", "huggingface_hub"))
    handlers = [handler for logger in named for handler in logger.handlers]
    streams = [
        (handler, handler.setStream(errors))
        for handler in handlers
        if isinstance(handler, logging.StreamHandler)
    ]
    try:
        with (
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        os.chdir(here)
        sys.stdin = before
        for handler, stream in streams:
            handler.setStream(stream)
        os.environ.clear()
        os.environ.update(environment)
        set_backend(Backend.AUTO)


@contextlib.contextmanager
def _blocked_sockets(is_offline: bool) -> Iterator[list[str]]:
    """No connection is made; the list has the addresses that were asked for."""
    tried: list[str] = []

    def refuse(*arguments: object, **_: object) -> None:
        tried.append(" ".join(map(str, arguments[-2:])))
        raise OSError("the network is blocked")

    patches = [
        (socket.socket, "connect", refuse),
        (socket.socket, "connect_ex", refuse),
        (socket, "getaddrinfo", refuse),
        (constants, "HF_HUB_OFFLINE", is_offline),
        (time, "sleep", lambda seconds: None),  # between attempts
    ]
    before = [getattr(owner, name) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield tried
    finally:
        for (owner, name, _), value in zip(patches, before, strict=True):
            setattr(owner, name, value)


def make_models(folder: Path) -> None:
    """The folders ``ae``, ``calm`` and ``baseline``, each with a byte tokenizer, and a text."""
    tokens = {"vocab_size": BYTE_VOCAB_SIZE, "bos_token_id": BOS, "eos_token_id": EOS}
    shared = {**tokens, "pad_token_id": PAD, "hidden_size": 16, "intermediate_size": 24}
    sizes = {**shared, "num_hidden_layers": 2, "num_attention_heads": 2}
    context = {"max_position_embeddings": 64}
    torch.manual_seed(0)
    ae_model = Autoencoder(AutoencoderConfig(**shared, latent_size=8, patch_size=4))
    head = {"noise_size": 4, "num_mlp_layers": 1, "num_samples": 2, "latent_size": 8}
    config = CALMConfig(**sizes, **head, **context, patch_size=4, head_init="scaled")
    models = {
        "ae": ae_model,
        "calm": EnergyTransformer.from_autoencoder(ae_model, config),
        "baseline": BaselineTransformer(LlamaConfig(**sizes, max_position_embeddings=256)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    lines = [f"{number} {TEXT}" for number in range(30)]  # equal ones would all be held out
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
