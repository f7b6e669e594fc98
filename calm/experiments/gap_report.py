"""The page of `calm experiment gap`: tables, and in plain words where most is lost."""

from calm.evaluation.bootstrap import ORDERS
from calm.evaluation.paired import PairedDifference
from calm.experiments.gap_losses import Gap

__all__ = ["NAMES", "to_markdown", "verdict"]

# In the order of the table.
NAMES = {
    "baseline": "token baseline",
    "causal": "readout, slot-causal",
    "independent": "readout, independent slots",
    "own": "readout, the model's own",
    "draws": "draws of the head",
}
LATENT = {
    "additivity": "share of the mean's variance that a sum over slots explains",
    "changed_token": "distance by which one changed token moves the mean",
    "neighbours": "distance of chunks that follow each other",
    "others": "distance of chunks from different places",
    "noise": "distance of a drawn latent from its mean, the posterior's noise",
    "reconstruction": "share of tokens that a drawn latent gives back",
    "energy": "energy loss of the head",
    "floor": "its floor, of the posterior's noise alone",
    "excess": "excess over the floor",
    "unconditional": "excess of a head that ignores the text",
    "predicted": "share of that excess which the head has removed",
    "spread_ratio": "distance of draws to each other over distance to the truth; 1 is right",
}

NO_FIT = "the text is too short to fit a code to one half of it and test it on the other"


def to_markdown(gap: Gap) -> str:
    """The report."""
    facts = ", ".join(f"{name} {value}" for name, value in gap.measured_on.items())
    return (
        "\n\n".join(
            [
                "# Where BrierLM is lost",
                verdict(gap),
                "![BrierLM of what was scored, over the spread, and slot by slot](report.png)",
                "## Trunk and head",
                _scores(gap),
                _differences(gap),
                "## Dispersion",
                _dispersion(gap),
                _slots(gap),
                "## Latent",
                _latent(gap),
                f"Measured on: {facts}. In brackets 95 % intervals, from resampled spans of text "
                "as long as a block; those of differences are paired.",
            ]
        )
        + "\n"
    )


def verdict(gap: Gap) -> str:
    """Where most is lost, what a spread wins back, and what kind of code the latent is."""
    return " ".join([*_largest_loss(gap), _gain(gap), _code(gap.latent)])


def _largest_loss(gap: Gap) -> list[str]:
    """A sentence, and another where the readout cannot show the loss of the head."""
    losses = gap.losses
    if losses.trunk is None or losses.trunk_minus_head is None:
        said = [
            f"From a readout of the hidden states to the head's draws BrierLM falls by "
            f"{_brier_lm(losses.head)}."
        ]
    else:
        said = [
            _which(losses.head, losses.trunk_minus_head),
            f"BrierLM falls by {_brier_lm(losses.trunk)} from the baseline to a readout of the "
            f"hidden states, and by {_brier_lm(losses.head)} from there to the head's draws.",
        ]
    if losses.head.interval["brier_lm"][0] > 0:
        return said
    return [
        *said,
        "The readout is not shown to be better than the draws: train it longer (--steps).",
    ]


def _which(head: PairedDifference, trunk_minus_head: PairedDifference) -> str:
    """Nothing is said of losses that the text does not tell apart, nor of a head that gains."""
    if trunk_minus_head.is_tied("brier_lm") or head.difference["brier_lm"] < 0:
        return "Whether trunk or head loses more cannot be told."
    part = "trunk" if trunk_minus_head.difference["brier_lm"] > 0 else "head"
    return f"The {part} loses most."


def _gain(gap: Gap) -> str:
    """What the half of the text shows that has not chosen the spread."""
    found = gap.losses.dispersion
    if found.chosen == 1:
        return "No other noise_spread that was tried is better than 1 on the half that chooses."
    chosen = f"A noise_spread of {found.chosen:g}, chosen on one half of the text,"
    by = f"BrierLM there minus that of 1 is {_brier_lm(found.gain)}."
    if found.gain.is_tied("brier_lm"):
        return f"{chosen} is not shown to be better on the other: {by}"
    is_better = found.gain.difference["brier_lm"] > 0
    return f"{chosen} is {'better' if is_better else 'worse'} on the other: {by}"


