"""Frames as bytes: RFC 6455 §5 and the compression of RFC 7692."""

from __future__ import annotations

import itertools
import os
import struct
import tracemalloc
import zlib

import pytest

from moltis import (
    CloseCode,
    DeflateParameters,
    Frame,
    FrameParser,
    Opcode,
    PerMessageDeflate,
    ProtocolError,
    apply_mask,
    decode_close,
    encode_close,
    encode_frame,
)

KEY = b"\x37\xfa\x21\x3d"


def parser(*, masked=False, compression=False, max_frame=1 << 30):
    return FrameParser(masked=masked, compression=compression, max_frame=max_frame)


def parse(data, **options):
    """Return all frames of `data`, given to a parser in one piece."""
    return parse_pieces([data], **options)


def parse_pieces(pieces, **options):
    """Return all frames that a parser finds in `pieces`, fed one after another."""
    reader = parser(**options)
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
    assert encode_frame(Frame(Opcode.TEXT, b"Hello"), masked=False) == data


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
    frame = Frame(Opcode.BINARY, b"x" * length)
    data = bytes.fromhex(header) + frame.payload
    assert parse(data) == [frame]
    assert encode_frame(frame, masked=False) == data


# --- parsing ---------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65535, 65536, 100_000])
def test_every_length_survives_the_way_there_and_back(length, masked):
    """RFC 6455 §5.2"""
    frame = Frame(Opcode.BINARY, os.urandom(length))
    assert parse(encode_frame(frame, masked=masked), masked=masked) == [frame]


def test_each_frame_has_a_masking_key_of_its_own():
    """RFC 6455 §5.3"""
    frame = Frame(Opcode.TEXT, b"")
    keys = {encode_frame(frame, masked=True)[2:] for _ in range(50)}
    assert len(keys) == 50


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11])
def test_frames_that_come_in_pieces_are_handed_on_as_fragments(size):
    """RFC 6455 §5.4"""
    payload = os.urandom(1000)
    data = b"".join(
        encode_frame(frame, masked=True)
        for frame in (
            Frame(Opcode.BINARY, payload, fin=False),
            Frame(Opcode.PING, b"in between"),
            Frame(Opcode.CONTINUATION, payload),
            Frame(Opcode.TEXT, b"next"),
        )
    )
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    frames = parse_pieces(pieces, masked=True)
    assert [f for f in frames if f.opcode == Opcode.PING] == [
        Frame(Opcode.PING, b"in between")
    ]
    fragments = [f for f in frames if f.opcode != Opcode.PING]
    joined = []
    for fragment in fragments:
        if fragment.opcode is not Opcode.CONTINUATION:
            joined.append([fragment.opcode, b""])
        joined[-1][1] += fragment.payload
    assert joined == [[Opcode.BINARY, payload * 2], [Opcode.TEXT, b"next"]]
    assert sum(f.fin for f in fragments) == 2


def test_what_is_there_of_a_frame_is_not_held_back():
    assert parse(b"\x81\x05He") == [Frame(Opcode.TEXT, b"He", fin=False)]


def test_a_control_frame_is_held_back_until_it_is_whole():
    assert parse(b"\x89\x05He") == []
    assert parse_pieces([b"\x89\x05He", b"llo"]) == [Frame(Opcode.PING, b"Hello")]


def test_many_tiny_frames_in_one_read_cost_no_quadratic_copying():
    """Each frame's bytes are used where they lie: 64 KiB hold 32,768 of them."""
    reader = parser()
    reader.feed(b"\x8a\x00" * 32768)
    tracemalloc.start()
    try:
        count = sum(1 for _ in iter(reader.next_frame, None))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 32768
    assert peak < 64 * 1024


def test_a_long_frame_does_not_pile_up_in_the_parser():
    reader = parser()
    reader.feed(struct.pack("!BBQ", 0x82, 127, 1 << 29))
    assert reader.next_frame() is None
    piece = b"x" * 65536
    tracemalloc.start()
    try:
        for _ in range(1000):
            reader.feed(piece)
            assert len(reader.next_frame().payload) == 65536
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 512 * 1024


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
@pytest.mark.parametrize("opcode", list(Opcode))
def test_reserved_bits_are_refused_without_an_extension(bits, opcode):
    """RFC 6455 §5.2"""
    assert refusal(bytes((0x80 | bits << 4 | opcode, 0))) == 1002


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("opcode", list(Opcode))
def test_compression_gives_a_meaning_to_the_first_bit_alone(bits, opcode):
    """RFC 7692 §6"""
    assert refusal(bytes((0x80 | bits << 4 | opcode, 0)), compression=True) == 1002


@pytest.mark.parametrize("opcode", list(Opcode))
def test_only_the_first_frame_of_a_message_may_say_compressed(opcode):
    """RFC 7692 §6.1"""
    data = bytes((0xC0 | opcode, 0))
    if opcode in (Opcode.TEXT, Opcode.BINARY):
        assert parse(data, compression=True) == [Frame(opcode, b"", rsv1=True)]
    else:
        assert refusal(data, compression=True) == 1002


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


# --- compression -----------------------------------------------------------------


def pair(**parameters):
    """Return a client's and a server's compression with the same parameters."""
    agreed = DeflateParameters(**parameters)
    return PerMessageDeflate(agreed, client=True), PerMessageDeflate(
        agreed, client=False
    )


