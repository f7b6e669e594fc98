"""Markdown tables and the places of a page that they fill."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

__all__ = ["emphasised", "fill", "span", "table", "write_between"]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell does not end it."""
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
        for cells in (columns, *rows)
    ]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def span(values: Iterable[float], digits: int, unit: str = "") -> str:
    """The least and the greatest value, or one number where they read the same."""
    numbers = list(values)
    least, greatest = f"{min(numbers):.{digits}f}", f"{max(numbers):.{digits}f}"
    return f"{least}{unit}" if least == greatest else f"{least}–{greatest}{unit}"


def emphasised(text: str, is_faster: bool) -> str:
    """Bold where ours is faster in every run."""
    return f"**{text}**" if is_faster else text


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def write_between(page: Path, name: str, body: str) -> None:
    """Replace what stands between the markers of `name` in `page`.

    Raises:
        ValueError: `page` lacks them.
    """
    begin, end = _markers(name)
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{page} lacks the markers {begin} and {end}")
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    page.write_text(f"{head}{begin}\n{body}\n{end}{tail}", encoding="utf-8")


def fill(page: Path, bodies: Mapping[str, str]) -> None:
    """Fill the places that `page` has markers for.

    Raises:
        ValueError: it has none.
    """
    text = page.read_text(encoding="utf-8")
    wanted = [name for name in bodies if _markers(name)[0] in text]
    if not wanted:
        raise ValueError(f"{page} has markers of none of these: {', '.join(bodies)}")
    for name in wanted:
        write_between(page, name, bodies[name])
