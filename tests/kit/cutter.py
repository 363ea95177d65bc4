"""A relay between a client and a Unix socket that cuts its connections: at random moments, or when it is told to."""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self


class Cutter:
    """Listens at ``path`` and passes everything on to ``target`` and back, in a thread of its own.

    ``mean`` (bytes, both ways together): how much passes on average until all connections are cut, in the middle of whatever
    it is; 0: only `cut` does. ``cuts`` counts. Leaving the context closes everything.
    """

    def __init__(self, path: Path, target: Path, *, mean: int = 0, seed: int = 1) -> None:
        self.cuts = 0
        self._target = target
        self._mean = mean
        self._random = random.Random(seed)
        self._left = self._next()
        self._links: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._bell, self._ears = socket.socketpair()
        self._selector.register(self._ears, selectors.EVENT_READ)
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Cut every connection now; new ones are taken."""
        self._bell.send(b"c")

    def _next(self) -> float:
        return self._random.expovariate(1 / self._mean) if self._mean else float("inf")

    def _run(self) -> None:
        while not self._ended:
            for key, _ in self._selector.select():
                one = key.fileobj
                assert isinstance(one, socket.socket)
                if one is self._ears:
                    self._ended = self._ended or one.recv(1) == b"e"
                    self._drop()
                elif one is self._listener:
                    self._accept()
                elif one in self._links:
                    self._pass(one)
        self._drop()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            server.connect(str(self._target))
        except OSError:
            server.close()
            client.close()
            return
        for one, other in ((client, server), (server, client)):
            self._links[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass(self, one: socket.socket) -> None:
        other = self._links[one]
        try:
            data = one.recv(1 << 16)
            part = data[: int(self._left)] if len(data) > self._left else data
            other.sendall(part)
        except OSError:
            data = b""
        self._left -= len(data)
        if not data:
            self._close(one)
        elif self._left <= 0:
            self._drop()

    def _drop(self) -> None:
        self.cuts += bool(self._links)
        self._left = self._next()
        for one in list(self._links):
            if one in self._links:
                self._close(one)

    def _close(self, one: socket.socket) -> None:
        other = self._links.pop(one)
        self._links.pop(other, None)
        for end in (one, other):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(end)
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bell.send(b"e")
        self._thread.join()
        self._listener.close()
        self._bell.close()
        self._ears.close()
        self._selector.close()
