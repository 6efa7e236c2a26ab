"""The same number of bytes over a bare TCP connection: `python -m benchmarks.wire_sides.raw_socket server|client`.

`sendall` of one prepared buffer, whole or in pieces; `recv_into` one buffer that is used again, or a fresh one for
each batch. Both are anonymous memory with huge pages where the system has them, as this project's client's is.
Standard library only.
"""

from __future__ import annotations

import argparse
import mmap
import os
import socket
import threading
from typing import Any

from benchmarks.processes import answer_commands
from benchmarks.wire_sides.clients import time_batches

REQUEST_BYTES = 8
PAGE_BYTES = 2 << 20


def run_server(length: int) -> None:
    """Send the buffer for each request, until there are no more commands."""
    body = memoryview(_buffer(length))
    noise = os.urandom(1 << 20)
    for start in range(0, length, len(noise)):
        part = body[start : start + len(noise)]
        part[:] = noise[: len(part)]
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(listener, body[:length]), daemon=True).start()
    answer_commands({"port": lambda: {"port": listener.getsockname()[1]}})


def run_client(port: int, length: int) -> None:
    """Ask for the buffer until there are no more commands."""
    connection = socket.create_connection(("127.0.0.1", port))
    kept = _buffer(length)

    def receive(buffer: mmap.mmap, piece: int) -> mmap.mmap:
        view = memoryview(buffer)[:length]
        connection.sendall(piece.to_bytes(REQUEST_BYTES, "little"))
        filled = 0
        while filled < length:
            count = connection.recv_into(view[filled : filled + piece])
            if not count:
                raise EOFError(f"the server sent {filled} of {length} bytes")
            filled += count
        return buffer

    def run_batches(count: int, hold: int, *, fresh: bool, piece: int) -> dict[str, Any]:
        def generate() -> mmap.mmap:
            return receive(_buffer(length) if fresh else kept, piece or length)

        return {"seconds": time_batches(generate, count=count, hold=hold), "bytes": length}

    answer_commands({"batches": run_batches})
    connection.close()


def _buffer(length: int) -> mmap.mmap:
    block = mmap.mmap(-1, -(-length // PAGE_BYTES) * PAGE_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _serve(listener: socket.socket, body: memoryview) -> None:
    connection, _ = listener.accept()
    while request := connection.recv(REQUEST_BYTES, socket.MSG_WAITALL):
        piece = int.from_bytes(request, "little")
        for start in range(0, len(body), piece):
            connection.sendall(body[start : start + piece])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("server").add_argument("length", type=int)
    client = commands.add_parser("client")
    client.add_argument("port", type=int)
    client.add_argument("length", type=int)
    arguments = parser.parse_args()
    if arguments.command == "server":
        run_server(arguments.length)
    else:
        run_client(arguments.port, arguments.length)


if __name__ == "__main__":
    main()
