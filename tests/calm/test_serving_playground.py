"""The page at `/` without a browser: its files, their headers, and that they are installed."""

import asyncio
import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from serving_cases import client_of, error_of, running, served
from setuptools import Distribution

from calm.serving import static
from calm.serving.app import Access
from calm.serving.errors import APIError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "calm" / "serving" / "playground"
FILES = {
    "api.js": "text/javascript; charset=utf-8",
    "column.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "index.html": "text/html; charset=utf-8",
    "main.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "vote.js": "text/javascript; charset=utf-8",
}
# What a page may name: an attribute of HTML, an import, a URL in CSS.
REFERENCE = re.compile(r"""(?:src|href)="([^"]+)"|from "([^"]+)"|url\(([^)]+)\)""")


@pytest.fixture(scope="module")
def http():
    """A server that asks for a key, which the page itself does not need."""
    with running([served()], Access(api_key="secret")) as url, client_of(url) as client:
        yield client


def test_every_file_is_served_as_it_is(http):
    assert {path.name for path in FOLDER.iterdir()} == set(FILES)
    for name, kind in FILES.items():
        response = http.get("/" if name == "index.html" else f"/playground/{name}")
        assert response.status_code == 200 and response.headers["content-type"] == kind
        assert response.content == (FOLDER / name).read_bytes()


def test_the_browser_is_told_to_load_nothing_else(http):
    for path in ("/", "/playground/main.js"):
        headers = http.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy.pop("default-src") == "'none'"
        own = [policy.pop(name) for name in ("script-src", "style-src", "img-src", "connect-src")]
        assert own == ["'self'"] * 4 and set(policy.values()) == {"'none'"}
        assert headers["x-content-type-options"] == "nosniff"


def test_the_page_names_files_of_its_own_alone(http):
    """Each as a relative path that is served; nothing is inline, which the policy would block."""
    found = set()
    for name in FILES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        base = "/" if name == "index.html" else "/playground/"
        for match in REFERENCE.finditer(text):
            target = next(filter(None, match.groups())).removeprefix("./")
            assert http.get(base + target).status_code == 200, f"{name}: {target}"
            found.add(target.removeprefix("playground/"))
    assert found == set(FILES) - {"index.html"}
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=)", page)


@pytest.mark.parametrize("name", ["nothing.js", "..%2fapp.py", "__init__.py"])
def test_no_other_file_is_served(http, name):
    assert error_of(http.get(f"/playground/{name}"), 404)["type"] == "not_found_error"


def test_what_else_lies_in_the_folder_is_no_part_of_the_page(monkeypatch, tmp_path):
    """A folder, an editor's backup and its lock, a link to nothing."""
    place = tmp_path / "playground"
    (place / "old.js").mkdir(parents=True)
    (place / ".#main.js").symlink_to("nobody@nowhere")
    for name in ("main.js", "main.js~"):
        (place / name).write_text(name)
    monkeypatch.setattr(static, "files", lambda package: tmp_path)
    static.add_page(app := FastAPI())
    routes = [route for route in app.routes if route.path == "/playground/{name}"]
    (asset,) = (route.endpoint for route in routes)
    assert asyncio.run(asset("main.js")).body == b"main.js"
    for name in ("main.js~", "old.js", ".#main.js"):
        with pytest.raises(APIError, match="the playground has no file"):
            asyncio.run(asset(name))


def test_labels_and_elements_that_scripts_look_for_are_there():
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\bfor="([^"]+)"', page)) <= set(ids)
    script = (FOLDER / "main.js").read_text(encoding="utf-8")
    lists = re.findall(r"\[([^\[\]]*)\]\.map\(\s*\(id\)", script)
    named = re.findall(r'"([^"]+)"', " ".join(lists))
    assert len(lists) == 2 and set(named) <= set(ids)


def test_the_wheel_holds_the_page(monkeypatch):
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files()
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    command.manifest_files = {}  # nothing but what pyproject.toml names
    found = command.find_data_files("calm", "calm")
    assert {f"calm/serving/playground/{name}" for name in FILES} <= set(found)
