"""The page at ``/``: a playground on the server's own interface, in `playground/`.

Its files are served as they are. They need no key, and hold nothing of the models: the page asks
``/v1/`` like any client.
"""

from importlib.resources import files
from pathlib import PurePath

from fastapi import FastAPI, Response

from calm.serving.errors import APIError

__all__ = ["add_page"]

INDEX = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere, nothing inline, and no page around this one.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Add ``/`` and ``/playground/FILE``."""
    folder = files("calm.serving") / "playground"
    contents = {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.is_file() and PurePath(file.name).suffix in TYPES  # no folder, no editor's backup
    }

    def reply(name: str) -> Response:
        if name not in contents:
            raise APIError(404, f"the playground has no file {name!r}")
        kind = TYPES[PurePath(name).suffix]
        return Response(contents[name], media_type=kind, headers=HEADERS)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return reply(INDEX)

    @app.get("/playground/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        return reply(name)
