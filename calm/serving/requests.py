"""One request from its arrival to its end: texts are queued, their pieces received and sent on.

The worker's thread hands pieces over; everything else here runs in the event loop and never waits
for a model. Whatever ends a request early (the client is gone, it reads too slowly, the server
stops) cancels its texts, and the worker frees their slots before its next step.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress

from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from calm.serving.errors import APIError, error_body
from calm.serving.replies import DONE, Reply, event
from calm.serving.texts import Piece, WrittenText

__all__ = ["CompleteReply", "Mailbox", "StreamedReply"]


class Mailbox:
    """Where the worker's thread leaves the pieces of one request."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self.texts: Sequence[WrittenText] = ()

    def send(self, index: int, piece: Piece | Exception) -> None:
        """Leave a piece of text `index`; called in any thread."""
        with suppress(RuntimeError):  # the loop has ended, and nobody reads
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of all texts as they come, until all have ended.

        Raises:
            Exception: what ended a text.
        """
        unfinished = len(self.texts)
        while unfinished:
            index, piece = await self._queue.get()
            if isinstance(piece, Exception):
                raise piece
            unfinished -= piece.finish_reason is not None
            yield index, piece

    def cancel(self) -> None:
        """Nobody waits for the texts any more."""
        for text in self.texts:
            text.is_cancelled = True


class _Watched(Response):
    """A reply that ends early when the client goes away; its texts are then cancelled.

    Args:
        mailbox: of the request.
        reply: to fill.
    """

    def __init__(self, mailbox: Mailbox, reply: Reply) -> None:
        super().__init__()
        self.mailbox, self.reply = mailbox, reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as ASGI asks for."""
        answer = asyncio.create_task(self._answer(scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            self.mailbox.cancel()
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class CompleteReply(_Watched):
    """All texts in one JSON object."""

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for index, piece in self.mailbox.pieces():
                self.reply.add(index, piece)
        except Exception as error:
            failure = _as_api_error(error)
            response = JSONResponse(error_body(failure), failure.status_code)
        else:
            response = JSONResponse(self.reply.whole())
        await response(scope, receive, send)


class StreamedReply(_Watched):
    """Server-sent events, one a chunk.

    Args:
        mailbox: of the request.
        reply: to fill.
        has_usage: end with an event of the tokens used.
        timeout: seconds that the client may take to read an event.
    """

    def __init__(self, mailbox: Mailbox, reply: Reply, *, has_usage: bool, timeout: float) -> None:
        super().__init__(mailbox, reply)
        self.has_usage, self.timeout = has_usage, timeout

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"),
                   (b"cache-control", b"no-cache")]  # fmt: skip
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        with suppress(TimeoutError):  # a client that does not read has its connection closed
            await self._send(send, start)
            async for text in self._events():
                body = {"type": "http.response.body", "body": text.encode(), "more_body": True}
                await self._send(send, body)
            await self._send(send, {"type": "http.response.body", "body": b""})

    async def _send(self, send: Callable[[Message], Awaitable[None]], message: Message) -> None:
        await asyncio.wait_for(send(message), self.timeout)

    async def _events(self) -> AsyncIterator[str]:
        try:
            async for index, piece in self.mailbox.pieces():
                yield event(self.reply.add(index, piece))
        except Exception as error:  # the status has been sent: the error is an event
            yield event(error_body(_as_api_error(error)))
            return
        if self.has_usage:
            yield event(self.reply.usage_event())
        yield DONE


async def _disconnected(receive: Receive) -> None:
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _as_api_error(error: Exception) -> APIError:
    """What ended a text, for its reader: a `UserError` is about the model's own numbers."""
    return error if isinstance(error, APIError) else APIError(500, str(error))
