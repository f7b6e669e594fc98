"""The documentation site without its tools: navigation, links, figures, what the hook makes."""

import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import yaml

import calm
import calm_kernels

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
NUMBER = re.compile(r"-?\d+\.\d+")


def load(path):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site():
    return load(DOCS / "site" / "pages.py")


def leaves(entry):
    """Pages of a part of the navigation."""
    match entry:
        case str():
            return [entry]
        case dict():
            return [page for part in entry.values() for page in leaves(part)]
        case _:
            return [page for part in entry for page in leaves(part)]


def test_the_navigation_names_every_page_once(site):
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    expected = [*PAGES, *site.SHOWN, site.COMMAND_LINE, site.NOTEBOOK]
    assert sorted(leaves(settings["nav"])) == sorted(expected)
    assert settings["site_dir"].startswith("build/")  # which git ignores


def headings(path):
    """Anchors that GitHub and mkdocs give the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_repository_lead_somewhere(page):
    for target in LINK.findall((DOCS / page).read_text(encoding="utf-8")):
        if ":" not in target:
            path, _, anchor = target.partition("#")
            found = (DOCS / page).parent / path if path else DOCS / page
            assert found.is_file(), target
            assert not anchor or anchor in headings(found), target


def test_links_lead_to_pages_of_the_site(site):
    text = (
        "[a](../CONTRIBUTING.md) [b](../README.md#limits) [c](../README.md) [d](gap.md#x) `gap.md` "
        "(docs/gap.md) [e](../calm_kernels/noise.py) [f](https://x.org/y.md) ![g](gap.png)\n"
        "```\ndocs/gap.md\n```\n"
    )
    files = [SimpleNamespace(src_uri=page) for page in [*PAGES, *site.SHOWN]]
    listed = SimpleNamespace(documentation_pages=lambda: files)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="how-to/train.md"))
    text = text.replace("(../", "(../../").replace("(gap.md#x)", "(../gap.md#x)")
    assert site.on_page_markdown(text, page, None, listed) == (
        "[a](../contributing.md) [b](../limits.md) c [d](../gap.md#x) `gap.md` "
        "([docs/gap.md](../gap.md)) e [f](https://x.org/y.md) ![g](gap.png)\n"
        "```\ndocs/gap.md\n```\n"
    )
    page.file.src_uri = "limits.md"
    text = "[here](#x) [How fast](#how-fast)"
    assert site.on_page_markdown(text, page, None, listed) == "[here](#x) [How fast](speed.md)"


def test_the_site_shows_sections_of_the_readme(site):
    limits = site.SHOWN["limits.md"].text()
    assert limits.startswith("# When not to use a CALM\n") and "\n## " not in limits
    assert "token baseline is better" in limits
    for shown in site.SHOWN.values():
        assert len(shown.text()) > 200
    with pytest.raises(ValueError, match="no section 'Nonsense'"):
        site.Shown("README.md", "Nonsense").text()


def test_the_reference_has_every_public_name():
    for package in (calm, calm_kernels):
        text = (DOCS / "reference" / f"{package.__name__}.md").read_text(encoding="utf-8")
        paths = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
        assert {path.rpartition(".")[2] for path in paths} >= set(package.__all__)
        for path in paths:
            module, _, name = path.rpartition(".")
            assert hasattr(importlib.import_module(module), name), path


def test_docstrings_become_markdown(monkeypatch):
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object))
    as_markdown = load(DOCS / "site" / "docstrings.py").as_markdown
    given = (
        "A sum.\n\nout = x\n      + y\n\nArgs:\n    x: one.\nReturns: the sum\n    of both.\n"
        "Cost: x = y\n    adds."
    )
    assert as_markdown(given) == (
        "A sum.\n\n    out = x\n          + y\n\nArgs:\n    x: one.\n\nReturns:\n    the sum\n"
        "    of both.\n\n**Cost:** x = y\nadds."
    )


def drawn(path):
    """Text and numbers of a figure; names of its parts are hashes."""
    text = re.sub(r"\b[mpC][0-9a-f_]{9,}\b", "", path.read_text(encoding="utf-8"))
    return NUMBER.sub("", text), [float(number) for number in NUMBER.findall(text)]


def test_figures_are_what_their_program_draws(tmp_path):
    figures = load(DOCS / "figures" / "draw.py")
    committed = sorted((DOCS / "figures").glob("*.svg"))
    assert [path.stem for path in committed] == sorted(figures.FIGURES)
    page = (DOCS / "concepts.md").read_text(encoding="utf-8")
    for path in committed:
        assert path.stat().st_size < 60_000 and f"(figures/{path.name})" in page
    tested = re.search(r"^matplotlib==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if matplotlib.__version__ != tested[1]:
        pytest.skip("another matplotlib may place things elsewhere")
    figures.draw(tmp_path)
    for path in committed:
        (text, numbers), (now, numbers_now) = drawn(path), drawn(tmp_path / path.name)
        assert text == now, path.name
        assert numbers == pytest.approx(numbers_now, abs=0.01), path.name
