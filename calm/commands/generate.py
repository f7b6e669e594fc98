"""`calm generate`: continue prompts and print the text as it is drawn."""

import argparse
import json
import sys
from typing import Any

from calm.commands.flag_names import with_flag_names
from calm.commands.model_flags import (
    add_model_arguments,
    choose_model,
    load_model,
    load_tokenizer_of,
)
from calm.commands.prompt_flags import add_prompt_arguments, is_interactive, read_prompts
from calm.ranges import NOT_NEGATIVE, Range, at_least, number

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm generate --prompt "Returns the "           the model that comes with the package
  calm generate --model runs/demo/calm --prompt "Return the number of"
  calm generate --model runs/demo/calm --prompt-file start.txt --temperature 1 --seed 7
  calm generate --model runs/demo/calm --method exact --temperature 0.7 --prompt "Returns "
  calm generate --model runs/mine --method readout --temperature 1/2 --prompt "Returns "
  calm generate --model runs/demo/baseline --prompt "Return the number of" --temperature 0.7
  echo "This is" | calm generate --model runs/demo/calm --json
  calm generate --model runs/demo/calm                              prompts are typed in

Methods below temperature 1: batch is the paper's vote among --num-samples candidates. exact draws
until the distribution is exact, at most --max-draws for a chunk. medoid and noise_scale are
heuristics that cost the same at every temperature (docs/temperature.md). amortized takes one draw
of a head that `calm distill-temperature` has trained, in its range of temperatures. readout needs a
CALM that has kept its readout (docs/readout.md): it draws token by token from softmax(logits / T),
T > 0, at the same cost for every T, without the head.

