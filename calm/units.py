"""Numbers with units, for people."""

__all__ = ["duration"]


def duration(seconds: float) -> str:
    """In the largest unit of which there are two or more, as in ``2.5 hours``."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"
