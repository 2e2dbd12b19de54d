"""DECTRIS stream V2, lclstreamer's Simplon messages, and the CBOR that both are written in."""

import io
import struct
from collections.abc import Callable
from typing import Any

import cbor2
import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.errors import InputError
from halfstep.stream.events import MessageError
from halfstep.stream.formats import Fields, dectris, simplon
from halfstep.stream.formats.cbor import Tag, read_map
from tests.stream.messages import TYPES, peak_bytes, pixels

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 64), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=30)
    | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=30) | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=30,
)


def refused(decode: Callable[..., Any], message: bytes, said: str, *fields: Fields) -> None:
    with pytest.raises(MessageError, match=said) as found:
        decode(message, *fields)
    assert "\n" not in str(found.value)


def as_bytes(value: Any) -> Any:
    """`value` with bytes in place of views."""
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, list):
        return [as_bytes(each) for each in value]
    return {key: as_bytes(each) for key, each in value.items()} if isinstance(value, dict) else value


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=6), st.booleans())
def test_cbor_is_read_as_cbor2_writes_it(content: dict[str, Any], indefinite: bool) -> None:
    message = cbor2.dumps(content, indefinite_containers=indefinite)
    assert as_bytes(read_map(memoryview(message))) == content


def test_strings_in_pieces_short_floats_and_tags() -> None:
    message = b"\xa4\x61a\x7f\x61x\x62yz\xff\x61b\x5f\x41\1\x42\2\3\xff\x61c\xf9\x3c\0\x61d\xc1\xd9\xdc\xb4\x80"
    found = as_bytes(read_map(memoryview(message)))
    assert found == {"a": "xyz", "b": b"\1\2\3", "c": 1.0, "d": Tag(1, Tag(56500, []))}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (b"\xa1\x61a" + b"\x81" * 100_000, "nested beyond"),
        (b"\xa1\x61a" + b"\xc1" * 100_000, "nested beyond"),
        (b"\xa1\x61a" + b"\x9f" * 100_000, "nested beyond"),
        (b"\xbf" * 100_000, "nested beyond"),
        (b"\xa1\x61a\x9a\0\3\0\0" + b"\1" * 0x30000, "more than 100000 items"),
        (b"\xa1\x61a\x9f" + b"\1" * 200_000 + b"\xff", "more than 100000 items"),
        (b"\xa1\x61a\x5f" + b"\x40" * 200_000 + b"\xff", "no piece of a string"),
        (b"\xa1\x61a\x9b" + b"\xff" * 8, "declares 18446744073709551615 values"),
        (b"\xbb" + b"\xff" * 8, "declares 18446744073709551615 values"),
        (b"\xa1\x61a\x5b" + b"\xff" * 8, "bytes short"),
        (b"\xa1\x61a\x7b" + b"\xff" * 8 + b"x", "bytes short"),
        (b"\xa1\x61a", "1 bytes short"),
        (b"\xa1\x61a\xff", "has not begun"),
        (b"\xa1\x61a\x1c", "no CBOR"),
        (b"\xa1\x61a\x1f", "no CBOR"),
        (b"\xa1\x61a\xdf\1", "no CBOR"),
        (b"\xa1\x61a\xf8\x20", "no CBOR that detectors send"),
        (b"\xa1\x61a\x5f\x61x\xff", "no piece of a string"),
        (b"\xa1\x61a\x61\xff", "damaged, UnicodeDecodeError"),
        (b"\xa2\x61a\1\x61a\2", "is there twice"),
        (b"\xa1\x80\1", "neither text nor number"),
        (b"\xa1\1\1", "not a map of named values"),
        (b"\x80", "not a map of named values"),
        (b"\xff", "not a map of named values"),
        (b"\xa0\0", "1 bytes follow"),
        (b"\xa1\x61a\xd8\x1c\x81\xd8\x1d\0", "type None"),  # a list that holds itself, where tags are acted on
        (b"\xa1\x61a\xc5\x82\x1b\x7f" + b"\xff" * 7 + b"\3", "type None"),  # 3 * 2 ** (2 ** 63 - 1)
        (b"\xa1\x61a\xd8\x23\x68(a+)+(b+", "type None"),  # a pattern
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_cbor_that_is_wrong_or_asks_for_much(message: bytes, said: str) -> None:
    def decode() -> None:
        refused(dectris.decode, message, said, Fields())
        refused(simplon.decode, b"m" + message, said, Fields())

    assert peak_bytes(decode) < 8 << 20


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TYPES),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([None, "bslz4", "lz4"]),
    st.sampled_from("<>"),
)
def test_dectris_round_trip(dtype: str, shape: tuple[int, ...], compression: str | None, order: str) -> None:
    data = pixels(*shape, dtype=dtype)
    sent = data.astype(data.dtype.newbyteorder(order))
    message = dectris.decode(dectris.encode_image("s", 7, sent, compression), Fields())
    (event,) = message.events
    assert (message.run, message.source, message.starts, message.ends) == ("s", "dectris", False, False)
    assert event.identity == ("s", "dectris", "7", 7)
    assert event.data.dtype == dtype
    assert event.data.dtype.isnative
    assert np.array_equal(event.data, data)


