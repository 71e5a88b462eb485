"""A WebSocket echo, for conformance suites and benchmarks: moltis' own and no more.

python3 tests/echo_peer.py server [--port N]   echo every message, on any path
python3 tests/echo_peer.py client URL          echo until the other side closes
"""

from __future__ import annotations

import argparse
import contextlib
import email
import socket
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import moltis


def echo(ws):
    """Send every message back until the connection ends, however it does."""
    with contextlib.suppress(moltis.ConnectionClosed), ws:
        while True:
            message = ws.receive()
            if message is None:
                return
            ws.send(message)
            ws.flush()  # so that a peer that reads slowly is waited for, not dropped


def read_request(sock):
    """Return a request's headers, and what came after them."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(4096)
        if not piece:
            raise moltis.HandshakeError(400, "no request")
        data += piece
    head, _, early = data.partition(b"\r\n\r\n")
    return email.message_from_bytes(head.partition(b"\r\n")[2]), early


def accept(sock):
    """Return the WebSocket that a client asks for on `sock`."""
    headers, early = read_request(sock)
    fields = moltis.accept_upgrade(headers)
    lines = ["HTTP/1.1 101 Switching Protocols"]
    lines += [f"{name}: {value}" for name, value in fields]
    sock.sendall("\r\n".join([*lines, "", ""]).encode())
    return moltis.WebSocket(sock, moltis.WebSocketProtocol(client=False), early=early)


def serve_one(sock):
    with sock, contextlib.suppress(OSError, moltis.HandshakeError):
        echo(accept(sock))


def serve(port):
    with socket.create_server(("127.0.0.1", port), backlog=128) as listener:
        print(f"ws://127.0.0.1:{listener.getsockname()[1]}/", flush=True)
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=serve_one, args=(sock,), daemon=True).start()


def main():
    parser = argparse.ArgumentParser(description="a WebSocket echo")
    parser.add_argument("role", choices=("server", "client"))
    parser.add_argument("url", nargs="?", help="where a client connects to")
    parser.add_argument("--port", type=int, default=0, help="of a server; 0: any")
    args = parser.parse_args()
    if args.role == "client":
        if not args.url:
            parser.error("a client needs a URL")
        echo(moltis.connect(args.url))
        return
    with contextlib.suppress(KeyboardInterrupt):
        serve(args.port)


if __name__ == "__main__":
    main()
