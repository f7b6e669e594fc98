"""The notebook runs from its first cell to its last, and its page on the site has them all."""

import importlib.util
import json
import time
from pathlib import Path

import pytest
from cli_cases import has_weights

DOCS = Path(__file__).resolve().parents[2] / "docs"
CELLS = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
SECONDS = 40  # of processor time, with the models that come with the package


def run():
    names = {}
    for index, source in enumerate(SOURCES):
        exec(compile(source, f"code cell {index}", "exec"), names)
    return names


def test_it_runs_on_tiny_models(package, capsys):
    names = run()
    assert len(names["names"]) == 200 and abs(sum(names["shares"].values()) - 1) < 1e-4
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("Returns the ") for line in printed) == 6
    assert [line.split()[0] for line in printed[-3:]] == ["head", "readout", "baseline"]


@pytest.mark.long
@pytest.mark.skipif(not has_weights(), reason="this checkout has no weights: make pretrained")
def test_it_is_quick_on_the_real_ones(capsys):
    began = time.process_time()
    names = run()
    assert time.process_time() - began < SECONDS
    assert (names["back"] == names["ids"][0]).float().mean() > 0.95
    assert names["found"].brier_lm > 1


def test_its_page_has_every_cell_and_what_it_printed(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("pages", DOCS / "site" / "pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    text = pages.notebook()
    assert text.count("```python\n") == len(SOURCES)
    assert all(source in text for source in SOURCES)
    printed = {"cell_type": "code", "source": ["print(1)"], "outputs": []}
    printed["outputs"] = [{"name": name, "text": [f"{name}\n"]} for name in ("stderr", "stdout")]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "notebook.ipynb").write_text(json.dumps({"cells": [printed]}))
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.notebook().startswith("```python\nprint(1)\n```\n\n```text\nstdout\n```\n")