def test_an_image_of_one_plain_channel_is_a_view_of_the_message() -> None:
    message = bytearray(dectris.encode_image("s", 0, pixels(1, 24, 40), None))
    assert np.shares_memory(dectris.decode(message, Fields()).events[0].data, np.frombuffer(message, np.uint8))


def test_a_series_from_its_start_to_its_end() -> None:
    start = dectris.decode(
        dectris.encode_start("u", 200, {"incident_energy": 12_400.0, "sensor_material": "Si"}), Fields()
    )
    assert (start.run, start.source, start.starts, start.expected) == ("u", "dectris", True, 200)
    assert start.facts["photon_energy_eV"] == 12_400
    assert start.facts["sensor_material"] == "Si"
    end = dectris.decode(dectris.encode_end("u"), Fields())
    assert (end.run, end.ends, end.events) == ("u", True, ())


def test_what_a_detector_sends_besides() -> None:
    """A start with masks and tables, times as ratios, dates as tags, series known by number alone."""
    mask = cbor2.CBORTag(40, [[2, 2], cbor2.CBORTag(70, bytes(16))])
    start = {
        "type": "start",
        "arm_date": cbor2.CBORTag(0, "2024-05-01T10:00:00+02:00"),
        "incident_wavelength": 1.0,
        "pixel_mask": {"threshold_1": mask},
        "pixel_mask_enabled": True,
        "series_id": 17,
        "user_data": None,
    }
    found = dectris.decode(cbor2.dumps(start), Fields())
    assert (found.run, found.expected) == ("17", None)
    assert found.facts == {
        "arm_date": "2024-05-01T10:00:00+02:00",
        "incident_wavelength": 1.0,
        "photon_energy_eV": 12398.419843320026,
        "pixel_mask_enabled": 1,
        "series_id": 17,
    }
    facts = {"real_time": [1, 4], "start_time": [3, 0], "series_date": cbor2.CBORTag(0, "2024-05-01T10:00:00Z")}
    (event,) = dectris.decode(dectris.encode_image("s", 7, pixels(1, 2, 2), facts=facts), Fields()).events
    assert event.facts["real_time"] == 0.25
    assert "start_time" not in event.facts
    assert event.facts["series_date"] == "2024-05-01T10:00:00Z"


def image(**content: Any) -> bytes:
    return cbor2.dumps({"type": "image", "series_unique_id": "s", "image_id": 1, "data": {"a": array()}} | content)


def array(shape: Any = (2, 2), tag: int = 69, content: Any = bytes(8)) -> Any:
    return cbor2.CBORTag(40, [list(shape) if isinstance(shape, tuple) else shape, cbor2.CBORTag(tag, content)])


