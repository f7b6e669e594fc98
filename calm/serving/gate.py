"""What a request must pass before it is read: the key, and bounds on its body."""

import asyncio
import hmac

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calm.serving.errors import APIError, error_body

__all__ = ["Gate"]

PROTECTED = "/v1/"


class Gate:
    """ASGI middleware.

    Args:
        app: behind it.
        api_key: that requests to ``/v1/`` must bring, or None.
        max_body: bytes of a body at most.
        body_seconds: in which a body must arrive.
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, max_body: int, body_seconds: float
    ) -> None:
        self.app, self.api_key = app, api_key
        self.max_body, self.body_seconds = max_body, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or hand on, as ASGI asks for."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        error = self._refusal(scope["path"], Headers(scope=scope))
        if error is not None:
            response = JSONResponse(error_body(error), error.status_code, error.headers)
            return await response(scope, receive, send)
        return await self.app(scope, _Bounded(self, receive), send)

    def too_large(self) -> APIError:
        """A body beyond the bound."""
        return APIError(413, f"the body is larger than {self.max_body} bytes")

    def _refusal(self, path: str, headers: Headers) -> APIError | None:
        if self.api_key is not None and path.startswith(PROTECTED):
            given = headers.get("authorization", "")
            wanted = f"Bearer {self.api_key}"
            if not hmac.compare_digest(given.encode(), wanted.encode()):
                hint = {"WWW-Authenticate": "Bearer"}
                message = "this server needs its API key, as `Authorization: Bearer KEY`"
                return APIError(401, message, code="invalid_api_key", headers=hint)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.max_body:
            return self.too_large()
        return None


class _Bounded:
    """`receive` of one request: its body must arrive in time, and must not be too large."""

    def __init__(self, gate: Gate, receive: Receive) -> None:
        self.gate, self.receive = gate, receive
        self.size, self.is_complete = 0, False
        self.deadline = asyncio.get_running_loop().time() + gate.body_seconds

    async def __call__(self) -> Message:
        """The next message; once the body is complete, whatever comes whenever."""
        if self.is_complete:
            return await self.receive()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.receive()
        except TimeoutError:
            seconds = self.gate.body_seconds
            raise APIError(408, f"the body took longer than {seconds:g} seconds") from None
        self.size += len(message.get("body", b""))
        self.is_complete = not message.get("more_body", False)
        if self.size > self.gate.max_body:
            raise self.gate.too_large()
        return message
