"""A TCP proxy that breaks connections in every way but one: it never reorders."""

from __future__ import annotations

import collections
import contextlib
import queue
import random
import selectors
import socket
import struct
import threading
import time

from support import wait_for

TICK = 0.005  # s
BUFFERED = 256 * 1024  # bytes a direction; beyond it the sender has to wait
OPENING = 600  # bytes; the handshake, and not what an operator asks for with a key
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST

UP, DOWN = "up", "down"  # towards the server, towards the client


class _Pipe:
    """One direction of one connection."""

    def __init__(self, source, sink, direction):
        self.source = source
        self.sink = sink
        self.direction = direction
        self.pieces = collections.deque()  # (when it may go, bytes)
        self.size = 0  # bytes in all pieces, of which there may be as many
        self.ended = False  # the source said so
        self.deaf = False  # nothing is forwarded any more

    def add(self, due, data, size):
        """Take data that may go at `due`, in pieces of `size` bytes."""
        for start in range(0, len(data), size):
            self.pieces.append((due, data[start : start + size]))
        self.size += len(data)

    def remove(self, count):
        """Let go of bytes of the first piece."""
        due, data = self.pieces.popleft()
        if count < len(data):
            self.pieces.appendleft((due, data[count:]))
        self.size -= count


class _Link:
    """One connection through the proxy."""

    def __init__(self, client, server):
        self.socks = (client, server)
        self.pipes = [_Pipe(client, server, UP), _Pipe(server, client, DOWN)]
        self.opening = b""  # what the client said first
        for sock in self.socks:
            sock.setblocking(False)

    def close(self, *, reset):
        for sock in self.socks:
            if reset:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            sock.close()


