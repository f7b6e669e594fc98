"""The card of an exported model: its scores on held-out text, and whose text it has learned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calm.data.embedded import TEXT_LICENCES
from calm.evaluation.bootstrap import ORDERS
from calm.training.model_card import TrainedModel, brier_result, markdown_table, model_card

__all__ = ["export_card"]

Record = Mapping[str, Any]  # what `calm eval --json` writes

DRAWN_BY = {"direct": "its head", "readout": "its readout"}
HEAD = (
    "drawn by", "BrierLM", "95 % interval", *(f"Brier-{order[-1]}, %" for order in ORDERS),
    "bits a byte",
)  # fmt: skip


def export_card(
    trained: TrainedModel,
    evaluations: Mapping[str, Record],
    *,
    command: str,
    stored: str,
    license: str | None = None,
) -> str:
    """The card.

    Args:
        trained: the model with the records of its run.
        evaluations: records of `calm eval` by its ``--method``; all with one protocol but for that.
        command: that repeats the first of them.
        stored: dtype of the weights in the file.
        license: of the weights.
    """
    first = next(iter(evaluations.values()))
    protocol = first["protocol"]
    patch_size = getattr(trained.model, "patch_size", 1)
    context = patch_size * trained.model.config.max_position_embeddings
    return model_card(
        trained,
        rows=[
            *_inside(trained.model),
            ("weights", f"stored in {stored}, loaded as {protocol['dtype']}"),
            ("context", f"{context:,} tokens"),
        ],
        results=[
            brier_result(
                _name(protocol),
                first["brier_lm"],
                is_held_out=bool(protocol["held_out_percentage"]),
            )
        ],
        sections=["## Scores", _scores(trained, evaluations, command), "## Text", _text(trained)],
        limits=[
            f"It has seen {context:,} tokens at a time, and no more.",
            "Scores hold for this text and this protocol alone: another block size, another "
            "version of the text or of Python gives other numbers.",
        ],
        license=license,
    )


def _inside(model: Any) -> list[tuple[str, str]]:
    """How many of the parameters are those of the autoencoder, if there is one."""
    found = getattr(model, "ae_model", None)
    size = sum(weight.numel() for weight in found.parameters()) if found else 0
    return [("of its autoencoder", f"{size:,} of the parameters")] if size else []


def _scores(trained: TrainedModel, evaluations: Mapping[str, Record], command: str) -> str:
    """A table, a row for each that draws, and how to repeat it."""
    is_calm = hasattr(trained.model, "patch_size")
    rows = [
        [DRAWN_BY[method] if is_calm else "token by token", *_figures(record)]
        for method, record in evaluations.items()
    ]
    protocol = next(iter(evaluations.values()))["protocol"]
    share, text, versions = protocol["held_out_percentage"], _name(protocol), protocol["versions"]
    if share:
        text = f"{share:g} % of {text} that training held out"
    methods = " and with `--method readout`" if "readout" in evaluations and is_calm else ""
    return "\n\n".join([
        "BrierLM lies between 0 and 100, higher is better. Intervals are bootstrapped over blocks.",
        markdown_table(HEAD, rows),
        f"`{command}`{methods}: {protocol['tokens']:,} tokens of the "
        f"{text}, {protocol['blocks']} blocks of {protocol['block_size']}, "
        f"{protocol['num_samples']} draws of each position ({protocol['positions_are']}), "
        f"seed {protocol['seed']}, weights as they are stored; Python {versions['python']}, "
        f"torch {versions['torch']}.",
    ])  # fmt: skip


def _name(protocol: Record) -> str:
    """Of the text that was scored, without folders of a machine."""
    return Path(protocol["data"]).name


def _figures(record: Record) -> list[str]:
    low, high = record["brier_lm_interval"] or (None, None)
    bits = record["measures"].get("bits_per_byte")
    return [
        f"{record['brier_lm']:.2f}",
        "one block only" if low is None else f"{low:.2f} to {high:.2f}",
        *(f"{100 * record['brier'][order]:.1f}" for order in ORDERS),
        "not known" if bits is None else f"{bits:.3f}",
    ]


def _text(trained: TrainedModel) -> str:
    """What it has learned, and under which licence that text is."""
    share = trained.protocol["validation_split_percentage"]
    held_out = f", without the {share:g} % of documents that were held out" if share else ""
    licence = TEXT_LICENCES.get(trained.protocol["dataset"], "Its licence has not been recorded.")
    return f"Trained on {trained.text}{held_out}. {licence}"
