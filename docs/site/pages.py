"""A hook of mkdocs: pages made of what stands elsewhere, and links that hold on the site too.

Pages in docs/ link as the repository has it: relative to themselves, `../CONTRIBUTING.md` included.
"""

import io
import json
import os
import posixpath
import re
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "COMMAND_LINE",
    "NOTEBOOK",
    "SHOWN",
    "Shown",
    "command_line",
    "notebook",
    "on_files",
    "on_page_markdown",
]

ROOT = Path(__file__).resolve().parents[2]


class Shown(NamedTuple):
    """A file of the repository outside docs/ that the site shows, or one section under a title."""

    path: str
    section: str = ""
    title: str = ""

    @property
    def address(self) -> str:
        """What a link in the repository calls it."""
        return self.path + ("#" + self.section.lower().replace(" ", "-") if self.section else "")

    def text(self) -> str:
        """Its Markdown."""
        text = (ROOT / self.path).read_text(encoding="utf-8")
        if not self.section:
            return text
        body = re.search(rf"^## {self.section}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
        if body is None:
            raise ValueError(f"{self.path} has no section {self.section!r}")
        return f"# {self.title}\n{body[1]}"


# Page of the site -> what it shows.
SHOWN = {
    "limits.md": Shown("README.md", "Limits", "When not to use a CALM"),
    "speed.md": Shown("README.md", "How fast", "Speed beside the published code"),
    "differences.md": Shown(
        "README.md", "What differs from the published code", "What differs from the published code"
    ),
    "contributing.md": Shown("CONTRIBUTING.md"),
    "changelog.md": Shown("CHANGELOG.md"),
    **{
        f"operations/{path.parent.name}.md": Shown(path.relative_to(ROOT).as_posix())
        for path in sorted((ROOT / "calm_kernels").glob("*/README.md"))
    },
}
COMMAND_LINE = "reference/command-line.md"
NOTEBOOK = "notebook.md"

FENCED = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)[^\S\n]*$", re.DOTALL | re.MULTILINE)
# An image, a link, code, or a file that the text names.
MENTION = re.compile(
    r"!\[[^\]]*\]\([^)]*\)|\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)"
    r"|`(?P<code>[^`\n]+)`|(?<![\w/.-])(?P<name>[\w./-]+\.md)\b"
)


@cache
def command_line() -> str:
    """The help of `calm` and of each of its commands, as a page."""
    from calm import cli

    parts = ["# Command line", "What `calm COMMAND --help` prints.", _help(cli.main)]
    for name in {**cli.COMMANDS, **cli.TRAINING}:
        parts += [f"## calm {name}", _help(cli.main, name)]
    return "\n\n".join(parts) + "\n"


def _help(main: Any, *words: str) -> str:
    text = io.StringIO()
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with redirect_stdout(text), suppress(SystemExit):
            main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if width is not None:
            os.environ["COLUMNS"] = width
    return f"```text\n{text.getvalue().strip()}\n```"


def notebook() -> str:
    """docs/notebook.ipynb as a page: its cells, and what they printed when it was last run."""
    parts = []
    for cell in json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = [out["text"] for out in cell["outputs"] if out.get("name") == "stdout"]
        if printed := "".join(line for lines in printed for line in lines):
            parts.append(f"```text\n{printed.rstrip()}\n```")
    parts.append("This page is `docs/notebook.ipynb`; `make notebook` runs it again.")
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that no file of docs/ holds."""
    from mkdocs.structure.files import File

    for page, shown in SHOWN.items():
        files.append(File.generated(config, page, content=shown.text()))
    for page, text in ((COMMAND_LINE, command_line()), (NOTEBOOK, notebook())):
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at pages of the site, and make links of the pages that the text names."""
    pages = {shown.address: name for name, shown in SHOWN.items()}
    pages |= {f"docs/{file.src_uri}": file.src_uri for file in files.documentation_pages()}
    pages["docs/notebook.ipynb"] = NOTEBOOK
    here = page.file.src_uri
    source = SHOWN[here].path if here in SHOWN else f"docs/{here}"
    folder = posixpath.dirname(source)

    def link(text: str, path: str) -> str:
        """A link to the page of that file, or the text alone where the site has none."""
        for address, anchor in ((path, ""), (path.partition("#")[0], path.partition("#")[2])):
            if address in pages and pages[address] != here:
                target = posixpath.relpath(pages[address], posixpath.dirname(here))
                return f"[{text}]({target}{'#' + anchor if anchor else ''})"
        return text

    def mention(match: re.Match[str]) -> str:
        if target := match["target"]:
            if target.startswith("#"):  # the page itself, or a section that has another page
                section = source + target
                return link(match["text"], section) if section in pages else match[0]
            if ":" in target:
                return match[0]
            return link(match["text"], posixpath.normpath(posixpath.join(folder, target)))
        path = match["code"] or match["name"] or ""
        beside = posixpath.normpath(posixpath.join(folder, path))
        return link(match[0], path if path in pages else beside)

    parts, end = [], 0
    for fence in FENCED.finditer(markdown):
        parts += [MENTION.sub(mention, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, MENTION.sub(mention, markdown[end:])])