class FaultyProxy:
    """Listens on `port`, and hands on what comes to `target`, a port of 127.0.0.1."""

    def __init__(self, target, rng=None):
        self.target = target
        self.connections = 0  # accepted so far
        self.passed = {UP: 0, DOWN: 0}  # bytes
        self.delay = 0.0  # s that each piece is held up
        self.piece = 65536  # bytes; how much is handed on at once
        self._silent = False
        self._rng = rng or random.Random(0)
        self._cut_after = {}  # bytes by direction, until all is cut
        self._links = []
        self._echoes = []  # sockets that repeat what others said
        self._orders = queue.Queue()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="test-proxy")
        self._thread.start()

    # Orders, from any thread; each is carried out when it returns.

    @property
    def silent(self):
        """Whether nothing moves, and nothing is accepted."""
        return self._silent

    @silent.setter
    def silent(self, value):
        self._do(lambda: setattr(self, "_silent", value))

    def cut(self):
        """Reset all connections."""
        self._do(lambda: self._cut_all(reset=True))

    def hang_up(self):
        """End all connections with FIN, with what is on its way lost."""
        self._do(lambda: self._cut_all(reset=False))

    def cut_after(self, count, direction=None):
        """Reset all connections as soon as `count` more bytes have passed."""
        direction = direction or self._rng.choice((UP, DOWN))
        self._do(lambda: self._cut_after.update({direction: count}))

    def wait_until_passed(self, count, direction):
        """Return when `count` more bytes have passed."""
        goal = self.passed[direction] + count
        wait_for(lambda: self.passed[direction] >= goal, 30, f"{count} bytes")

    def wait_until_cut(self, process):
        """Return when what cut_after() asked for has come, or the process has ended."""
        wait_for(
            lambda: not self._cut_after or process.poll() is not None, 30, "the cut"
        )

    def freeze(self):
        """Never again move a byte of the connections there are; others are fine."""

        def freeze():
            for link in self._links:
                for pipe in link.pipes:
                    pipe.deaf = True

        self._do(freeze)

    def halve(self):
        """Never again move a byte in one of the directions of those there are."""
        direction = self._rng.choice((UP, DOWN))

        def halve():
            for link in self._links:
                for pipe in link.pipes:
                    pipe.deaf = pipe.deaf or pipe.direction == direction

        self._do(halve)

    def duplicate(self):
        """Send what began each connection over another one, too."""
        self._do(self._duplicate)

    def heal(self):
        """Let all connections pass from now on; those that never will are reset."""

        def heal():
            self._silent, self.delay, self.piece = False, 0.0, 65536
            self._cut_after.clear()
            for link in list(self._links):
                if any(pipe.deaf for pipe in link.pipes):
                    self._drop(link, reset=True)

        self._do(heal)

    def close(self):
        self._stopped.set()
        self._thread.join()
        self._listener.close()
        for link in self._links:
            link.close(reset=True)
        for echo in self._echoes:
            echo.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _do(self, order):
        done = threading.Event()
        self._orders.put((order, done))
        assert done.wait(60)

    # The thread

    def _run(self):
        while not self._stopped.is_set():
            while not self._orders.empty():
                order, done = self._orders.get()
                order()
                done.set()
            if self._silent:
                time.sleep(TICK)
            else:
                self._move()

    def _move(self):
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            wanted = {}  # by socket: events
            now = time.monotonic()
            for pipe in self._all_pipes():
                if not pipe.ended and pipe.size < BUFFERED:
                    wanted[pipe.source] = (
                        wanted.get(pipe.source, 0) | selectors.EVENT_READ
                    )
                if pipe.pieces and pipe.pieces[0][0] <= now:
                    wanted[pipe.sink] = wanted.get(pipe.sink, 0) | selectors.EVENT_WRITE
            for sock, events in wanted.items():
                selector.register(sock, events)
            ready = {key.fileobj: events for key, events in selector.select(TICK)}
        if self._listener in ready:
            self._accept()
        for link in list(self._links):
            if link in self._links:  # not cut together with one before it
                self._serve(link, ready)

    def _all_pipes(self):
        return [p for link in self._links for p in link.pipes if not p.deaf]

    def _accept(self):
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            self.connections += 1
            try:
                server = socket.create_connection(("127.0.0.1", self.target), 5)
            except OSError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                client.close()
                return
            self._links.append(_Link(client, server))

    def _serve(self, link, ready):
        try:
            for pipe in link.pipes:
                if ready.get(pipe.source, 0) & selectors.EVENT_READ and not pipe.deaf:
                    self._read(link, pipe)
                if ready.get(pipe.sink, 0) & selectors.EVENT_WRITE and not pipe.deaf:
                    self._write(pipe)
                if link not in self._links:
                    return  # the write was the last before a cut
                if pipe.ended and not pipe.pieces:
                    self._drop(link, reset=False)
                    return
        except OSError:
            self._drop(link, reset=True)

    def _read(self, link, pipe):
        if pipe.ended or pipe.size >= BUFFERED:
            return
        data = pipe.source.recv(65536)
        if pipe.direction == UP and len(link.opening) < OPENING:
            link.opening = (link.opening + data)[:OPENING]
        due = time.monotonic() + self.delay
        if not data:
            pipe.ended = True
        pipe.add(due, data, self.piece)

    def _write(self, pipe):
        stop = time.monotonic() + TICK  # the others are served, too
        while pipe.pieces and pipe.pieces[0][0] <= time.monotonic() < stop:
            _, data = pipe.pieces[0]
            limit = self._cut_after.get(pipe.direction)
            try:
                sent = pipe.sink.send(data if limit is None else data[:limit])
            except BlockingIOError:
                return
            self.passed[pipe.direction] += sent
            pipe.remove(sent)
            if limit is not None:
                self._cut_after[pipe.direction] = limit - sent
                if limit == sent:
                    del self._cut_after[pipe.direction]
                    self._cut_all(reset=True)
                    return

    def _duplicate(self):
        for link in self._links:
            with contextlib.suppress(OSError):
                echo = socket.create_connection(("127.0.0.1", self.target), 5)
                self._echoes.append(echo)
                echo.sendall(link.opening)

    def _cut_all(self, *, reset):
        for link in list(self._links):
            self._drop(link, reset=reset)

    def _drop(self, link, *, reset):
        self._links.remove(link)
        link.close(reset=reset)