def inflate(deflate, data, limit=1 << 20):
    return deflate.decompress(data, fin=True, limit=limit)


@pytest.mark.parametrize(
    "data",
    [
        "f248cdc9c90700",  # §7.2.3.1: one compressed block
        "000500faff48656c6c6f00",  # §7.2.3.3: a block without compression
        "f348cdc9c9070000",  # §7.2.3.4: a final block
        "f24805000000ffffcac9c90700",  # §7.2.3.5: two blocks
    ],
)
def test_the_compressed_examples_of_the_rfc_are_read(data):
    """RFC 7692 §7.2.3"""
    client, _ = pair()
    assert inflate(client, bytes.fromhex(data)) == b"Hello"


def test_the_sliding_window_example_of_the_rfc_is_read():
    """RFC 7692 §7.2.3.2"""
    client, _ = pair()
    assert inflate(client, bytes.fromhex("f248cdc9c90700")) == b"Hello"
    assert inflate(client, bytes.fromhex("f200110000")) == b"Hello"


def test_an_empty_compressed_message_is_read():
    """RFC 7692 §7.2.3.6"""
    client, _ = pair()
    assert inflate(client, b"\x00") == b""


def test_a_message_after_a_final_block_is_read():
    """RFC 7692 §7.2.3.4"""
    client, _ = pair()
    for _ in range(3):
        assert inflate(client, bytes.fromhex("f348cdc9c9070000")) == b"Hello"


def parameter_sets():
    for server, client in itertools.product([False, True], repeat=2):
        for server_bits, client_bits in ((15, 15), (9, 15), (15, 9), (12, 10)):
            yield {
                "server_no_context_takeover": server,
                "client_no_context_takeover": client,
                "server_max_window_bits": server_bits,
                "client_max_window_bits": client_bits,
            }


@pytest.mark.parametrize("parameters", list(parameter_sets()), ids=str)
def test_both_ends_understand_each_other_under_all_parameters(parameters):
    """RFC 7692 §7.1"""
    client, server = pair(**parameters)
    noise = os.urandom(500)
    for i in range(20):
        message = noise * 3 + b"message %d " % i * 200
        assert inflate(server, client.compress(message)) == message
        assert inflate(client, server.compress(message)) == message


def test_context_takeover_makes_a_repeated_message_shorter():
    """RFC 7692 §7.1.1"""
    message = os.urandom(1000)
    client, _ = pair()
    first, second = client.compress(message), client.compress(message)
    assert len(second) < len(first) / 10
    client, _ = pair(client_no_context_takeover=True)
    assert client.compress(message) == client.compress(message)


def test_a_promised_window_is_kept():
    """RFC 7692 §7.1.2: a decompressor of exactly that size reads what is sent."""
    message = os.urandom(400) + b"x" * 5000 + os.urandom(400)
    for bits in range(9, 16):
        _, server = pair(server_max_window_bits=bits)
        small = zlib.decompressobj(-bits)
        for _ in range(5):
            data = server.compress(message * 3) + b"\x00\x00\xff\xff"
            assert small.decompress(data) == message * 3


def test_a_window_of_8_bits_is_read_but_not_written():
    """RFC 7692 §7.1.2; zlib makes no such streams, so messages go uncompressed."""
    client, server = pair(server_max_window_bits=8)
    assert not server.can_compress
    assert client.can_compress
    assert inflate(client, bytes.fromhex("f248cdc9c90700")) == b"Hello"


def test_pieces_of_a_compressed_message_are_read_as_they_come():
    client, server = pair()
    message = b"a line of output\n" * 1000
    data = client.compress(message)
    pieces = [
        server.decompress(data[i : i + 1], fin=i == len(data) - 1, limit=1 << 20)
        for i in range(len(data))
    ]
    assert b"".join(pieces) == message
    assert pieces[-1] != message


def test_a_bomb_is_refused_with_1009_before_it_takes_memory():
    """RFC 6455 §10.7"""
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(100))
    data += bomb.flush(zlib.Z_SYNC_FLUSH)
    assert len(data) < 200_000
    _, server = pair()
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError) as caught:
            inflate(server, data, limit=1 << 20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.close_code == 1009
    assert peak < 8 << 20


@pytest.mark.parametrize("limit", [0, 1, 999])
def test_a_message_may_hold_the_limit_and_not_a_byte_more(limit):
    client, server = pair()
    message = os.urandom(1000)
    exact = client.compress(message[:limit]) if limit else b"\x00"
    assert inflate(server, exact, limit=limit) == message[:limit]
    with pytest.raises(ProtocolError) as caught:
        inflate(server, client.compress(message[: limit + 1]), limit=limit)
    assert caught.value.close_code == 1009


def test_data_that_is_no_deflate_stream_is_refused():
    """RFC 7692 §6.2"""
    _, server = pair()
    with pytest.raises(ProtocolError) as caught:
        inflate(server, b"\xff\xff\xff\xff")
    assert caught.value.close_code == 1007


def test_compression_that_is_not_used_costs_no_memory():
    """A gateway has thousands of connections, most of which send short messages."""
    tracemalloc.start()
    try:
        kept = [pair() for _ in range(100)]
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size / len(kept) < 2048