def packed(*content: Any) -> Any:
    return array(content=cbor2.CBORTag(56500, list(content)))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (image(type="picture"), "type 'picture', expected start, image or end"),
        (image(series_unique_id=None), "none of series_unique_id, series_id"),
        (image(series_unique_id="x" * 2000), "none of series_unique_id, series_id"),
        (image(image_id="1"), "image_id '1'"),
        (image(image_id=-1), "image_id -1"),
        (image(data={}), "expected a number and the data"),
        (image(data=[array()]), "expected a number and the data"),
        (image(data={"a": bytes(8)}), "channel 'a': not a two-dimensional array"),
        (image(data={"a": array((2, 2, 1))}), "channel 'a': not a two-dimensional array"),
        (image(data={"a": array((2.0, 2))}), "channel 'a': not a two-dimensional array"),
        (image(data={"a": array(tag=71)}), "channel 'a': not a two-dimensional array"),
        (image(data={"a": array((0, 2))}), "expected sizes of 1 and more"),
        (image(data={"a": array((True, 4))}), "expected sizes of 1 and more"),
        (image(data={"a": array((1 << 40, 1 << 40))}), "more than the limit"),
        (image(data={"a": array((1 << 20, 1 << 20))}), "more than the limit"),
        (image(data={"a": array((2, 3))}), "more than the limit of 8|expected 12"),
        (image(data={"a": array((2, 1))}), "8 bytes, expected 4"),
        (image(data={"a": array(), "b": array((1, 4))}), "differ in shape or type"),
        (image(data={"a": array(), "b": array(tag=65)}), "differ in shape or type"),
        (image(data={"a": packed("gzip", 2, b"")}), "packed in a way other than bslz4 and lz4"),
        (image(data={"a": packed("bslz4", 2)}), "packed in a way other"),
        (image(data={"a": packed("bslz4", "2", b"")}), "packed in a way other"),
        (image(data={"a": packed("bslz4", 2, b"")}), "too few for their header"),
        (image(data={"a": packed("bslz4", 3, struct.pack(">QI", 8, 8192))}), "elements of 3"),
        (image(data={"a": packed("bslz4", 0, struct.pack(">QI", 8, 8192))}), "elements of 0"),
        (image(data={"a": packed("bslz4", -8, struct.pack(">QI", 8, 8192))}), "elements of -8"),
        (image(data={"a": packed("bslz4", 2, struct.pack(">QI", 9, 8192))}), "compressed from 9 bytes, expected 8"),
        (image(data={"a": packed("lz4", 0, struct.pack(">QI", 8, 0))}), "in blocks of 0 bytes"),
        (image(data={"a": packed("lz4", 0, struct.pack(">QII", 8, 8, 0))}), "compressed bytes are damaged"),
        (
            image(data={"a": packed("lz4", 0, struct.pack(">QII", 8, 8, 7) + b"\xff" * 7)}),
            "compressed bytes are damaged",
        ),
        (image(data={"a": packed("lz4", 0, struct.pack(">QII", 8, 8, 9) + bytes(8))}), "do not end where its bytes do"),
        (image(data={"a": packed("lz4", 0, struct.pack(">QII", 8, 8, 8) + bytes(9))}), "do not end where its bytes do"),
        (image(data={"a": packed("lz4", 0, struct.pack(">QII", 8, 4, 4) + bytes(4))}), "do not end where its bytes do"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_images_that_are_wrong(message: bytes, said: str) -> None:
    refused(dectris.decode, message, f"DECTRIS message: .*({said})", Fields())


def test_an_image_beyond_the_limit() -> None:
    message = dectris.encode_image("s", 1, np.zeros((4, 512, 512), np.uint32))
    assert len(message) < 100_000
    refused(dectris.decode, message, "declares 4194304 bytes", Fields(largest_bytes=1 << 20))


@pytest.mark.parametrize("block", [8, 64, 1 << 30])
@pytest.mark.parametrize("shape", [(1, 7, 9), (1, 64, 64)])
def test_lz4_in_blocks_of_any_size(block: int, shape: tuple[int, ...]) -> None:
    """Noise, too, which is stored as it is."""
    for data in (pixels(*shape), np.random.default_rng(0).random(shape, np.float32)):
        with h5py.File(io.BytesIO(), "w") as file:
            sent_bytes = data.view(np.uint8).ravel()
            whole = file.create_dataset("a", data=sent_bytes, chunks=sent_bytes.shape, **hdf5plugin.LZ4(block))
            raw = bytes(whole.id.read_direct_chunk((0,))[1])
        sent = cbor2.CBORTag(40, [list(shape[1:]), cbor2.CBORTag(85, cbor2.CBORTag(56500, ["lz4", 0, raw]))])
        assert np.array_equal(dectris.decode(image(data={"a": sent}), Fields()).events[0].data, data)


def test_what_dectris_has_no_type_for() -> None:
    with pytest.raises(InputError, match="int64"):
        dectris.encode_image("s", 1, np.zeros((1, 2, 2), np.int64))
    with pytest.raises(InputError, match="gzip"):
        dectris.encode_image("s", 1, pixels(1, 2, 2), "gzip")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TYPES), st.tuples(st.integers(1, 3), st.integers(1, 90), st.integers(1, 90)))
