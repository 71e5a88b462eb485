#!/usr/bin/env python3
"""moltis: one file that makes many machines usable from one place.

    browser / CLI / MCP client --HTTP + WebSocket--> gateway <--WebSocket-- node, …

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
import struct
import tempfile
import threading
import time
import uuid
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, Union
from urllib.parse import urlsplit

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

API_KEY_VARIABLES: Mapping[str, str] = {  # by provider; where its secret lies
    "openai": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "google": "GOOGLE_API_KEY",
    "gemini": "GEMINI_API_KEY",
    "mistral": "MISTRAL_API_KEY",
    "groq": "GROQ_API_KEY",
    "together": "TOGETHER_API_KEY",
    "openrouter": "OPENROUTER_API_KEY",
    "deepseek": "DEEPSEEK_API_KEY",
    "xai": "XAI_API_KEY",
}


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


class Cancelled(MoltisError):
    """Somebody asked for this to end: clean up and pass it on."""


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


class Cancellation:
    """A switch, thrown once and from any thread, that also wakes what is blocked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _callbacks
        self._thrown = threading.Event()
        self._callbacks: dict[object, Callable[[], None]] = {}

    @property
    def cancelled(self) -> bool:
        return self._thrown.is_set()

    def cancel(self) -> None:
        with self._lock:
            self._thrown.set()
            callbacks = list(self._callbacks.values())
        for callback in callbacks:
            callback()

    def pause(self, timeout: float) -> None:
        """Wait for `timeout` s.  Raises Cancelled as soon as it is."""
        if self._thrown.wait(timeout):
            raise Cancelled

    @contextlib.contextmanager
    def calling(self, callback: Callable[[], None]) -> Iterator[None]:
        """While the block runs, a cancellation calls `callback` to wake it.

        Raises Cancelled instead of whatever failed in the block because of that,
        and at once when the cancellation came before it.
        """
        entry = object()
        with self._lock:
            if self._thrown.is_set():
                raise Cancelled
            self._callbacks[entry] = callback
        try:
            yield
        except Exception as error:
            if self.cancelled:
                raise Cancelled from error
            raise
        finally:
            with self._lock:
                del self._callbacks[entry]


def ollama_url(host: str) -> str:
    """Return the address that OLLAMA_HOST means, read as Ollama reads it.

    It may lack the scheme, the name or the port, and may be one to listen on.
    """
    scheme, _, rest = host.strip().rpartition("://")
    parts = urlsplit(f"//{rest}")
    name = parts.hostname or "127.0.0.1"
    if name in ("0.0.0.0", "::"):
        name = "127.0.0.1"
    default = {"http": 80, "https": 443}.get(scheme, 11434)
    try:
        port = parts.port or default
    except ValueError:  # what Ollama does with a port that is none
        port = default
    if ":" in name:
        name = f"[{name}]"
    return f"{scheme or 'http'}://{name}:{port}"


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
        raise BadConfiguration(
            f"{path} is not JSON ({error}); mend or delete it"
        ) from (error)
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
# What gateway, nodes and operators say to each other: JSON envelopes in text
# messages, command streams in binary ones, and calls that await an answer.  It knows
# shapes and no connection: a `send` is given to it.  The facts that compatibility
# with Moltis (protocol 4) needs are here and nowhere else.
# ==============================================================================

STDOUT = 1
STDERR = 2
STDIN = 3  # kinds of output chunks

STREAM_NAMES: Mapping[int, str] = {STDOUT: "stdout", STDERR: "stderr", STDIN: "stdin"}

CHUNK_HEADER = struct.Struct(">B16sQ")  # kind, invocation (UUID), offset

CAP_SCRAM = "auth.scram"
CAP_STREAM = "exec.stream"
CAP_CANCEL = "exec.cancel"
CAP_RESUME = "exec.resume"
CAP_LLM = "llm.chat"

