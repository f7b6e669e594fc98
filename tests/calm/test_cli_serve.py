"""`calm serve` as a program: its flags, the page about it, and its end."""

import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import pytest
from cli_cases import error_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"


@pytest.fixture(scope="module")
def program(folders):
    """The program that serves a CALM and a baseline, and its address."""
    words = ["serve", "--model", folders / "calm", "--model", f"base={folders / 'baseline'}"]
    command = [sys.executable, "-m", "calm.cli", *map(str, words), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        line = process.stderr.readline()
        match = re.fullmatch(r"serving calm, base at (http://127\.0\.0\.1:\d+)/v1, .*\n", line)
        assert match, line
        yield process, match[1]
        process.kill()


def blocks(language):
    """The examples of the page."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_examples_of_the_page(program, capsys):
    url = program[1]
    (curl,) = (block for block in blocks("sh") if block.startswith("curl"))
    command = shlex.split(curl.replace("\\\n", ""))
    assert command[:2] == ["curl", "http://127.0.0.1:8000/v1/completions"]
    options = dict(zip(command[2::2], command[3::2], strict=True))
    header = dict([options["-H"].split(": ")])
    reply = httpx.post(
        f"{url}/v1/completions", content=options["-d"], headers=header, timeout=60
    ).json()
    assert reply["usage"]["prompt_tokens"] == len("Returns the ")
    (script,) = blocks("python")
    exec(script.replace("http://127.0.0.1:8000", url), {})
    assert len(capsys.readouterr().out) > 10


def test_it_ends_after_a_signal(program):
    """Last of this file: a text that is being written is finished, and the status is 0."""
    process, url = program
    body = {"model": "base", "prompt": "ab", "max_tokens": 60, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGINT)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


def test_mistakes_on_the_command_line(folders, tmp_path, capsys):
    model, key = ("--model", folders / "calm"), tmp_path / "key"
    assert "no folder" in error_of(capsys, "serve", "--model", tmp_path / "x", "--port", 0)
    twice = error_of(capsys, "serve", *model, "--model", f"calm={folders / 'baseline'}")
    assert "are both calm; use NAME=DIR" in twice
    assert "--model takes DIR or NAME=DIR" in error_of(capsys, "serve", "--model", "=x")
    assert str(key) in error_of(capsys, "serve", *model, "--api-key-file", key)
    key.write_text("\n")
    assert "must be a key" in error_of(capsys, "serve", *model, "--api-key-file", key)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = error_of(capsys, "serve", *model, "--port", port)
        assert f"--port {port}: cannot be used on 127.0.0.1" in error
    words = ("--port", 0, "--method", "readout")
    assert "train it with token_loss_weight" in error_of(capsys, "serve", *model, *words)