--json prints for each prompt: prompt, seed, method, temperature and num_samples; text (what was
added); new_tokens, chunks, draws of the head, draws_saved (counted in draws, but not needed),
mean_level (draws that agreed on a chunk, mean), fallbacks (chunks that a fallback decided), padded
(one of them is the prompt's end, which no draw continued); seconds (without warm-up),
prefill_seconds of them for the prompt, warmup_seconds, tokens_per_second. After Ctrl-C the
unfinished prompt's line has the text so far and interrupted, without the other numbers. For this
every chunk is read as it is drawn, also on a GPU, where generate from Python reads several at once.
"""
METHODS = ("batch", "exact", "medoid", "noise_scale", "amortized", "direct", "readout")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    add_model_arguments(parser)
    add_prompt_arguments(parser)
    parser.add_argument(
        "--max-new-tokens",
        type=number(int, at_least(1)),
        default=128,
        metavar="T",
        help="tokens to add (default: 128)",
    )
    _add_sampling_arguments(parser)
    parser.add_argument(
        "--prompt-alignment",
        choices=("condition", "pad"),
        default="condition",
        help="a prompt that fills no whole chunk: condition the first chunk on its end (default), "
        "or pad it as the published code does",
    )
    parser.add_argument(
        "--truncate", action="store_true", help="drop the beginning of a prompt that is too long"
    )
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="stop after this text; may be repeated",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print a line of JSON for each prompt instead of its text",
    )


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperature",
        type=_number,
        metavar="T",
        help="in (0, 1], as 0.5 or 1/2; 1 samples the model, lower is more likely text "
        "(default: 0.5, for the method 'direct' 1); at least 0 for the method 'readout'",
    )
    parser.add_argument(
        "--method", choices=METHODS, default="batch", help="how chunks are chosen (default: batch)"
    )
    parser.add_argument(
        "--num-samples",
        type=number(int, at_least(1)),
        default=200,
        metavar="N",
        help="candidates for each chunk below temperature 1 (default: 200)",
    )
    parser.add_argument(
        "--noise-scale",
        type=number(float, NOT_NEGATIVE),
        default=1.0,
        metavar="S",
        help="factor on the head's noise; 0 is deterministic (default: 1)",
    )
    parser.add_argument(
        "--max-draws",
        type=number(int, at_least(1)),
        metavar="D",
        help="most draws for a chunk, where a method or a prompt's end needs many (default: 25 N)",
    )
    parser.add_argument(
        "--seed",
        type=number(int, Range(0, 2**63 - 1)),
        default=0,
        metavar="S",
        help="of the first prompt's draws; the next one has S + 1 (default: 0)",
    )


def _number(text: str) -> float:
    """A number, or a fraction of two."""
    whole, slash, part = text.partition("/")
    try:
        return float(whole) / float(part) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number or a fraction, got {text!r}") from None


def run(args: argparse.Namespace) -> int:
    """Print every prompt and its continuation as it is drawn; speed goes to standard error."""
    prompts = read_prompts(args)
    if args.prompt or args.prompt_file:
        prompts = iter(list(prompts))  # their mistakes show before a model is loaded
    choose_model(args)
    model: Any = load_model(args)
    from calm.memory import check_draws  # imports torch, for which a wrong path need not wait

    check_draws(model, "--num-samples", args.num_samples, 1)
    tokenizer = load_tokenizer_of(args, model)
    for index, prompt in enumerate(prompts):
        try:
            _continue(model, tokenizer, prompt, args.seed + index, args)
        except ValueError as error:
            if not is_interactive(args):
                raise
            print(
                f"error: {with_flag_names(str(error), args)}", file=sys.stderr
            )  # the user may type another prompt
    return 0


def _continue(model: Any, tokenizer: Any, prompt: str, seed: int, args: argparse.Namespace) -> None:
    """One prompt continued and printed; after Ctrl-C what there is."""
    from calm.data.encoding import Encoder
    from calm.decoding import TextStream
    from calm.decoding.text.edges import TokenRecord

    ids = Encoder(tokenizer).prompt(prompt)
    options = _options(args) | {"seed": seed, "tokenizer": tokenizer}
    received = TokenRecord()
    streamer = received if args.json else TextStream(tokenizer)
    settings = {name: options[name] for name in ("method", "temperature", "num_samples")}
    request = {"prompt": prompt, "seed": seed, **settings}
    try:
        found = model.generate([ids], return_details=True, streamer=streamer, **options)
    except KeyboardInterrupt:
        if args.json:
            figures = {"new_tokens": len(received.new), "interrupted": True}
            _print_record(request, tokenizer, received.prompt, received.new, figures)
        raise
    figures = _figures(found)
    if args.json:
        new = received.new[: figures["new_tokens"]]  # a stop string may begin in an earlier chunk
        _print_record(request, tokenizer, received.prompt, new, figures)
    else:
        print(_summary(figures), file=sys.stderr)


def _print_record(
    request: dict[str, Any],
    tokenizer: Any,
    prompt: list[int],
    new: list[int],
    figures: dict[str, Any],
) -> None:
    """A line of JSON: what was asked, the text of the new tokens, and `figures`."""
    from calm.decoding.text.edges import text_after

    record = {**request, "text": text_after(tokenizer, prompt, new), **figures}
    print(json.dumps(record, ensure_ascii=False), flush=True)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `generate` that all prompts share."""
    temperature = args.temperature
    if temperature is None:
        temperature = 1.0 if args.method == "direct" else 0.5
    return {
        "max_new_tokens": args.max_new_tokens,
        "temperature": temperature,
        "num_samples": args.num_samples,
        "method": args.method,
        "noise_scale": args.noise_scale,
        "max_draws": args.max_draws,
        "prompt_alignment": args.prompt_alignment,
        "truncate": args.truncate,
        "stop_strings": args.stop,
    }


def _figures(found: Any) -> dict[str, Any]:
    """Counts and times of one continuation."""
    return {
        "new_tokens": int(found.new_tokens[0]),
        "chunks": found.levels.shape[1],
        "draws": int(found.draws.sum()),
        "draws_saved": int(found.saved.sum()),
        "mean_level": float(found.levels.double().mean()),
        "fallbacks": int(found.fallbacks.sum()),
        "padded": bool(found.fallbacks[0, :1].any() and not found.levels[0, :1].any()),
        "seconds": found.seconds,
        "prefill_seconds": found.prefill_seconds,
        "warmup_seconds": found.warmup_seconds,
        "tokens_per_second": found.tokens_per_second,
    }


def _summary(figures: dict[str, Any]) -> str:
    """The same for people, in one line."""
    chunks = max(1, figures["chunks"])
    parts = [
        f"{figures['new_tokens']} tokens in {figures['seconds']:.2f} s, "
        f"{figures['tokens_per_second']:.1f}/s",
        f"prompt read in {figures['prefill_seconds']:.2f} s",
        f"warm-up {figures['warmup_seconds']:.2f} s",
        f"{figures['draws'] / chunks:.0f} draws a chunk, {figures['mean_level']:.2g} agreeing",
    ]
    if figures["padded"]:
        parts.append("no draw continued the end of the prompt: it was padded")
    if few := figures["fallbacks"] - figures["padded"]:
        parts.append(f"{few} of {chunks} chunks decided by fewer draws than the method needs")
    return "; ".join(parts)