def test_simplon_round_trip(dtype: str, shape: tuple[int, ...]) -> None:
    data = pixels(*shape, dtype=dtype)
    start = simplon.decode(simplon.encode_start("12", data), Fields())
    assert (start.run, start.source, start.starts) == ("12", "simplon", True)
    message = simplon.encode_image("12", 30_001, data, {"timestamp": "1.25"})
    found = simplon.decode(message, Fields().after(start))
    (event,) = found.events
    assert found.run == "12"
    assert event.identity == ("12", "simplon", "1.25", -1)
    assert event.facts["timestamp"] == 1.25
    assert event.facts["message_id"] == 30_001
    assert event.data.dtype == dtype
    assert np.array_equal(event.data, data)
    assert simplon.decode(simplon.encode_end("12"), Fields()).ends


def test_the_forms_that_lclstreamer_has_sent() -> None:
    data, fields = pixels(8, 16, 32), Fields(shape=(8, 16, 32))
    first = simplon.encode_image("7", 3, data, {"photon_energy": 13_000.0, "photon_wavelength": 0, "timestamp": "7"})
    blocks = read_map(memoryview(first)[1:])["compressed_data"]
    beam = {"photon_energy": 9500.0, "photon_wavelength": 0, "beam_direction": {"angle_x": 0.0}}
    shared = {"type": "image", "run_id": "7", "image_dtype": "float32", "message_id": 3, "timestamp": "7", **beam}
    for message, energy in [
        (first, None),  # MeV of the electrons
        (b"c" + first[1:], None),
        (cbor2.dumps({**shared, "compressed_data": bytes(blocks)}), 9500.0),
        (cbor2.dumps({**shared, "data": data.tobytes()}), 9500.0),
    ]:
        (event,) = simplon.decode(message, fields).events
        assert event.identity == ("7", "simplon", "7", -1)
        assert event.facts.get("photon_energy_eV") == energy
        assert event.facts["timestamp"] == 7
        assert np.array_equal(event.data, data)
    for kind, ends in (("start", False), ("end", True)):
        message = cbor2.dumps(
            {"type": kind, "run_id": 7, "shape": "8x16x32", "image_dtype": "float32", "timestamp": 1.5}
        )
        found = simplon.decode(message, Fields())
        assert (found.run, found.ends, found.starts) == ("7", ends, not ends)


def test_events_of_simplon_are_named_by_their_number_without_a_timestamp() -> None:
    data = pixels(2, 4)
    for facts, name in (({}, "3"), ({"timestamp": "None"}, "3"), ({"timestamp": "noon"}, "noon")):
        (event,) = simplon.decode(simplon.encode_image("7", 3, data[None], facts), Fields(shape=(2, 4))).events
        assert event.identity.event == name
        assert event.data.shape == (1, 2, 4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"type": "header"}, "type 'header'"),
        ({"run": None}, "none of run_id, run, run_number"),
        ({"dtype": "object"}, "type 'object'"),
        ({"dtype": "int64"}, "type 'int64'"),
        ({"dtype": 4}, "type 4"),
        ({"dtype": "float64"}, "compressed_data: "),
        ({"compressed_data": "text"}, "without data or compressed_data"),
        ({"compressed_data": b""}, "do not end where its bytes do"),
        ({"data": bytes(31)}, "31 bytes, expected 32"),
    ],
    ids=str,
)
def test_simplon_images_that_are_wrong(content: dict[str, Any], said: str) -> None:
    good = cbor2.loads(simplon.encode_image("7", 3, pixels(1, 2, 4))[1:])
    refused(simplon.decode, b"m" + cbor2.dumps(good | content), f"Simplon message: .*{said}", Fields(shape=(2, 4)))


def test_an_image_without_a_shape() -> None:
    message = simplon.encode_image("7", 3, pixels(1, 2, 4))
    refused(simplon.decode, message, "an image does not tell its shape", Fields())
    refused(simplon.decode, message, "compressed_data", Fields(shape=(4, 8)))
    refused(simplon.decode, message, "more than the limit", Fields(shape=(2, 4), largest_bytes=8))
    with pytest.raises(InputError, match="int64"):
        simplon.encode_image("7", 3, np.zeros((1, 2, 4), np.int64))