INVOKE_REQUEST = "node.invoke.request"
INVOKE_RESULT = "node.invoke.result"
INVOKE_ACK = "node.invoke.ack"
INVOKE_CANCEL = "node.invoke.cancel"
INVOKE_STATE = "node.invoke.state"
NODE_EVENT = "node.event"
NODE_TELEMETRY = "node.telemetry"


@dataclass(frozen=True)
class Request:
    id: str
    method: str
    params: JsonObject


@dataclass(frozen=True)
class Response:
    id: str
    payload: Any = None
    error: RpcError | None = None


@dataclass(frozen=True)
class Event:
    name: str
    payload: Any = None
    seq: int | None = None


@dataclass(frozen=True)
class Chunk:
    """A piece of a command's stream, and where in the stream it starts."""

    kind: int  # STDOUT, STDERR or STDIN; an empty STDIN chunk is the end of input
    invoke_id: str
    offset: int  # bytes
    data: bytes

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


Envelope = Union[Request, Response, Event]


class EnvelopeError(RpcError):
    """A message that is no envelope: answer `id`, which is "" where there is none."""

    def __init__(self, envelope_id: str, message: str) -> None:
        super().__init__("INVALID_REQUEST", message)
        self.id = envelope_id


def encode_envelope(envelope: Envelope) -> str:
    """Return the JSON text; absent optionals are left out, never null."""
    value: JsonObject
    if isinstance(envelope, Request):
        value = {
            "type": "req",
            "id": envelope.id,
            "method": envelope.method,
            "params": envelope.params,
        }
    elif isinstance(envelope, Response):
        value = {"type": "res", "id": envelope.id, "ok": envelope.error is None}
        if envelope.error is None:
            value["payload"] = envelope.payload
        else:
            value["error"] = encode_error(envelope.error)
    else:
        value = {"type": "event", "event": envelope.name}
        if envelope.payload is not None:
            value["payload"] = envelope.payload
        if envelope.seq is not None:
            value["seq"] = envelope.seq
    return to_json(value)


def encode_error(error: RpcError) -> JsonObject:
    value: JsonObject = {"code": error.code, "message": redact(error.message)}
    if error.details is not None:
        value["details"] = error.details
    if error.retryable is not None:
        value["retryable"] = error.retryable
    if error.retry_after is not None:
        value["retryAfterMs"] = round(error.retry_after * 1000)
    return value