def _code(latent: dict[str, float]) -> str:
    times = f"{latent['changed_token'] / latent['noise']:.1f} times the posterior's noise"
    if "additivity" in latent:
        return (
            f"A sum over slots explains {100 * latent['additivity']:.1f} % of the latent's mean, "
            f"and one changed token moves it by {times}."
        )
    return (
        f"How much of the latent's mean a sum over slots explains cannot be told: {NO_FIT} "
        f"(--max-blocks). One changed token moves the mean by {times}."
    )


def _scores(gap: Gap) -> str:
    rows = []
    for name, label in NAMES.items():
        if name not in gap.scores:
            continue
        scores = gap.scores[name]
        cells = [_brier_lm(scores), *(_percent(scores, order) for order in ORDERS)]
        rows.append([label, *cells, *_bits(gap, name)])
    head = ["", "BrierLM", *(f"Brier-{order[-1]}, %" for order in ORDERS), "bits a token"]
    return _table([*head, "bits a byte"], rows)


def _bits(gap: Gap, name: str) -> list[str]:
    """Bits a token and bits a byte; draws have none."""
    if name not in gap.bits:
        return ["", ""]
    found, token = gap.bits[name], 1 / gap.patch_size
    return [
        _value(found, "bits", factor, digits=3) for factor in (token, token * gap.tokens_per_byte)
    ]


def _differences(gap: Gap) -> str:
    rows = {
        "trunk: baseline - slot-causal readout": gap.losses.trunk,
        "head: slot-causal readout - draws": gap.losses.head,
        "tokens of a chunk together: slot-causal - independent": gap.joint,
    }
    cells = [
        [label, _brier_lm(found), *(_percent(found, order) for order in ORDERS)]
        for label, found in rows.items()
        if found is not None
    ]
    return _table(["loss", "BrierLM", *(f"Brier-{order[-1]}, %" for order in ORDERS)], cells)


def _dispersion(gap: Gap) -> str:
    found = gap.losses.dispersion
    rows = [
        [f"{spread:g}", f"{values['brier_lm']:.2f}"]
        + [f"{100 * values[order]:.2f}" for order in ORDERS]
        for spread, values in found.values.items()
    ]
    table = _table(["noise_spread", "BrierLM", *(f"Brier-{o[-1]}, %" for o in ORDERS)], rows)
    return (
        f"{table}\n\nThese are scores on one half of the text, which chooses {found.chosen:g}. "
        f"On the other half BrierLM minus that of 1 is {_brier_lm(found.gain)}."
    )


def _slots(gap: Gap) -> str:
    """Draws that are the text, and pairs that agree: equal shares where the spread is right."""
    rows = [
        [f"{NAMES[name]}, {what}"]
        + [_percent(found, f"{key}{slot + 1}") for slot in range(gap.patch_size)]
        for name, found in gap.slots.items()
        for key, what in (("match", "draws that are the text"), ("collision", "pairs that agree"))
    ]
    return _table(["%", *(f"token {slot + 1}" for slot in range(gap.patch_size))], rows)


def _latent(gap: Gap) -> str:
    rows = [
        [label, f"{gap.latent[name]:.4g}" if name in gap.latent else f"not known: {NO_FIT}"]
        for name, label in LATENT.items()
    ]
    return _table(["", "value"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _brier_lm(found: PairedDifference) -> str:
    return _value(found, "brier_lm", 1, digits=2)


def _percent(found: PairedDifference, name: str) -> str:
    return _value(found, name, 100, digits=2)


def _value(found: PairedDifference, name: str, factor: float, *, digits: int) -> str:
    """``1.23 [1.20, 1.26]``; the value alone where a single span gives no interval."""
    low, high = (factor * end for end in found.interval[name])
    value = f"{factor * found.difference[name]:.{digits}f}"
    return value if low != low else f"{value} [{low:.{digits}f}, {high:.{digits}f}]"
