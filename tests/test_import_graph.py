"""The import graph sees every way to import a module, on tiny packages written for each test."""

import pytest
from import_graph import circles, import_graph, modules_below

UP = "from small import b\n"  # of a.py: the other half of each circle


def graph_of(tmp_path, files, dispatchers=()):
    """The graph of the package `small` made of these files."""
    for name, source in {"__init__.py": "", **files}.items():
        path = tmp_path / "small" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return import_graph(modules_below(tmp_path / "small"), dict(dispatchers))


WAYS = {
    "top level": "import small.a\n",
    "from the package": "from small import a\n",
    "a name of the module": "from small.a import value\n",
    "inside a function": "def f():\n    from small.a import value\n",
    "inside a method": "class C:\n    def f(self):\n        import small.a\n",
    "for type checkers": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from small.a import A\n"
    ),
    "import_module": "from importlib import import_module\nimport_module('small.a').value\n",
    "importlib.import_module": "import importlib\nimportlib.import_module('small.a')\n",
    "__import__": "def f():\n    return __import__('small.a')\n",
    "an f-string": "import importlib\nname = 'a'\nimportlib.import_module(f'small.{name}')\n",
    "a table": "TABLE = {'a': ('small.a', 'help')}\n",
}


@pytest.mark.parametrize("source", WAYS.values(), ids=WAYS)
def test_a_circle_of_two_is_named_in_order(source, tmp_path):
    graph = graph_of(tmp_path, {"a.py": UP, "b.py": source})
    (circle,) = circles(graph)
    line = graph["small.b"]["small.a"]
    assert circle == f"small.a:1 -> small.b:{line} -> small.a"
    assert not circles(graph_of(tmp_path, {"b.py": "'''Not small.a.'''\n'small.a'\n"}))


def test_a_longer_circle_is_named_in_order(tmp_path):
    files = {
        "a.py": "\nimport small.b\n",
        "b.py": "def f():\n    from small.c import value\n",
        "c.py": "from small.a import value\nimport small.d\n",
        "d.py": "import torch\n",
    }
    expected = ["small.a:2 -> small.b:2 -> small.c:1 -> small.a"]
    assert circles(graph_of(tmp_path, files)) == expected


def test_a_package_may_gather_the_names_of_its_modules(tmp_path):
    files = {
        "deep/__init__.py": "from small.deep.a import value\n",
        "deep/a.py": "from small.deep.b import value\n",
        "deep/b.py": "",
    }
    graph = graph_of(tmp_path, files)
    assert not circles(graph)
    assert set(graph["small.deep"]) == {"small.deep.a"}
    inward = graph_of(tmp_path, files | {"deep/b.py": "from small.deep import value\n"})
    assert "small.deep:1 -> small.deep.a:1 -> small.deep.b:1 -> small.deep" in circles(inward)


def test_a_package_runs_before_its_modules(tmp_path):
    """`a` names only a leaf of `deep`, whose ``__init__`` leads back to `a`."""
    files = {
        "a.py": "from small.deep.leaf import value\n",
        "deep/__init__.py": "from small.deep.rest import value\n",
        "deep/leaf.py": "",
        "deep/rest.py": "from small.a import value\n",
    }
    expected = ["small.a:1 -> small.deep:1 -> small.deep.rest:1 -> small.a"]
    assert circles(graph_of(tmp_path, files)) == expected


UNREADABLE = {
    "a variable": "import_module(name)\n",
    "a sum": "import importlib\nimportlib.import_module('small.' + name)\n",
    "an f-string": "import_module(f'{package}.a')\n",
    "an f-string that begins like no module": "import_module(f'smell.{name}')\n",
    "no argument": "import_module(**options)\n",
    "another name": "from importlib import import_module as load\nload(name)\n",
    "an attribute": "import importlib\nload = importlib.import_module\n",
    "a relative name": "import_module('.c', 'small')\n",
    "a relative import": "from . import c\n",
    "the builtin": "__import__(name)\n",
}


@pytest.mark.parametrize("source", UNREADABLE.values(), ids=UNREADABLE)
def test_a_name_that_cannot_be_read_is_for_dispatchers_only(source, tmp_path):
    files = {"a.py": "from small.b import value\n", "b.py": source}
    with pytest.raises(
        ValueError, match=r"small\.b, line \d: imports a name that is not written out"
    ):
        graph_of(tmp_path, files)
    assert not circles(graph_of(tmp_path, files, {"small.b": None}))


def test_a_dispatcher_imports_the_whole_package_it_names(tmp_path):
    files = {
        "run.py": "import_module(name)\n",
        "all/__init__.py": "",
        "all/one.py": "from small.run import value\n",
        "all/two.py": "",
    }
    graph = graph_of(tmp_path, files, {"small.run": "small.all"})
    assert set(graph["small.run"]) == {"small.all", "small.all.one", "small.all.two"}
    assert circles(graph) == ["small.all.one:1 -> small.run:1 -> small.all.one"]
