"""`calm plan`: parameters of a recipe or a checkpoint, and what it takes to train and to use."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from calm.commands.model_flags import model_folder, read_config
from calm.pretrained import shown_name
from calm.ranges import Range, at_least, number
from calm.units import duration

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm plan                       every recipe, one line each
  calm plan calm-m                part by part, and what it costs
  calm plan calm-m --gpus 8 --tokens 230e9
  calm plan calm-m calm-l --json
  calm plan runs/demo/calm        a checkpoint, or a YAML file of your own

The autoencoder of a language model is counted separately, as in the paper's table 1. Time is that
of a GPU of 989 TFLOP/s (H100 or H200, dense bfloat16) of which a share, --mfu, is used: an
assumption, nothing measured. calm/flops.py and calm/training_memory.py say what is counted.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    parser.add_argument(
        "names",
        nargs="*",
        type=model_folder,
        metavar="NAME",
        help="recipe, YAML file, or folder of a saved model (or its name, see `calm pretrained`)",
    )
    parser.add_argument(
        "--vocab-size",
        type=number(int, at_least(1)),
        metavar="V",
        help="entries of the tokenizer (default: what the recipe's tokenizer has, else 128256)",
    )
    parser.add_argument(
        "--gpus",
        type=number(int, at_least(1)),
        default=8,
        metavar="G",
        help="GPUs that share a batch (default: 8, for which the published recipes are meant)",
    )
    parser.add_argument(
        "--tokens",
        type=number(float, Range(1, 1e18)),
        metavar="T",
        help="tokens of training (default: the recipe's steps x batch x block)",
    )
    parser.add_argument(
        "--mfu",
        type=number(float, Range(0, 1, is_open=True)),
        default=0.4,
        metavar="F",
        help="share of a GPU's peak that training reaches, in (0, 1] (default: 0.4)",
    )
    parser.add_argument(
        "--fsdp", action="store_true", help="weights split among the GPUs (see docs/scaling.md)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plans."""
    from calm.training.flags.recipe import recipe_names

    plans = {shown_name(name): _plan(name, args) for name in args.names or recipe_names()}
    if args.json:
        print(json.dumps(plans, indent=2))
        return 0
    if not args.names:
        print(f"{'recipe':18} {'stage':12} {'parameters':>16}")
    for name, stages in plans.items():
        for stage, plan in stages.items():
            print(_detail(name, stage, plan) if args.names else _line(name, stage, plan))
    return 0