def decode_envelope(text: str) -> Envelope:
    """Return what `text` says; unknown fields are ignored.  Raises EnvelopeError."""
    try:
        value = from_json(text)
    except ValueError as error:
        raise EnvelopeError("", f"the message is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise EnvelopeError("", "the message must be a JSON object")
    envelope_id = value.get("id")
    try:
        return _decode_fields(value)
    except RpcError as error:
        known = envelope_id if isinstance(envelope_id, str) else ""
        raise EnvelopeError(known, error.message) from error


def _decode_fields(value: JsonObject) -> Envelope:
    kind = required(value, "type", str)
    if kind == "req":
        return Request(
            id=required(value, "id", str),
            method=required(value, "method", str),
            params=optional(value, "params", dict) or {},
        )
    if kind == "res":
        ok = required(value, "ok", bool)
        error = None if ok else decode_error(optional(value, "error", dict) or {})
        return Response(required(value, "id", str), value.get("payload"), error)
    if kind == "event":
        return Event(
            name=required(value, "event", str),
            payload=value.get("payload"),
            seq=optional(value, "seq", int),
        )
    raise RpcError("INVALID_REQUEST", f"type must be req, res or event, not {kind!r}")


def decode_error(value: JsonObject) -> RpcError:
    """Return the error that a peer sent; nothing in it is taken for granted."""
    retry_after_ms = value.get("retryAfterMs")
    retryable = value.get("retryable")
    return RpcError(
        str(value.get("code") or "INTERNAL"),
        str(value.get("message") or "the other side gave no reason"),
        details=value.get("details"),
        retryable=retryable if isinstance(retryable, bool) else None,
        retry_after=retry_after_ms / 1000 if isinstance(retry_after_ms, int) else None,
    )


def encode_chunk(chunk: Chunk) -> bytes:
    """Return the binary message.  `chunk.invoke_id` has to be a UUID."""
    invocation = uuid.UUID(chunk.invoke_id).bytes
    return CHUNK_HEADER.pack(chunk.kind, invocation, chunk.offset) + chunk.data


def decode_chunk(message: bytes) -> Chunk:
    """Return what the binary message carries.  Raises RpcError."""
    if len(message) < CHUNK_HEADER.size:
        raise RpcError(
            "PROTOCOL_ERROR",
            f"a chunk has at least {CHUNK_HEADER.size} bytes, not {len(message)}",
        )
    kind, invocation, offset = CHUNK_HEADER.unpack_from(message)
    if kind not in STREAM_NAMES:
        raise RpcError("PROTOCOL_ERROR", f"a chunk's kind is 1, 2 or 3, not {kind}")
    data = message[CHUNK_HEADER.size :]
    if len(data) > MAX_CHUNK:
        raise RpcError(
            "PAYLOAD_TOO_LARGE", f"a chunk carries {MAX_CHUNK} bytes, not {len(data)}"
        )
    return Chunk(kind, str(uuid.UUID(bytes=invocation)), offset, data)


def is_uuid(text: str) -> bool:
    """Return whether `text` is a UUID as we write it, and so can name a stream."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


@dataclass(frozen=True)
class InflightCommand:
    """What a node says at `connect` of an invocation that is not settled yet."""

    invoke_id: str
    stdout: int  # bytes acknowledged by the gateway so far
    stderr: int
    stdin: int  # bytes that arrived so far
    done: bool

    @classmethod
    def from_json(cls, value: JsonObject) -> InflightCommand:
        """Raises RpcError."""
        return cls(
            invoke_id=required(value, "invokeId", str),
            stdout=optional(value, "stdout", int) or 0,
            stderr=optional(value, "stderr", int) or 0,
            stdin=optional(value, "stdin", int) or 0,
            done=optional(value, "done", bool) or False,
        )

    def to_json(self) -> JsonObject:
        return {
            "invokeId": self.invoke_id,
            "stdout": self.stdout,
            "stderr": self.stderr,
            "stdin": self.stdin,
            "done": self.done,
        }


@dataclass(frozen=True)
class ConnectParams:
    """What a peer says of itself in `connect`, in either form of protocol 4."""

    role: str  # what the peer asks for; what it gets comes from its credential
    client_id: str = ""
    display_name: str = ""
    version: str = ""
    platform: str = ""
    min_protocol: int = PROTOCOL_VERSION
    max_protocol: int = PROTOCOL_VERSION
    capabilities: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    device_token: str = ""
    api_key: str = ""
    scram_final: str = ""
    instance: str = ""  # one life of the node's process
    inflight: tuple[InflightCommand, ...] = ()

    @classmethod
    def from_json(cls, params: JsonObject) -> ConnectParams:
        """Raises RpcError."""
        flat = "minProtocol" in params or "maxProtocol" in params
        protocol = optional(params, "protocol", dict) or {}
        client = optional(params, "client", dict) or {}
        auth = optional(params, "auth", dict) or {}
        scram = optional(auth, "scram", dict) or {}
        extensions = optional(params, "extensions", dict) or {}
        ours = params if flat else optional(extensions, "moltis", dict) or {}
        if flat:
            protocol = {
                "min": params.get("minProtocol"),
                "max": params.get("maxProtocol"),
            }
        low = optional(protocol, "min", int)
        high = optional(protocol, "max", int)
        return cls(
            role=optional(params, "role", str) or "operator",
            client_id=optional(client, "id", str) or "",
            display_name=optional(client, "displayName", str) or "",
            version=optional(client, "version", str) or "",
            platform=optional(client, "platform", str) or "",
            min_protocol=PROTOCOL_VERSION if low is None else low,
            max_protocol=PROTOCOL_VERSION if high is None else high,
            capabilities=_texts(ours, "caps"),
            commands=_texts(ours, "commands"),
            device_token=optional(auth, "deviceToken", str) or "",
            api_key=optional(auth, "api_key", str) or "",
            scram_final=optional(scram, "clientFinal", str) or "",
            instance=optional(ours, "instance", str) or "",
            inflight=tuple(
                InflightCommand.from_json(item)
                for item in optional(ours, "inflight", list) or []
                if isinstance(item, dict)
            ),
        )

    def to_json(self) -> JsonObject:
        client = {
            "id": self.client_id,
            "displayName": self.display_name,
            "version": self.version,
            "platform": self.platform,
            "mode": "headless",
        }
        auth: JsonObject = {}
        if self.device_token:
            auth["deviceToken"] = self.device_token
        if self.api_key:
            auth["api_key"] = self.api_key
        if self.scram_final:
            auth["scram"] = {"clientFinal": self.scram_final}
        ours: JsonObject = {
            "caps": list(self.capabilities),
            "commands": list(self.commands),
        }
        if self.instance:
            ours["instance"] = self.instance
            ours["inflight"] = [item.to_json() for item in self.inflight]
        return {
            "protocol": {"min": self.min_protocol, "max": self.max_protocol},
            "client": {name: text for name, text in client.items() if text},
            "role": self.role,
            "auth": auth,
            "extensions": {"moltis": ours},
        }

    def check_protocol(self) -> None:
        """Raises RpcError PROTOCOL_ERROR unless the peer speaks our version."""
        if not self.min_protocol <= PROTOCOL_VERSION <= self.max_protocol:
            raise RpcError(
                "PROTOCOL_ERROR",
                f"protocol mismatch: server={PROTOCOL_VERSION}, "
                f"client={self.min_protocol}-{self.max_protocol}",
            )


def _texts(value: JsonObject, name: str) -> tuple[str, ...]:
    items = optional(value, name, list) or []
    return tuple(item for item in items if isinstance(item, str))


class Calls:
    """Requests that were sent and not yet answered, by id."""

    def __init__(self, send: Callable[[str], None]) -> None:
        self._send = send
        self._lock = threading.Lock()  # guards _pending and _closed
        self._pending: dict[str, Future[Any]] = {}
        self._closed: MoltisError | None = None

    def start(self, method: str, params: JsonObject) -> Future[Any]:
        """Send a request; the future gets its payload, or RpcError, or why it closed.

        Raises ConnectionClosed.
        """
        request = Request(new_id(), method, params)
        future: Future[Any] = Future()
        with self._lock:
            if self._closed is not None:
                raise self._closed
            # Known before it is sent: a fast answer finds it.
            self._pending[request.id] = future
        try:
            self._send(encode_envelope(request))
        except MoltisError:
            with self._lock:
                self._pending.pop(request.id, None)
            raise
        return future

    def call(self, method: str, params: JsonObject, timeout: float | None) -> Any:
        """Return the answer's payload.

        Raises RpcError as the peer says, or TIMEOUT after `timeout` s;
        ConnectionClosed when the connection ends first.
        """
        try:
            return self.start(method, params).result(timeout)
        except FutureTimeout:
            raise RpcError(
                "TIMEOUT", f"no answer to {method} within {timeout:g} s"
            ) from None

    def answer(self, response: Response) -> None:
        """Settle the call; an answer that nobody waits for is dropped."""
        with self._lock:
            future = self._pending.pop(response.id, None)
        if future is None:
            log.debug("answer to no call id=%.64s", response.id)
        elif response.error is not None:
            future.set_exception(response.error)
        else:
            future.set_result(response.payload)

    def close(self, error: MoltisError) -> None:
        """Fail all calls, those to come as well, with `error`."""
        with self._lock:
            self._closed = error
            pending = list(self._pending.values())
            self._pending.clear()
        for future in pending:
            future.set_exception(error)


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
