"""`calm generate`: where prompts come from, what is printed, and what stops it."""

import io
import sys

import pytest
from cli_cases import calm, error_of, objects


@pytest.mark.parametrize("kind", ["calm", "baseline"])
def test_generate_prints_the_prompt_and_its_continuation(kind, folders, capsys):
    words = ("--model", folders / kind, "--prompt", "the quick br", "--temperature", 1)
    assert calm("generate", *words, "--max-new-tokens", 24) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("the quick br") and len(captured.out) > len("the quick br\n")
    assert "tokens in" in captured.err
    assert calm("generate", *words, "--max-new-tokens", 24) == 0
    assert capsys.readouterr().out == captured.out
    assert calm("generate", *words, "--max-new-tokens", 24, "--seed", 1) == 0
    assert capsys.readouterr().out != captured.out


def test_a_readout_draws_at_any_temperature(folders, capsys):
    words = ("--prompt", "the quick br", "--json", "--max-new-tokens", 8)
    words = (*words, "--method", "readout", "--temperature", "3/2")
    assert calm("generate", "--model", folders / "readout", *words) == 0
    (record,) = objects(capsys)
    assert record["new_tokens"] == 8 and record["chunks"] == record["draws"] == 2
    error = error_of(capsys, "generate", "--model", folders / "calm", *words)
    assert "train it with token_loss_weight=1, token_readout=causal" in error


def test_temperatures_may_be_fractions(folders, capsys):
    words = ("--model", folders / "calm", "--prompt", "the quick br", "--json")
    words = (*words, "--max-new-tokens", 4, "--num-samples", 8)
    assert calm("generate", *words, "--temperature", "1/4") == 0
    (record,) = objects(capsys)
    assert record["temperature"] == 0.25
    for text in ("1/0", "half"):
        error = error_of(capsys, "generate", *words, "--temperature", text)
        assert f"expected a number or a fraction, got '{text}'" in error
    error = error_of(capsys, "generate", *words, "--device", "meta")
    assert "--device must be cpu, cuda or cuda:<index>, got 'meta'" in error


@pytest.mark.filterwarnings("default")
def test_a_short_prompt_is_noted_in_a_line(folders, capsys):
    words = ("--model", folders / "calm", "--prompt", "ab", "--max-new-tokens", 4)
    assert calm("generate", *words, "--num-samples", 8) == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line.lower()]
    assert note.startswith("warning: a prompt of 2 tokens is shorter than a chunk of 4")


