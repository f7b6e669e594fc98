"""Errors as OpenAI's clients read them: ``{"error": {message, type, param, code}}``."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi import HTTPException as FastAPIError
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

__all__ = ["APIError", "add_error_handlers", "bad_request", "error_body"]

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
NESTED = ("calm", "stream_options")  # arguments with fields of their own
MAX_SHOWN = 80  # characters of a value that was refused


class APIError(FastAPIError):
    """What the client is told.

    Args:
        status: of HTTP.
        message: a sentence or two.
        param: the argument that it is about.
        code: a word that programs read.
        headers: of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def bad_request(param: str | None, message: str, code: str | None = None) -> APIError:
    """An argument that cannot be served: status 400."""
    return APIError(400, message, param=param, code=code)


def error_body(error: HTTPException) -> dict[str, Any]:
    """The body of the reply, which is also an event of a stream."""
    default = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.detail,
            "type": TYPES.get(error.status_code, default),
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None),
        }
    }


def add_error_handlers(app: FastAPI) -> None:
    """Let every error of the application have OpenAI's shape."""

    async def reply(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse(error_body(error), error.status_code, error.headers)

    async def reply_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return await reply(request, _invalid(error))

    async def reply_fault(request: Request, error: Exception) -> JSONResponse:
        return await reply(request, APIError(500, "a fault of the server; its log says more"))

    app.add_exception_handler(HTTPException, reply)
    app.add_exception_handler(RequestValidationError, reply_invalid)
    app.add_exception_handler(Exception, reply_fault)


def _invalid(error: RequestValidationError) -> APIError:
    """What pydantic found first: which argument, what was expected, what came."""
    first = error.errors()[0]
    names = [name for name in first["loc"][1:] if isinstance(name, str)]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", "")
        return bad_request(None, f"the body is no JSON: {why}")
    if not names:
        return bad_request(None, "the body must be a JSON object, sent as application/json")
    param = names[0]
    place = ".".join(names[:2]) if param in NESTED else param
    if first["type"] == "missing":
        return bad_request(param, f"{param} is missing", "missing_required_parameter")
    shown = repr(first.get("input"))
    shown = shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "..."
    return bad_request(param, f"{place}: {first['msg']}; got {shown}", "invalid_value")
