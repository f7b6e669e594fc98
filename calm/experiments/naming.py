"""How tables and figures name values and write numbers."""

__all__ = ["factor", "number", "shown", "title"]

TITLES = {
    "brier_lm": "BrierLM",
    "brier1": "Brier-1, %", "brier2": "Brier-2, %", "brier3": "Brier-3, %", "brier4": "Brier-4, %",
    "brier1_noisy": "Brier-1 with noise, %",
    "reconstruction": "reconstruction, %",
    "reconstruction_noisy": "reconstruction with noise, %",
    "accuracy": "tokens reconstructed, %",
    "collapsed": "collapsed dimensions, %",
    "noise": "noise, in standard deviations of the latents",
    "posterior_std": "posterior's standard deviation",
    "additivity": "additivity of the code, %",
    "changed_token": "move of one changed token, over the noise",
    "neighbours": "distance of neighbours over that of others",
    "bits_per_token": "cross-entropy, bits a token",
    "energy": "energy score",
    "excess": "energy score above its floor",
    "training_flops": "training FLOPs",
    "inference_flops": "FLOPs a generated token",
    "loss": "training loss",
}  # fmt: skip


def title(name: str) -> str:
    """Of a column or an axis: the value, its unit, and in brackets the text."""
    text, _, metric = name.rpartition("/")
    named = TITLES.get(metric, metric.replace("_", " "))
    return f"{named} ({text})" if text else named


def factor(name: str) -> float:
    """What a value is multiplied with to have the unit of its `title`."""
    return 100.0 if title(name.rpartition("/")[2]).endswith("%") else 1.0


def shown(name: str, value: float) -> str:
    """A value in the unit of its `title`: percent with two digits after the point."""
    unit = factor(name)
    is_score = unit != 1 or name.endswith("brier_lm")
    return f"{unit * value:.2f}" if is_score else number(value)


def number(value: float) -> str:
    """Three digits: ``0.123``, ``12.3``, ``1234``, ``1.23e+10``."""
    if 1000 <= abs(value) < 100000:
        return f"{value:.0f}"
    return f"{value:.3g}"
