"""The server process: its socket, and an end that lets texts be finished."""

import asyncio
import ipaddress
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from calm.errors import UserError

__all__ = ["Server", "bind", "is_loopback", "make_server"]

KEEP_ALIVE_SECONDS = 30


class Server(uvicorn.Server):
    """uvicorn's server, which here ends with success after Ctrl-C or a TERM signal.

    The first signal closes the socket to new connections and lets texts be finished, for a time;
    the second, if it is Ctrl-C, ends at once.
    """

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the server runs; uvicorn would raise them again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are for the main thread
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Protocol(H11Protocol):
    """uvicorn's protocol of a connection, which here waits a time only for the head of a request.

    uvicorn bounds the time between two requests, until the first byte of the next. Here the rest of
    that head, and the head of the first request, have the same time.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """A client has connected, and sent nothing yet."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """More of a request, or the first of the next."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._stop_watching()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        """Give a head its time from its first wait on, however it trickles in."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()  # the head is complete
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.timeout_keep_alive, self.transport.close)

    def _stop_watching(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def make_server(
    app: FastAPI,
    *,
    shutdown_seconds: int,
    logs_access: bool = False,
    idle_seconds: int = KEEP_ALIVE_SECONDS,
) -> Server:
    """A server of `app`; `run(sockets=[bind(...)])` runs it.

    Args:
        app: of `calm.serving.app.make_app`.
        shutdown_seconds: for texts that are being written, after the first signal.
        logs_access: a line on standard output for each request.
        idle_seconds: that a connection may wait for a request, and for its head to be complete.
    """
    return Server(
        uvicorn.Config(
            app,
            http=_Protocol,
            log_level="info" if logs_access else "warning",
            access_log=logs_access,
            timeout_keep_alive=idle_seconds,
            timeout_graceful_shutdown=shutdown_seconds,
            lifespan="on",
            ws="none",
        )
    )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket at this address; who connects waits until a server runs.

    Raises:
        UserError: another program has the port, or this machine has no such address.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind)
    except OSError as error:
        raise UserError(f"--host {host}: no such address ({error})") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()
    except OSError as error:
        sock.close()
        raise UserError(
            f"--port {port}: cannot be used on {host} ({error.strerror}); choose another, or 0 for "
            "any that is free"
        ) from error
    return sock


def is_loopback(sock: socket.socket) -> bool:
    """Whether this machine alone can reach it."""
    return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback
