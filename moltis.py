#!/usr/bin/env python3
"""moltis: one file that makes many machines usable from one place.

    browser / CLI / MCP client --HTTP + WebSocket--> gateway <--WebSocket-- node, node, ...

A **gateway** serves a chat in which an AI agent, a person or a script runs shell
commands on any connected machine.  A **node** is any machine that dials out to the
gateway with a device token.  Standard library only, Python 3.8+, Linux and macOS.

    python3 moltis.py gateway                                 # start here
    python3 moltis.py node generate-token --name "Pi"         # what to run on the Pi
    python3 moltis.py node exec Pi -- uptime

The file reads from top to bottom: a section uses only sections above it, and its
banner names them (all may use the first two).  `tests/test_layout.py` holds it to
that.

Contents

  Foundation
    Constants and errors      limits with unit and source; every exception
    Helpers                   time, ids, JSON, private files, redaction
    Settings                  node.json, gateway.json and where they live
  WebSocket
    WebSocket frames          bytes to frames and back
    WebSocket handshake       the HTTP exchange that opens a connection
    WebSocket protocol        one connection as a state machine, without I/O
    WebSocket connections     the same over a socket, safe from any thread
  Between gateway and node
    SCRAM                     both halves of RFC 5802 / RFC 7677
    Wire protocol             envelopes, output chunks, calls awaiting an answer
    Commands                  one shell command as a process group
    Telemetry                 what a machine has and how it is doing
    Language models           Ollama, OpenAI-compatible, Anthropic
  Node
    Node agent                dial, authenticate, serve, reconnect, resume
    Node service              systemd user unit and launchd agent
  Gateway
    Store                     SQLite; one method a question
    Access                    callers, scopes, tokens, sign-ins, limits
    Fleet                     connected nodes, their invocations and their fate
    Agent                     tools, the loop, approvals, the built-in Shell
    Gateway                   RPC methods, events, chat runs
    MCP                       the same tools for Model Context Protocol clients
    HTTP                      routes, upgrade, headers
    Web page                  three raw strings, served as three files
  Program
    Command line              argparse, output, exit codes, main()
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import random
import re
import secrets
import stat
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Mapping

# ==============================================================================
# FOUNDATION
# ==============================================================================

# ==============================================================================
# Constants and errors
#
# Limits with their unit and their source, and every exception raised on purpose.
# ==============================================================================

__version__ = "0.1.0"

PROTOCOL_VERSION = 4  # of Moltis' wire protocol; the only one spoken

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 69  # EX_UNAVAILABLE of sysexits.h
EXIT_REFUSED = 77  # EX_NOPERM
EXIT_CONFIGURATION = 78  # EX_CONFIG

MAX_PAYLOAD = 512 * 1024  # bytes; a frame that Moltis gateways accept (protocol 4)
MAX_BUFFERED = 3 * MAX_PAYLOAD  # bytes; what a Moltis gateway announces with it
MAX_MESSAGE = 64 * 1024 * 1024  # bytes; a WebSocket message, unless told otherwise
MAX_CHUNK = 64 * 1024  # bytes of command output in one binary message
STREAM_WINDOW = 1024 * 1024  # bytes of a stream sent and not yet acknowledged
MAX_JSON_DEPTH = 64  # brackets within brackets; ours nest less than ten

CONNECT_TIMEOUT = 10.0  # s; to finish a handshake, and to say `connect` after it
PING_INTERVAL = 20.0  # s; both ways
PEER_TIMEOUT = 60.0  # s of silence after which a peer is gone
TELEMETRY_INTERVAL = 30.0  # s; what Moltis' protocol promises
KILL_AFTER = 2.0  # s from SIGTERM to SIGKILL
DRAIN_AFTER_EXIT = 0.5  # s for output that a grandchild still holds open


class MoltisError(Exception):
    """The root of all that this program raises on purpose."""


class UserError(MoltisError):
    """Something the person at the command line can mend: one sentence for them."""

    exit_code = EXIT_FAILURE


class UsageError(UserError):
    """The command line does not say what to do."""

    exit_code = EXIT_USAGE


class Unreachable(UserError):
    """Nobody answers at the address, or not in our language: try later or elsewhere."""

    exit_code = EXIT_UNREACHABLE


class Refused(UserError):
    """The other side answered, and does not let us in: get another credential."""

    exit_code = EXIT_REFUSED


class BadConfiguration(UserError):
    """A file or a setting of ours cannot be used: mend it."""

    exit_code = EXIT_CONFIGURATION


class ProtocolError(MoltisError):
    """The peer broke RFC 6455: fail the connection with `close_code`."""

    def __init__(self, close_code: int, reason: str) -> None:
        super().__init__(reason)
        self.close_code = close_code


class HandshakeError(MoltisError):
    """The opening handshake failed: answer, or report, HTTP `status`."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ConnectionClosed(MoltisError):
    """The WebSocket is closed: nothing more can be sent or received."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"connection closed ({code}{' ' if reason else ''}{reason})")
        self.code = code
        self.reason = reason


class AuthenticationError(MoltisError):
    """The peer did not prove who it is: close the connection."""


class RpcError(MoltisError):
    """A request that cannot be answered: send it back as an error Response.

    `code` is one of Moltis' (INVALID_REQUEST, NOT_FOUND, UNAVAILABLE, ...).
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        details: object = None,
        retryable: bool | None = None,
        retry_after: float | None = None,  # s
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details
        self.retryable = retryable
        self.retry_after = retry_after


# ==============================================================================
# Helpers
# Uses: Constants and errors
#
# What every section needs and nobody would look for anywhere else.
# ==============================================================================

log = logging.getLogger("moltis")

JsonObject = Dict[str, Any]

SECRET_PATTERN = re.compile(r"\b(mdt|mk|mc)_[A-Za-z0-9_-]{8,}")


def now_ms() -> int:
    """Return the time of day in ms since 1970, as envelopes and the store have it."""
    return round(time.time() * 1000)


def new_id() -> str:
    return str(uuid.uuid4())


def new_secret(prefix: str) -> str:
    """Return `prefix` and 32 random bytes in base64url without padding."""
    return prefix + secrets.token_urlsafe(32)


def redact(text: str) -> str:
    """Return `text` with the secret part of our tokens, keys and codes cut out."""
    return SECRET_PATTERN.sub(r"\1_…", text)


def b64encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def to_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def from_json(text: str | bytes) -> Any:
    """Return the value that `text` holds.  Raises ValueError, and nothing else."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if _depth_exceeds(value, MAX_JSON_DEPTH):
        raise ValueError(f"JSON nested more than {MAX_JSON_DEPTH} deep")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _depth_exceeds(value: object, limit: int) -> bool:
    # Level by level: a value that json could just parse must not exhaust our stack.
    level = [value]
    for _ in range(limit):
        containers = [v for v in level if isinstance(v, (dict, list))]
        if not containers:
            return False
        level = []
        for container in containers:
            level.extend(
                container.values() if isinstance(container, dict) else container
            )
    return any(isinstance(v, (dict, list)) for v in level)


JSON_KINDS: Mapping[type, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "an array",
    type(None): "null",
}


def required(params: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return `params[name]`, which has to be of the JSON type `kind`.

    `float` takes whole numbers too.  Raises RpcError INVALID_REQUEST.
    """
    value = optional(params, name, kind)
    if value is None:
        raise RpcError("INVALID_REQUEST", f"{name} is missing: {JSON_KINDS[kind]}")
    return value


def optional(params: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return `params[name]`, or None where it is absent or null.

    Raises RpcError INVALID_REQUEST for a value of another type.
    """
    value = params.get(name)
    if value is None:
        return None
    accepted = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, accepted):
        found = JSON_KINDS.get(type(value), type(value).__name__)
        raise RpcError(
            "INVALID_REQUEST", f"{name} must be {JSON_KINDS[kind]}, not {found}"
        )
    return value


def clip(text: str, limit: int) -> str:
    """Return `text`, or its head and tail with the number of characters cut."""
    if len(text) <= limit:
        return text
    head = limit // 2
    tail = limit - head
    cut = len(text) - limit
    return f"{text[:head]}\n… {cut:,} characters cut …\n{text[len(text) - tail :]}"


def format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_duration(seconds: float) -> str:
    """Return `seconds` for people: 0.3 s, 42 s, 3 min, 5 h, 12 d."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for size, unit in ((86400 * 2, "d"), (3600 * 2, "h"), (60 * 2, "min")):
        if seconds >= size:
            return f"{seconds // (size // 2):.0f} {unit}"
    return f"{seconds:.0f} s"


class Deadline:
    """A moment on the monotonic clock, or never."""

    def __init__(self, timeout: float | None) -> None:  # s from now
        self._at = None if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float | None:
        """Return the seconds left, at least 0; None means for ever."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())

    @property
    def expired(self) -> bool:
        return self._at is not None and time.monotonic() >= self._at


class Backoff:
    """Growing pauses between attempts, with full jitter so that many spread out."""

    def __init__(self, first: float = 1.0, limit: float = 60.0) -> None:  # s
        self._first = first
        self._limit = limit
        self._attempts = 0

    def next(self) -> float:
        """Return the seconds to wait before the next attempt."""
        # The exponent is bounded: 2 ** 1100 would overflow a float.
        ceiling = min(self._limit, self._first * 2 ** min(self._attempts, 32))
        self._attempts += 1
        return random.uniform(self._first / 2, max(ceiling, self._first))

    def reset(self) -> None:
        self._attempts = 0


class Ticker:
    """A thread that calls `action` every `interval` seconds until it is closed."""

    def __init__(
        self, interval: float, action: Callable[[], None], name: str = "moltis-tick"
    ) -> None:
        self._interval = interval
        self._action = action
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self._action()
            except Exception:
                # A tick that fails must not end all that come after it.
                log.exception("tick failed thread=%s", self._thread.name)


def make_private_directory(path: Path) -> None:
    """Make `path` for its owner alone.  Raises BadConfiguration."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise BadConfiguration(
            f"cannot use the directory {path}: {error.strerror}; "
            "choose another with MOLTIS_DATA_DIR"
        ) from error


def write_private(path: Path, data: bytes) -> None:
    """Replace the file `path` in one step, readable by its owner alone.

    A crash leaves the old file or the new one, never half of it.
    Raises BadConfiguration.
    """
    make_private_directory(path.parent)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise BadConfiguration(f"cannot write {path}: {error.strerror}") from error


# ==============================================================================
# Settings
# Uses: Constants and errors, Helpers
#
# What a machine remembers between runs: `node.json` and `gateway.json` in the data
# directory.  Which flag beats which variable is said by the command line.
# ==============================================================================


def data_directory(environ: Mapping[str, str]) -> Path:
    """Return the directory for all our files: MOLTIS_DATA_DIR, or ~/.moltis."""
    chosen = environ.get("MOLTIS_DATA_DIR")
    return Path(chosen).expanduser() if chosen else Path.home() / ".moltis"


def read_settings_file(path: Path) -> JsonObject | None:
    """Return the object in a JSON file, or None where there is no such file.

    Raises BadConfiguration when it is there and cannot be used.
    """
    try:
        value = from_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadConfiguration(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadConfiguration(f"{path} is not JSON ({error}); mend or delete it") from (
            error
        )
    if not isinstance(value, dict):
        raise BadConfiguration(f"{path} must hold a JSON object; mend or delete it")
    return value


def _settings_field(path: Path, value: JsonObject, name: str, kind: type) -> Any:
    try:
        return optional(value, name, kind)
    except RpcError as error:
        raise BadConfiguration(f"{path}: {error.message}") from error


@dataclass(frozen=True)
class NodeSettings:
    """What `node.json` holds: how this machine reaches its gateway, and as whom."""

    gateway_url: str  # ws:// or wss://, with the path
    device_token: str
    node_id: str
    display_name: str
    working_dir: str | None = None
    timeout: float | None = None  # s; a maximum that no caller exceeds
    auth: str = "scram"  # or "bearer", for Moltis gateways

    FILE = "node.json"

    @classmethod
    def load(cls, directory: Path) -> NodeSettings | None:
        """Return the settings, or None where this machine is no node.

        Raises BadConfiguration.
        """
        path = directory / cls.FILE
        value = read_settings_file(path)
        if value is None:
            return None
        texts = {}
        for name in ("gateway_url", "device_token", "node_id", "display_name"):
            text = _settings_field(path, value, name, str)
            if not text:
                raise BadConfiguration(f"{path}: {name} is missing")
            texts[name] = text
        return cls(
            **texts,
            working_dir=_settings_field(path, value, "working_dir", str) or None,
            timeout=_settings_field(path, value, "timeout", float),
            auth=_settings_field(path, value, "auth", str) or "scram",
        )

    def save(self, directory: Path) -> None:
        """Write node.json.  Raises BadConfiguration."""
        value = {
            "gateway_url": self.gateway_url,
            "device_token": self.device_token,
            "node_id": self.node_id,
            "display_name": self.display_name,
            "working_dir": self.working_dir,
            "timeout": self.timeout,
            "auth": self.auth,
        }
        text = json.dumps({k: v for k, v in value.items() if v is not None}, indent=2)
        write_private(directory / self.FILE, (text + "\n").encode("utf-8"))


@dataclass(frozen=True)
class GatewayFile:
    """What `gateway.json` holds: how programs of the same user reach the gateway."""

    url: str  # http:// or https://, without a path
    api_key: str
    pid: int

    FILE = "gateway.json"

    @classmethod
    def load(cls, directory: Path) -> GatewayFile | None:
        """Return what the gateway left, or None.  Raises BadConfiguration."""
        path = directory / cls.FILE
        value = read_settings_file(path)
        if value is None:
            return None
        return cls(
            url=_settings_field(path, value, "url", str) or "",
            api_key=_settings_field(path, value, "api_key", str) or "",
            pid=_settings_field(path, value, "pid", int) or 0,
        )

    def save(self, directory: Path) -> None:
        """Write gateway.json.  Raises BadConfiguration."""
        value = {"url": self.url, "api_key": self.api_key, "pid": self.pid}
        text = json.dumps(value, indent=2) + "\n"
        write_private(directory / self.FILE, text.encode("utf-8"))


# ==============================================================================
# WEBSOCKET
# ==============================================================================

# ==============================================================================
# WebSocket frames
#
# Bytes to frames and back: parser, encoder, masking (RFC 6455 §5) and the
# compression of RFC 7692.  It knows one frame at a time and no connection.
# ==============================================================================

# ==============================================================================
# WebSocket handshake
#
# The HTTP exchange that opens a connection, both sides (RFC 6455 §4): what to
# write and how to judge the answer.  It opens no socket.
# ==============================================================================

# ==============================================================================
# WebSocket protocol
# Uses: WebSocket frames
#
# One RFC 6455 connection after its opening handshake, as a state machine: bytes
# in, messages and bytes out.  It opens no socket, starts no thread, takes no lock
# and reads no clock, so one object works for both ends and in tests.
# ==============================================================================

# ==============================================================================
# WebSocket connections
# Uses: WebSocket frames, WebSocket handshake, WebSocket protocol
#
# The same over a socket, safe from any thread: a bounded outbox, and connect().
# ==============================================================================

# ==============================================================================
# BETWEEN GATEWAY AND NODE
# ==============================================================================

# ==============================================================================
# SCRAM
#
# SCRAM-SHA-256 (RFC 5802, RFC 7677), client and server halves, with channel
# binding.  Text in, text out; no socket.
# ==============================================================================

# ==============================================================================
# Wire protocol
#
# Envelopes, output chunks, calls awaiting an answer.
# ==============================================================================

# ==============================================================================
# Commands
# Uses: Wire protocol
#
# One shell command as a process group.
# ==============================================================================

# ==============================================================================
# Telemetry
#
# What a machine has and how it is doing.
# ==============================================================================

# ==============================================================================
# Language models
#
# Ollama, OpenAI-compatible, Anthropic.
# ==============================================================================

# ==============================================================================
# NODE
# ==============================================================================

# ==============================================================================
# Node agent
#
# Dial, authenticate, serve, reconnect, resume.
# ==============================================================================

# ==============================================================================
# Node service
# Uses: Settings
#
# Systemd user unit and launchd agent.
# ==============================================================================

# ==============================================================================
# GATEWAY
# ==============================================================================

# ==============================================================================
# Store
#
# SQLite; one method a question.
# ==============================================================================

# ==============================================================================
# Access
#
# Callers, scopes, tokens, sign-ins, limits.
# ==============================================================================

# ==============================================================================
# Fleet
#
# Connected nodes, their invocations and their fate.
# ==============================================================================

# ==============================================================================
# Agent
#
# Tools, the loop, approvals, the built-in Shell.
# ==============================================================================

# ==============================================================================
# Gateway
#
# RPC methods, events, chat runs.
# ==============================================================================

# ==============================================================================
# MCP
#
# The same tools for Model Context Protocol clients.
# ==============================================================================

# ==============================================================================
# HTTP
#
# Routes, upgrade, headers.
# ==============================================================================

# ==============================================================================
# Web page
#
# Three raw strings, served as three files.
# ==============================================================================

# ==============================================================================
# PROGRAM
# ==============================================================================

# ==============================================================================
# Command line
#
# Argparse, output, exit codes, main().
# ==============================================================================

if __name__ == "__main__":
    pass
