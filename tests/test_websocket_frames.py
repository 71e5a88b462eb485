"""Frames as bytes: RFC 6455 §5."""

from __future__ import annotations

import os
import struct
import tracemalloc

import pytest
from peers import raw_frame

from moltis import (
    CloseCode,
    Frame,
    FrameParser,
    Opcode,
    ProtocolError,
    apply_mask,
    decode_close,
    encode_close,
    encode_frame,
)

KEY = b"\x37\xfa\x21\x3d"


def parse(data, **options):
    """Return all frames of `data`, given to a parser in one piece."""
    return parse_pieces([data], **options)


def parse_pieces(pieces, *, masked=False, max_frame=1 << 30):
    """Return all frames that a parser finds in `pieces`, fed one after another."""
    reader = FrameParser(masked=masked, max_frame=max_frame)
    frames = []
    for piece in pieces:
        reader.feed(piece)
        frames += iter(reader.next_frame, None)
    return frames


def refusal(data, **options):
    """Return the close code with which a parser refuses `data`."""
    with pytest.raises(ProtocolError) as caught:
        parse(data, **options)
    return caught.value.close_code


# --- masking ---------------------------------------------------------------------


def naive_mask(data, key):
    return bytes(byte ^ key[i % 4] for i, byte in enumerate(data))


@pytest.mark.parametrize(
    "length", [0, 1, 2, 3, 4, 5, 7, 8, 125, 1000, 65535, 65536, 65537, 200_003]
)
def test_masking_is_an_xor_with_the_repeated_key(length):
    """RFC 6455 §5.3"""
    data = os.urandom(length)
    assert apply_mask(data, KEY) == naive_mask(data, KEY)


def test_masking_twice_gives_the_payload_back():
    """RFC 6455 §5.3"""
    data = os.urandom(100_001)
    key = os.urandom(4)
    assert apply_mask(apply_mask(data, key), key) == data


# --- the examples of RFC 6455 §5.7 -----------------------------------------------


def test_the_unmasked_text_of_the_rfc_is_read_and_written():
    """RFC 6455 §5.7"""
    data = bytes.fromhex("810548656c6c6f")
    assert parse(data) == [Frame(Opcode.TEXT, b"Hello")]
    assert encode_frame(Opcode.TEXT, b"Hello", masked=False) == data


def test_the_masked_text_of_the_rfc_is_read():
    """RFC 6455 §5.7"""
    data = bytes.fromhex("818537fa213d7f9f4d5158")
    assert parse(data, masked=True) == [Frame(Opcode.TEXT, b"Hello")]


def test_the_fragmented_text_of_the_rfc_is_read():
    """RFC 6455 §5.7"""
    assert parse(bytes.fromhex("010348656c80026c6f")) == [
        Frame(Opcode.TEXT, b"Hel", fin=False),
        Frame(Opcode.CONTINUATION, b"lo"),
    ]


def test_the_ping_and_the_masked_pong_of_the_rfc_are_read():
    """RFC 6455 §5.7"""
    assert parse(bytes.fromhex("890548656c6c6f")) == [Frame(Opcode.PING, b"Hello")]
    assert parse(bytes.fromhex("8a8537fa213d7f9f4d5158"), masked=True) == [
        Frame(Opcode.PONG, b"Hello")
    ]


@pytest.mark.parametrize(
    ("length", "header"), [(256, "827e0100"), (65536, "827f0000000000010000")]
)
def test_the_long_binary_frames_of_the_rfc_are_read_and_written(length, header):
    """RFC 6455 §5.7"""
    payload = b"x" * length
    data = bytes.fromhex(header) + payload
    assert parse(data) == [Frame(Opcode.BINARY, payload)]
    assert encode_frame(Opcode.BINARY, payload, masked=False) == data


# --- parsing ---------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65535, 65536, 100_000])
def test_every_length_survives_the_way_there_and_back(length, masked):
    """RFC 6455 §5.2"""
    payload = os.urandom(length)
    data = encode_frame(Opcode.BINARY, payload, masked=masked)
    assert parse(data, masked=masked) == [Frame(Opcode.BINARY, payload)]


def test_each_frame_has_a_masking_key_of_its_own():
    """RFC 6455 §5.3"""
    keys = {bytes(encode_frame(Opcode.TEXT, b"", masked=True)[2:]) for _ in range(50)}
    assert len(keys) == 50


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11])
def test_frames_may_come_in_pieces_of_any_size(size):
    """RFC 6455 §5.4"""
    payload = os.urandom(1000)
    frames = [
        Frame(Opcode.BINARY, payload, fin=False),
        Frame(Opcode.PING, b"in between"),
        Frame(Opcode.CONTINUATION, payload),
        Frame(Opcode.TEXT, b"next"),
    ]
    data = b"".join(raw_frame(*f[:2], fin=f.fin, masked=True) for f in frames)
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    assert parse_pieces(pieces, masked=True) == frames


