"""The routes, see docs/serving.md."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from calm.serving.errors import APIError, add_error_handlers
from calm.serving.gate import Gate
from calm.serving.models import ServedModel, Settings
from calm.serving.replies import Reply, model_object
from calm.serving.requests import CompleteReply, Mailbox, StreamedReply
from calm.serving.schema import ChatRequest, CompletionRequest, TextRequest
from calm.serving.static import add_page
from calm.serving.texts import WrittenText
from calm.serving.worker import Worker

__all__ = ["Access", "make_app"]

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as in OpenAI's


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask, and how long it may take.

    Attributes:
        api_key: that requests must bring, or None.
        max_body: bytes of a request at most.
        body_seconds: in which a request must arrive.
        read_seconds: in which a client must read an event of a stream.
    """

    api_key: str | None = None
    max_body: int = 1 << 20
    body_seconds: float = 30.0
    read_seconds: float = 60.0


@dataclass
class _Service:
    """What the routes share."""

    models: dict[str, ServedModel]
    worker: Worker
    reader: ThreadPoolExecutor  # one thread: tokenizers keep settings from call to call
    access: Access

    def find(self, name: str) -> ServedModel:
        """The model of this name.

        Raises:
            APIError: there is none.
        """
        if name not in self.models:
            raise APIError(
                404,
                f"no model {name!r} is served here; there is {', '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    async def answer(
        self,
        request: TextRequest,
        max_tokens: int | None,
        read: Callable[[ServedModel], list[list[int]]],
        *,
        is_chat: bool,
    ) -> Response:
        """Queue the texts of a request. `read` gives the ids of its prompts."""
        served, mailbox = self.find(request.model), Mailbox()

        def prepare() -> tuple[Settings, list[list[int]], Sequence[WrittenText]]:
            settings = served.settings(request)
            prompts = read(served)
            texts = served.texts(prompts, request, settings, max_tokens, mailbox.send)
            return settings, prompts, texts

        found = await asyncio.get_running_loop().run_in_executor(self.reader, prepare)
        settings, prompts, mailbox.texts = found
        self.worker.submit(served.lane, mailbox.texts)
        reply = Reply(
            served,
            settings,
            num_texts=len(mailbox.texts),
            prompt_tokens=sum(map(len, prompts)),
            is_chat=is_chat,
            has_votes=request.candidates is not None,
            is_stream=bool(request.stream),
        )
        if not request.stream:
            return CompleteReply(mailbox, reply)
        options = request.stream_options
        return StreamedReply(
            mailbox,
            reply,
            has_usage=bool(options and options.include_usage),
            timeout=self.access.read_seconds,
        )


def make_app(models: Sequence[ServedModel], access: Access | None = None) -> FastAPI:
    """The application; its worker runs while the server does.

    Args:
        models: with different names.
        access: who may ask.
    """
    access = access or Access()
    service = _Service(
        {served.name: served for served in models},
        Worker([served.lane for served in models]),
        ThreadPoolExecutor(1, "calm-reader"),
        access,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)
        service.reader.shutdown(cancel_futures=True)

    # No pages that load scripts from elsewhere.
    app = FastAPI(title="calm", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(
        Gate, api_key=access.api_key, max_body=access.max_body, body_seconds=access.body_seconds
    )
    add_error_handlers(app)
    _add_routes(app, service)
    add_page(app)
    return app


def _add_routes(app: FastAPI, service: _Service) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        texts = {name: {"active": len(served.lane.active), "waiting": len(served.lane.waiting)}
                 for name, served in service.models.items()}  # fmt: skip
        is_alive = service.worker.is_alive
        body = {"status": "ok" if is_alive else "stopping", "texts": texts}
        return JSONResponse(body, 200 if is_alive else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_object(m) for m in service.models.values()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        return model_object(service.find(name))

    @app.post("/v1/completions", response_model=None)
    async def completions(request: CompletionRequest) -> Response:
        return await service.answer(
            request,
            request.max_tokens or DEFAULT_MAX_TOKENS,
            lambda served: served.completion_prompts(request),
            is_chat=False,
        )

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: ChatRequest) -> Response:
        return await service.answer(
            request,
            request.max_completion_tokens or request.max_tokens,
            lambda served: [served.chat_prompt(request)],
            is_chat=True,
        )
