"""`calm eval`: BrierLM of a model on a text, its energy score or cross-entropy, diagnostics."""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm.commands.model_flags import (
    add_model_arguments,
    choose_model,
    load_model,
    load_tokenizer_of,
    read_config,
)
from calm.commands.run_text import choose_text
from calm.commands.scoring_flags import add_scoring_arguments, check_writable, scoring_settings
from calm.commands.text_flags import add_evaluation_text_arguments, load_blocks
from calm.pretrained import shown_name

if TYPE_CHECKING:
    from calm.evaluation import Evaluation
    from calm.evaluation.measures import TextMeasures

__all__ = ["EXAMPLES", "Scored", "add_arguments", "run", "score"]

EXAMPLES = """\
  calm eval                                       the model that comes with the package
  calm eval --model runs/demo/calm --block-size 256          the held-out text of its training
  calm eval --model runs/calm-m --data wikitext-test.txt --block-size 8192 --json brier.json
  calm eval --model runs/baseline-s --data wikitext-test.txt --max-blocks 64
  calm eval --model runs/mine --method readout

Compare numbers only if their protocols agree: the block size alone moves BrierLM by some 30 %.

--json writes: brier_lm (0 to 100), brier (brier1 to brier4, fractions), their 95 % intervals
brier_lm_interval and brier_intervals (bootstrap over blocks), standard_errors of brier (between
blocks), protocol: all that is needed to compute the same numbers again; measures: energy loss, its
terms and its floor, reconstruction and diagnostics of a CALM, cross-entropy (nats a token) and bits
per byte of a baseline, bits a chunk and per byte of a CALM with --method readout; their
measures_standard_errors; and advice, a line for each that is amiss.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    add_model_arguments(parser)
    add_evaluation_text_arguments(parser, or_else="the held-out text of the model's training")
    add_scoring_arguments(parser)
    parser.add_argument("--json", metavar="OUT", help="also write the record to this file")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the table."""
    check_writable(args.json, "--json")
    choose_model(args)
    read_config(Path(args.model))
    choose_text(args, [args.model])
    scored = score(args)
    print(scored.to_table())
    if args.json:
        text_of = json.dumps(scored.record(), indent=2, ensure_ascii=False) + "\n"
        Path(args.json).write_text(text_of, encoding="utf-8")
    return 0


@dataclass(frozen=True)
class Scored:
    """What `calm eval` has found.

    Attributes:
        evaluation: BrierLM, with the protocol.
        measures: what the text says beside it.
        values: means of these, and what follows from them.
    """

    evaluation: "Evaluation"
    measures: "TextMeasures"
    values: dict[str, float]

    def to_table(self) -> str:
        """For people."""
        parts = [self.evaluation.to_table(), self.measures.to_table(self.values), *self.advice()]
        return "\n\n".join(parts)

    def advice(self) -> list[str]:
        """A line for each value that is amiss."""
        from calm.evaluation.diagnostics import advice

        return advice(self.values)

    def record(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        errors = {k: v for k, v in self.measures.standard_errors().items() if not math.isnan(v)}
        return json.loads(self.evaluation.to_json()) | {
            "measures": self.values,
            "measures_standard_errors": errors,
            "advice": self.advice(),
        }


def score(args: argparse.Namespace) -> Scored:
    """Score the model and the text that the flags of the command name."""
    from calm.evaluation import evaluate
    from calm.memory import check_draws
    from calm.progress_bar import progress_bar

    model = load_model(args)
    tokenizer = load_tokenizer_of(args, model)
    blocks, text = load_blocks(args, model, tokenizer)
    chunks = len(blocks[0]["input_ids"]) // getattr(model, "patch_size", 1)
    check_draws(model, "--num-samples", args.num_samples, chunks)
    settings = scoring_settings(args)
    total = -(-len(blocks) // args.batch_size)
    bar = partial(progress_bar, total=total)
    evaluation = evaluate(
        model,
        blocks,
        **settings,
        progress=partial(bar, desc="BrierLM"),
        describe={"model": shown_name(args.model), "kind": type(model).__name__, **text},
    )
    measures = _measure(model, blocks, settings, partial(bar, desc="measures"))
    return Scored(evaluation, measures, _values(model, measures, tokenizer))


def _measure(model: Any, blocks: Any, settings: dict[str, Any], bar: Callable[..., Any]) -> Any:
    """What the text says beside BrierLM, of what draws: the model itself, or its readout."""
    from calm.evaluation.measures import TextMeasures, measure_text
    from calm.evaluation.readout_bits import readout_bits

    shared = {"batch_size": settings["batch_size"], "progress": bar}
    if settings["method"] == "readout" and hasattr(model, "slot_readout"):
        return TextMeasures(readout_bits(model, model.slot_readout(), blocks, **shared))
    names = ("num_samples", "noise_scale", "noise_spread", "seed")
    return measure_text(model, blocks, **{name: settings[name] for name in names}, **shared)


def _values(model: Any, measures: Any, tokenizer: Any) -> dict[str, float]:
    """Means, and bits per byte where the likelihood is known."""
    from calm.evaluation.measures import tokens_per_byte

    values = measures.values()
    bits = None
    if "cross_entropy" in values:
        bits = values["cross_entropy"] / math.log(2)
    elif "bits" in values:
        bits = values["bits"] / model.patch_size
    if bits is not None:
        values["bits_per_byte"] = bits * tokens_per_byte(tokenizer, measures.scores.text)
    return values