def test_an_incomplete_frame_is_held_back():
    for begun in (b"", b"\x81", b"\x81\x7e", b"\x81\x7e\x01", b"\x81\x05He"):
        assert parse(begun) == []
    assert parse_pieces([b"\x89\x05He", b"llo"]) == [Frame(Opcode.PING, b"Hello")]


def test_many_tiny_frames_in_one_read_cost_no_quadratic_copying():
    """64 KiB hold 32,768 of them."""
    reader = FrameParser(masked=False, max_frame=125)
    reader.feed(b"\x8a\x00" * 32768)
    tracemalloc.start()
    try:
        count = sum(1 for _ in iter(reader.next_frame, None))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 32768
    assert peak < 128 * 1024


def test_a_frame_that_was_read_leaves_no_memory_behind():
    reader = FrameParser(masked=False, max_frame=1 << 30)
    data = encode_frame(Opcode.BINARY, bytes(1 << 20), masked=False)
    tracemalloc.start()
    try:
        reader.feed(data)
        assert len(reader.next_frame().payload) == 1 << 20
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 64 * 1024


# --- refusals --------------------------------------------------------------------


def test_an_unmasked_frame_to_a_server_is_refused():
    """RFC 6455 §5.1"""
    assert refusal(b"\x81\x02hi", masked=True) == 1002


def test_a_masked_frame_to_a_client_is_refused():
    """RFC 6455 §5.1"""
    assert refusal(b"\x81\x82" + KEY + b"hi") == 1002


@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
def test_reserved_opcodes_are_refused(opcode):
    """RFC 6455 §5.2"""
    assert refusal(bytes((0x80 | opcode, 0))) == 1002


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("opcode", sorted(Opcode.ALL))
def test_reserved_bits_are_refused_without_an_extension(bits, opcode):
    """RFC 6455 §5.2"""
    assert refusal(bytes((0x80 | bits << 4 | opcode, 0))) == 1002


@pytest.mark.parametrize("opcode", [Opcode.CLOSE, Opcode.PING, Opcode.PONG])
def test_fragmented_control_frames_are_refused(opcode):
    """RFC 6455 §5.5"""
    assert refusal(bytes((opcode, 0))) == 1002


@pytest.mark.parametrize("opcode", [Opcode.CLOSE, Opcode.PING, Opcode.PONG])
@pytest.mark.parametrize("length", [126, 127])
def test_long_control_frames_are_refused_at_their_second_byte(opcode, length):
    """RFC 6455 §5.5"""
    assert refusal(bytes((0x80 | opcode, length))) == 1002


@pytest.mark.parametrize(
    "header",
    [
        b"\x82\x7e" + struct.pack("!H", 125),
        b"\x82\x7f" + struct.pack("!Q", 65535),
        b"\x82\x7f" + struct.pack("!Q", 1 << 63),
    ],
)
def test_lengths_that_are_not_well_encoded_are_refused(header):
    """RFC 6455 §5.2"""
    assert refusal(header) == 1002


def test_a_frame_that_announces_too_much_is_refused_at_its_header():
    """RFC 6455 §7.4.1"""
    assert refusal(struct.pack("!BBQ", 0x82, 127, 70_001), max_frame=70_000) == 1009
    header = struct.pack("!BBQ", 0x82, 127, 70_000)
    assert parse(header, max_frame=70_000) == []


# --- Close payloads --------------------------------------------------------------

PERMITTED = [*range(1000, 1004), *range(1007, 1015), 3000, 3999, 4000, 4999]
FORBIDDEN = [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]


@pytest.mark.parametrize("code", PERMITTED)
def test_permitted_close_codes_are_read_and_written(code):
    """RFC 6455 §7.4"""
    payload = struct.pack("!H", code) + "why — so".encode()
    assert decode_close(payload) == (code, "why — so")
    assert encode_close(code, "why — so") == payload


@pytest.mark.parametrize("code", FORBIDDEN)
def test_forbidden_close_codes_are_refused(code):
    """RFC 6455 §7.4"""
    with pytest.raises(ProtocolError) as caught:
        decode_close(struct.pack("!H", code))
    assert caught.value.close_code == 1002


def test_an_empty_close_payload_means_no_status():
    """RFC 6455 §7.1.5"""
    assert decode_close(b"") == (CloseCode.NO_STATUS, "")
    assert encode_close(CloseCode.NO_STATUS) == b""


def test_a_close_payload_of_one_byte_is_refused():
    """RFC 6455 §5.5.1"""
    with pytest.raises(ProtocolError) as caught:
        decode_close(b"\x03")
    assert caught.value.close_code == 1002


def test_a_close_reason_that_is_not_utf8_is_refused():
    """RFC 6455 §8.1"""
    with pytest.raises(ProtocolError) as caught:
        decode_close(b"\x03\xe8\xff")
    assert caught.value.close_code == 1007


def test_a_long_close_reason_is_cut_between_characters():
    """RFC 6455 §5.5"""
    payload = encode_close(1000, "é" * 100)
    assert len(payload) <= 125
    assert decode_close(payload) == (1000, "é" * 61)