def test_generate_reads_a_prompt_file(folders, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("grüße aus\n\n", encoding="utf-8")
    words = ("--model", folders / "calm", "--prompt-file", tmp_path / "prompt.txt", "--json")
    words = (*words, "--max-new-tokens", 8, "--prompt-alignment", "pad")
    assert calm("generate", *words) == 0
    (record,) = objects(capsys)
    assert record["prompt"] == "grüße aus\n"  # a file's last newline is no part of it
    assert calm("generate", *(word for word in words if word != "--json")) == 0
    assert record["text"] and capsys.readouterr().out == f"grüße aus\n{record['text']}\n"


@pytest.mark.parametrize("kind", ["calm", "baseline"])
def test_several_prompts_give_an_object_each(kind, folders, capsys):
    words = ("--model", folders / kind, "--json", "--max-new-tokens", 7, "--num-samples", 20)
    assert calm("generate", *words, "--prompt", "abcd", "--prompt", "ab cd ef", "--seed", 4) == 0
    both = objects(capsys)
    assert [record["prompt"] for record in both] == ["abcd", "ab cd ef"]
    for record in both:
        assert record["new_tokens"] == 7 and record["method"] == "batch"
        assert record["tokens_per_second"] > 0 and record["warmup_seconds"] >= 0
    assert calm("generate", *words, "--prompt", "ab cd ef", "--seed", 5) == 0
    (alone,) = objects(capsys)
    assert alone["text"] == both[1]["text"] and alone["seed"] == 5


@pytest.mark.parametrize(
    ("words", "draws"),
    [
        (("--method", "direct"), 3),
        (("--method", "noise_scale"), 3),
        (("--method", "medoid", "--num-samples", 8), 24),
        (("--method", "batch", "--num-samples", 8), 24),
        (("--method", "exact", "--num-samples", 8, "--max-draws", 16), None),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_methods_and_their_draws(words, draws, folders, capsys):
    base = ("--model", folders / "calm", "--prompt", "the quick br", "--json")
    assert calm("generate", *base, "--max-new-tokens", 12, *words) == 0
    (record,) = objects(capsys)
    assert record["method"] == words[1] and record["chunks"] == 3
    assert record["temperature"] == (1.0 if words[1] == "direct" else 0.5)
    if draws is not None:
        assert record["draws"] == draws and record["fallbacks"] == 0
    else:  # 259 ids a place: no two of 16 draws agree, and the cap decides
        assert record["fallbacks"] == 3 and record["draws"] <= 3 * 17


def test_a_padded_prompt_and_too_few_draws_are_told_apart(folders, capsys):
    base = ("--model", folders / "calm", "--max-new-tokens", 12, "--num-samples", 8)
    base = (*base, "--max-draws", 16)  # 259 ids a place: no draw begins with the letter given
    assert calm("generate", *base, "--prompt", "the quick bro") == 0
    summary = capsys.readouterr().err
    assert "no draw continued the end of the prompt: it was padded" in summary
    assert "fewer draws" not in summary
    assert calm("generate", *base, "--prompt", "the quick br", "--method", "exact") == 0
    summary = capsys.readouterr().err
    assert "3 of 3 chunks decided by fewer draws than the method needs" in summary
    assert "padded" not in summary


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("words", [(), ("--prompt-file", "-")], ids=["piped", "named"])
def test_generate_reads_standard_input(words, mark, folders, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{mark}the quick br\n"))
    assert calm("generate", "--model", folders / "calm", "--max-new-tokens", 4, *words) == 0
    assert capsys.readouterr().out.startswith("the quick br")


class Terminal(io.StringIO):
    """Someone who types."""

    def isatty(self):
        return True

    def readline(self, *args):
        line = super().readline(*args)
        if line == "strict\n":  # a terminal whose bytes are not kept as surrogates
            b"\xfc".decode("utf-8")
        return line


def test_prompts_are_typed_in_until_the_end(folders, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal(f"the quick br\n{'x' * 400}\nand the\n"))
    assert calm("generate", "--model", folders / "calm", "--max-new-tokens", 4) == 0
    captured = capsys.readouterr()
    assert "> the quick br" in captured.out and "> and the" in captured.out
    assert captured.err.count("4 tokens in") == 2
    assert captured.err.count("error: ") == 1 and "context of 256 tokens" in captured.err


def test_bytes_that_are_no_text(folders, tmp_path, capsys, monkeypatch):
    base = ("generate", "--model", folders / "calm", "--max-new-tokens", 4)
    (tmp_path / "latin.txt").write_bytes("grüße".encode("latin-1"))
    message = error_of(capsys, *base, "--prompt-file", tmp_path / "latin.txt")
    assert "--prompt-file" in message and "is no UTF-8 text" in message
    message = error_of(capsys, *base, "--prompt-file", tmp_path / "missing.txt")
    assert f"--prompt-file: no file {tmp_path / 'missing.txt'}" in message
    assert "--prompt is no UTF-8 text" in error_of(capsys, *base, "--prompt", "the \udcfc quick")
    bad = io.TextIOWrapper(io.BytesIO(b"gr\xfc\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", bad)
    assert "standard input is no UTF-8 text" in error_of(capsys, *base)
    typed = Terminal("strict\nthe \udcfc quick\nthe quick br\n")
    monkeypatch.setattr(sys, "stdin", typed)
    assert calm(*base) == 0
    captured = capsys.readouterr()
    assert captured.err.count("error: the prompt is no UTF-8 text") == 2
    assert captured.err.count("4 tokens in") == 1


def test_a_terminal_of_another_alphabet_shows_question_marks(folders, monkeypatch):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="latin-1"))
    words = ("--model", folders / "calm", "--prompt", "漢 the grüße", "--max-new-tokens", 4)
    assert calm("generate", *words) == 0
    sys.stdout.flush()
    assert screen.getvalue().startswith("? the grüße".encode("latin-1"))


def test_a_stop_string_ends_the_text(folders, capsys):
    words = ("--model", folders / "calm", "--prompt", "the quick br", "--json")
    assert calm("generate", *words, "--max-new-tokens", 40, "--temperature", 1) == 0
    (free,) = objects(capsys)
    stop = free["text"][10]
    assert calm("generate", *words, "--max-new-tokens", 40, "--temperature", 1, "--stop", stop) == 0
    (stopped,) = objects(capsys)
    assert stopped["text"] == free["text"][: free["text"].index(stop) + 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--temperature", 2),
            "--temperature must lie in (0, 1], got 2.0; method 'readout' takes any from 0 on",
        ),
        (("--num-samples", 0), "--num-samples must be at least 1"),
        (
            ("--method", "direct", "--temperature", 0.5),
            "error: --method 'direct' draws from the model as it is: temperature must be 1",
        ),
        (("--method", "greedy"), "invalid choice: 'greedy'"),
        (("--max-draws", 1), "--max-draws must be at least 200"),
    ],
    ids=["temperature", "num-samples", "direct", "method", "max-draws"],
)
def test_mistakes_in_sampling(words, message, folders, capsys):
    base = ("--model", folders / "calm", "--prompt", "the quick br")
    assert message in error_of(capsys, "generate", *base, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "x" * 400), "context of 256 tokens"),
        (("--prompt-file", "no/such.txt"), "no/such.txt"),
    ],
    ids=["empty", "long", "missing"],
)
def test_mistakes_in_prompts(words, message, folders, capsys):
    assert message in error_of(capsys, "generate", "--model", folders / "calm", *words)


@pytest.mark.parametrize("kind", ["calm", "baseline"])
def test_ctrl_c_keeps_the_text_so_far(kind, folders, capsys, monkeypatch):
    from calm.decoding.text.transcript import Transcript

    append, calls = Transcript.append, []

    def interrupted(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return append(self, *args, **kwargs)

    words = ("--model", folders / kind, "--prompt", "the quick br", "--temperature", 1)
    assert calm("generate", *words, "--max-new-tokens", 24) == 0
    whole = capsys.readouterr().out
    monkeypatch.setattr(Transcript, "append", interrupted)
    assert calm("generate", *words, "--max-new-tokens", 24) == 130
    captured = capsys.readouterr()
    assert "interrupted" in captured.err and len(calls) == 3
    text = captured.out.removesuffix("\n")
    assert len("the quick br") < len(text) < len(whole) and whole.startswith(text[:-1])
    calls.clear()
    assert calm("generate", *words, "--max-new-tokens", 24, "--json") == 130
    (record,) = objects(capsys)
    assert record["interrupted"] and 0 < record["new_tokens"] < 24
    assert text == "the quick br" + record["text"]
