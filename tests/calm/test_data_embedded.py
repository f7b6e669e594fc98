"""Corpora that need no download: what is read, what is dropped, what is kept for the next time."""

from pathlib import Path

import pytest

from calm.data import embedded
from calm.data.corpus import load_corpus
from calm.data.embedded import (
    flatten,
    language_topics,
    package_docstrings,
    standard_library_docstrings,
)
from calm.data.options import CorpusOptions
from calm.errors import UserError, UserNotice


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write


def test_topics_are_the_language_reference():
    topics = language_topics()
    assert len(topics) > 50 and any("assignment" in topic.lower() for topic in topics)


def test_docstrings_are_long_flat_and_distinct(write, tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    long = "A sentence that goes on and on.\n\n    " + "More of it. " * 8
    write("b.py", f'class B:\n    """{long}"""\n    def f(self):\n        """short"""\n')
    write("a/__init__.py", f'"""First: {long}"""\nraise ImportError("must not be imported")\n')
    write("c.py", f'async def f():\n    """{long}"""\n')
    write("site-packages/d.py", f'"""Not ours: {long}"""\n')
    write("broken.py", "def (:\n")
    flat = "A sentence that goes on and on. " + " ".join(["More of it."] * 8)
    assert standard_library_docstrings() == [f"First: {flat}", flat]


def test_an_interpreter_without_sources_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="no sources of the standard library"):
        standard_library_docstrings()


def test_packages_are_parsed_once_for_their_versions(tmp_path, monkeypatch, write):
    long = " ".join(["More of it."] * 8)
    write("calm_first/__init__.py", f'"""First. {long}"""\nraise ImportError("not imported")\n')
    source = write("calm_second/deep/a.py", f'"""Second.\n{long}"""\n')
    write("calm_second/tests/b.py", f'"""No text: {long}"""\n')
    write("calm_second/b.py", f'"""First. {long}"""\n')  # a second time
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(embedded, "PACKAGES", ("calm_first", "calm_none", "calm_second"))
    monkeypatch.setattr(embedded, "PACKAGE_CACHE", tmp_path / "cache" / "calm")
    with pytest.warns(UserNotice) as notices:
        found = package_docstrings()
    assert found == [f"First. {long}", f"Second. {long}"]
    messages = [str(notice.message) for notice in notices]
    assert messages[0] == "embedded:packages: without calm_none: not installed"
    assert messages[1].startswith("embedded:packages: reading 3 source files")
    Path(source).unlink()
    assert package_docstrings() == found  # from the cache, which a damaged one is not
    (cached,) = (tmp_path / "cache" / "calm").iterdir()
    cached.write_text("[", encoding="utf-8")
    with pytest.warns(UserNotice):
        assert package_docstrings() == found[:1]
    stamp = embedded.embedded_stamp("embedded:packages")
    monkeypatch.setattr(embedded, "version", lambda name: "2.0")
    assert embedded.embedded_stamp("embedded:packages") != stamp


@pytest.mark.slow
def test_the_standard_library_has_a_million_characters_of_them():
    found = standard_library_docstrings()
    assert sum(map(len, found)) > 10**6 and len(set(found)) == len(found)


def test_flattening_leaves_sentences():
    docstring = "Sum of two.\n\n    >>> add(1, 2)\n    3\n\n    ------\n    Both are  numbers...\n"
    assert flatten(docstring) == "Sum of two. 3 Both are numbers..."


def test_unknown_corpus_lists_the_known_ones():
    with pytest.raises(UserError, match=r"no corpus 'embedded:poems'.*embedded:topics"):
        load_corpus(CorpusOptions(dataset_name="embedded:poems"))
