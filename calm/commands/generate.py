"""`calm generate`: continue a prompt, printing text as it comes."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from calm.commands.loading import add_model_arguments, load_model, load_tokenizer_of
from calm.errors import UserError

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm generate --model runs/demo/calm --prompt "Return the number of"
  calm generate --model runs/demo/calm --prompt-file start.txt --temperature 1 --seed 7
  calm generate --model runs/demo/baseline --prompt "Return the number of" --temperature 0.7
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    add_model_arguments(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="file with the text to continue")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="T", help="tokens to add (default: 128)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.5,
        metavar="T",
        help="in (0, 1]; 1 samples the model, lower is more likely text (default: 0.5)",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=200,
        metavar="N",
        help="candidates voted among below temperature 1 (default: 200)",
    )
    parser.add_argument(
        "--noise-scale",
        type=float,
        default=1.0,
        metavar="S",
        help="factor on the head's noise; 0 is deterministic (default: 1)",
    )
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
        "--seed", type=int, default=0, metavar="S", help="of the draws (default: 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the prompt and its continuation as it comes, then the speed on standard error."""
    import torch
    from transformers import TextStreamer

    text = _prompt(args)
    model = load_model(args)
    tokenizer = load_tokenizer_of(args, model)
    ids = tokenizer(text)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers end every text
    if not ids:
        raise UserError("the prompt is empty; pass at least one word with --prompt")
    input_ids = torch.tensor([ids], device=model.device)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    begin = time.perf_counter()
    sequences = _continue(model, input_ids, streamer, args)
    seconds = time.perf_counter() - begin
    new_tokens = sequences.shape[1] - input_ids.shape[1]
    print(f"{new_tokens} tokens in {seconds:.1f} s, {new_tokens / seconds:.1f}/s", file=sys.stderr)
    return 0


def _continue(model: Any, input_ids: Any, streamer: Any, args: argparse.Namespace) -> Any:
    """Prompt and continuation from whichever kind of model it is."""
    from calm.decoding import generate, generate_tokens
    from calm.models import BaselineTransformer

    if isinstance(model, BaselineTransformer):
        if args.noise_scale != 1.0:
            raise UserError("--noise-scale: the token baseline has no head whose noise to scale")
        return generate_tokens(
            model,
            input_ids,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            truncate=args.truncate,
            seed=args.seed,
            streamer=streamer,
        )
    return generate(
        model,
        input_ids,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        num_samples=args.num_samples,
        noise_scale=args.noise_scale,
        prompt_alignment=args.prompt_alignment,
        truncate=args.truncate,
        seed=args.seed,
        streamer=streamer,
    )


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    try:
        return Path(args.prompt_file).read_text(encoding="utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {args.prompt_file} is not UTF-8 text: {error}") from error