def _plan(name: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """For each stage its parameters, part by part, and ``cost``."""
    from calm.configuration import model_kind
    from calm.plan import count_parts, saved_model, stages_of

    if Path(name).is_dir():
        kind = model_kind(read_config(Path(name)))
        model = saved_model(Path(name), kind)
        return {kind: {**count_parts(model), "cost": _cost(model, None, args)}}
    return {
        stage.value: {**count_parts(model), "cost": _cost(model, run, args)}
        for stage, (model, run) in stages_of(name, args.vocab_size).items()
    }


def _cost(model: Any, run: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Operations, steps, time and memory; what a checkpoint does not know is missing.

    Args:
        model: on any device.
        run: how the recipe trains; None for a checkpoint.
        args: of the command.
    """
    from calm.flops import PEAK, BaselineFlops, CALMFlops, flops_of
    from calm.training_memory import memory_of

    chunk = getattr(model.config, "patch_size", 1)
    context = run.block_size // chunk if run else model.config.max_position_embeddings
    flops = flops_of(model, max(context, 1))
    cost: dict[str, Any] = {
        "context_positions": context,
        "training_flop_per_token": flops.training(),
        "inference_flop_per_token": flops.inference(),
    }
    if isinstance(flops, CALMFlops):
        cost["inference_flop_per_token_of_200_candidates"] = flops.inference(200)
        if flops.readout:
            cost["inference_flop_per_token_by_readout"] = flops.inference_by_readout()
    if not isinstance(flops, BaselineFlops) and (terms := flops.training_terms()):
        cost["training_terms_flop_per_token"] = terms
    tokens = args.tokens
    cost["gpus"] = args.gpus
    if run is not None:
        batch = args.gpus * run.micro_batch * run.accumulation * run.block_size
        cost["tokens_per_step"] = batch
        if tokens is None and run.steps is not None:
            tokens = run.steps * batch
        if tokens is not None:
            cost["optimizer_steps"] = math.ceil(tokens / batch)
        memory = memory_of(model, run, args.gpus, is_sharded=args.fsdp)
        cost["micro_batch_sequences"] = run.micro_batch
        cost["memory_bytes_per_gpu"] = {**vars(memory), "total": memory.total()}
        cost["fits_80_gb"] = memory.fits()
        cost["is_sharded"] = args.fsdp
    if tokens is not None:
        total = tokens * flops.training()
        cost |= {
            "training_tokens": tokens,
            "training_flop": total,
            "assumed_mfu": args.mfu,
            "assumed_peak_flop_per_second_per_gpu": PEAK,
            "training_seconds": total / (args.gpus * PEAK * args.mfu),
        }
    return cost


def _line(name: str, stage: str, plan: dict[str, Any]) -> str:
    return f"{name:18} {stage:12} {plan['total']:>16,}  {plan['total'] / 1e6:>9.2f}M"


def _detail(name: str, stage: str, plan: dict[str, Any]) -> str:
    rows = [f"{name} ({stage})"]
    for part, size in plan.items():
        if part != "cost":
            label = part.replace("_", " ")
            rows.append(f"  {label:16} {size:>16,}  {size / 1e6:>9.2f}M")
    return "\n".join(rows + [f"  {row}" for row in _cost_rows(plan["cost"])])


def _cost_rows(cost: dict[str, Any]) -> list[str]:
    many = cost.get("inference_flop_per_token_of_200_candidates")
    by_readout = cost.get("inference_flop_per_token_by_readout")
    rows = [
        f"training         {cost['training_flop_per_token'] / 1e9:>16.4g} GFLOP a token"
        + "".join(
            f", {name.replace('_', ' ')} {term / cost['training_flop_per_token']:.1%} of it"
            for name, term in cost.get("training_terms_flop_per_token", {}).items()
        ),
        f"inference        {cost['inference_flop_per_token'] / 1e9:>16.4g} GFLOP a token"
        + (f", {many / 1e9:.4g} with 200 candidates" if many else "")
        + (f", {by_readout / 1e9:.4g} by its readout" if by_readout else ""),
    ]
    if "training_flop" in cost:
        rows.append(
            f"whole training   {cost['training_flop'] / 1e18:>16.4g} EFLOP for "
            f"{cost['training_tokens']:,.0f} tokens"
        )
    if "optimizer_steps" in cost:
        rows.append(
            f"optimizer steps  {cost['optimizer_steps']:>16,} of {cost['tokens_per_step']:,} tokens"
        )
    if "training_flop" in cost:
        peak = cost["assumed_peak_flop_per_second_per_gpu"]
        rows.append(
            f"time             {duration(cost['training_seconds']):>16} on {cost['gpus']} GPUs at "
            f"{cost['assumed_mfu']:.0%} of {peak / 1e12:.0f} TFLOP/s (dense bf16; assumed)"
        )
    if "memory_bytes_per_gpu" in cost:
        sizes = cost["memory_bytes_per_gpu"]
        parts = ", ".join(f"{k} {v / 2**30:.2f}" for k, v in sizes.items() if v and k != "total")
        rows.append(f"memory a GPU     {sizes['total'] / 2**30:>16,.2f} GiB: {parts}")
        rows.append(
            f"{'':17}{cost['micro_batch_sequences']:>16,} sequences at once, "
            f"{'weights in shards' if cost['is_sharded'] else 'data parallel'}, "
            "float32 weights, AdamW (by formula)"
        )
        advice = "" if cost["is_sharded"] else " (shard it: --fsdp)"
        fits = "it fits" if cost["fits_80_gb"] else f"it does not fit{advice}"
        rows.append(f"{'':17}{fits} a GPU of 80 GB, with 20 % for what is not counted")
    return rows
