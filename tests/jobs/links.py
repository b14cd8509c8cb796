"""A TCP link to a server that can lose an answer, or be down."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Link:
    """`lose`: so many answers are not passed on, and their connections end. `down`: nothing is, either way."""

    url: str = ""
    lose: int = 0
    down: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextlib.contextmanager
def link_to(endpoint: str) -> Iterator[Link]:
    address = urlsplit(endpoint)
    listener = socket.create_server(("127.0.0.1", 0))
    link = Link(f"http://127.0.0.1:{listener.getsockname()[1]}")
    open_sockets: list[socket.socket] = [listener]
    threads: list[threading.Thread] = []

    def carry(source: socket.socket, target: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(2**16):
                with link.lock:
                    drop = link.down or (answers and link.lose > 0)
                    link.lose -= 1 if drop and answers and link.lose else 0
                if drop:
                    break
                target.sendall(part)
        for one in source, target:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            if link.down:
                client.close()
                continue
            server = socket.create_connection((address.hostname or "", address.port or 80))
            open_sockets.extend((client, server))
            for arguments in (client, server, False), (server, client, True):
                thread = threading.Thread(target=carry, args=arguments, daemon=True)
                threads.append(thread)
                thread.start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield link
    finally:
        for one in open_sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        acceptor.join(10)
        for thread in threads:
            thread.join(10)
        for one in open_sockets:
            one.close()
