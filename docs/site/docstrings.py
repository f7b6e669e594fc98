"""An extension of griffe: docstrings of this package, for mkdocstrings.

They are written to be read in a terminal: formulas stand in paragraphs of their own, and what
follows `Returns:` or `Source:` begins on the same line.
"""

import re
from typing import Any

from griffe import Extension

__all__ = ["Docstrings", "as_markdown"]

SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields")
HEADER = re.compile(r"([A-Z][a-z]+):(?: +(\S.*))?")


def as_markdown(docstring: str) -> str:
    """The docstring as the parser of sections and Markdown want it."""
    paragraphs = re.split(r"\n{2,}", docstring)
    return "\n\n".join(
        _as_code(text) if place and _is_formula(text) else _with_headers(text)
        for place, text in enumerate(paragraphs)
    )


def _is_formula(paragraph: str) -> bool:
    first = paragraph.partition("\n")[0]
    is_equation = re.search(r" (=|←) ", first) and not HEADER.match(paragraph)
    return bool(is_equation) and not paragraph.startswith(" ") and not paragraph.endswith(".")


def _as_code(paragraph: str) -> str:
    return "\n".join(f"    {line}" for line in paragraph.split("\n"))


def _with_headers(paragraph: str) -> str:
    """Sections begin after an empty line, with their text below; other headers become bold."""
    lines: list[str] = []
    is_prose = False  # the lines below a header that is no section
    for line in paragraph.split("\n"):
        match = HEADER.fullmatch(line)
        if match and (match[1] in SECTIONS or match[2]):
            is_prose = match[1] not in SECTIONS
            head = [f"**{match[1]}:** {match[2]}"] if is_prose else [f"{match[1]}:"]
            text = [f"    {match[2]}"] if match[2] and not is_prose else []
            lines += ["", *head, *text]
        else:
            lines.append(line.strip() if is_prose else line)
    return "\n".join(lines).strip("\n")


class Docstrings(Extension):
    """Rewrites every docstring when its object has been read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called by griffe."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
