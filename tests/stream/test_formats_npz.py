"""npz messages: views, limits, and what a zip can hide."""

import io
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.errors import InputError
from halfstep.stream.events import MessageError
from halfstep.stream.formats import Fields
from halfstep.stream.formats.npz import decode, encode
from tests.stream.messages import STAMP, TYPES, peak_bytes, pixels, some_events


def saved(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=True, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def zipped(name: str, content: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def npy(header: str, content: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    raw = header.encode()
    length = len(raw).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + raw + content


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TYPES),
    st.tuples(*[st.integers(1, 5)] * 4),
    st.booleans(),
    st.sampled_from("<>"),
)
def test_round_trip(dtype: str, shape: tuple[int, ...], compressed: bool, order: str) -> None:
    events = some_events(shape[0], pixels(*shape, dtype=dtype).astype(np.dtype(dtype).newbyteorder(order)))  # type: ignore[call-overload]
    found = decode(encode(events, compressed), Fields()).events
    for event, sent in zip(found, events, strict=True):
        assert event.data.dtype == dtype
        assert event.data.dtype.isnative
        assert np.array_equal(event.data, sent.data)
        assert event.identity == sent.identity
        assert event.facts["timestamp"] == sent.facts["timestamp"]
        assert event.facts["photon_energy_eV"] == pytest.approx(9500)


def test_a_stored_array_is_a_view_of_the_message() -> None:
    message = bytearray(encode(some_events(2)))
    event = decode(memoryview(message), Fields()).events[1]
    assert np.shares_memory(event.data, np.frombuffer(message, np.uint8))


def test_the_older_names_and_what_is_not_sent() -> None:
    frames = pixels(2, 1, 4, 4)
    events = decode(saved(data=frames, wavelength=np.array([1e-10, 1.0])), Fields()).events
    assert [round(float(event.facts["photon_energy_eV"]), 3) for event in events] == [12398.42, 12398.42]
    assert [event.identity.event for event in events] == ["", ""]
    with pytest.raises(
        MessageError, match=r"data is not there under frames; it holds data, wavelength: set fields\.data"
    ):
        decode(saved(data=frames, wavelength=1), Fields.of({"data": "frames"}))


def test_events_that_do_not_fit_one_message() -> None:
    with pytest.raises(InputError, match="one or more events"):
        encode([])
    with pytest.raises(InputError, match="one shape and type"):
        encode([*some_events(1), *some_events(1, pixels(1, 2, 4, 4))])


@settings(max_examples=200, deadline=None)
@given(st.booleans(), st.data())
def test_every_flip_in_what_is_read_is_refused(compressed: bool, draw: st.DataObject) -> None:
    message = bytearray(encode(some_events(2), compressed))
    with zipfile.ZipFile(io.BytesIO(message)) as archive:
        member = archive.getinfo(draw.draw(st.sampled_from(["detector_data.npy", "timestamp.npy"])))
    begin = member.header_offset + 30 + len(member.filename) + 20  # numpy's members have 20 bytes of zip64 sizes
    assert compressed or message[begin : begin + 6] == b"\x93NUMPY"
    message[begin + draw.draw(st.integers(0, member.compress_size - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    try:
        events = decode(bytes(message), Fields()).events
    except MessageError:
        return
    assert compressed  # deflate has bits that say nothing
    assert all(np.array_equal(event.data, sent.data) for event, sent in zip(events, some_events(2), strict=True))


def test_no_pickle_is_loaded() -> None:
    with pytest.raises(MessageError, match=r"detector_data: type '\|O' holds Python objects, a pickle"):
        decode(saved(detector_data=np.array([[print, 2]], dtype=object)), Fields())
    with pytest.raises(MessageError, match="timestamp: type"):
        decode(saved(detector_data=pixels(1, 1, 4, 4), timestamp=np.array([{}])), Fields())


@pytest.mark.parametrize(
    "descr", ["'|O'", "[('a', '<f4')]", "('<f4', (2,))", "'<c8'", "'<M8[s]'", "'|V4'", "'<U0'", "'<f16'"]
)
def test_types_that_are_no_plain_numbers_are_refused(descr: str) -> None:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (4, 4)}}\n"
    with pytest.raises(MessageError, match=r"detector_data: "):
        decode(zipped("detector_data.npy", npy(header, bytes(64))), Fields())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "header cannot be read"),
        (b"\x93NUMPX\1\0" + bytes(100), "header cannot be read"),
        (npy("{}", version=(9, 0)), "version"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4)}", bytes(63)), "63 bytes of data, expected 64"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4)}", bytes(65)), "65 bytes of data, expected 64"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4)}"), "expected sizes of 1 and more"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -4)}", bytes(64)), "expected sizes of 1 and more"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 9)}"), "more than the limit"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 4)}", bytes(16)), "shape"),
        (npy("{'descr': '<f4', 'shape': (4, 4)}"), "header cannot be read"),
        (npy("(" * 9000), "header cannot be read"),
        (npy("-" * 9000 + "1"), "header cannot be read"),
        (npy("[" * 90 + "\n '"), "header cannot be read"),
        (
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4)}" + " " * 20_000, bytes(64)),
            "header cannot be",
        ),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_headers_that_are_wrong(content: bytes, said: str) -> None:
    with pytest.raises(MessageError, match=said):
        decode(zipped("detector_data.npy", content), Fields())


def test_declared_sizes_are_checked_before_inflating() -> None:
    bomb = io.BytesIO()
    np.savez_compressed(bomb, detector_data=np.zeros((64, 1, 512, 512), np.float32))
    message = bomb.getvalue()
    assert len(message) < 100_000
    with pytest.raises(MessageError, match=r"detector_data: declares 671\d+ bytes, more than the limit"):
        decode(message, Fields(largest_bytes=1 << 20))
    assert len(decode(message, Fields()).events) == 64


def test_a_bomb_that_declares_little_takes_no_memory() -> None:
    content = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4)}", bytes(64))
    message = bytearray(zipped("detector_data.npy", content + bytes(1 << 26), zipfile.ZIP_DEFLATED))
    true_size = (len(content) + (1 << 26)).to_bytes(4, "little")
    for size in (len(content), 0):
        lying = message.replace(true_size, size.to_bytes(4, "little"))

        def read(lying: bytes = bytes(lying)) -> None:
            with pytest.raises(MessageError, match=r"inflates to other than the|declares 0 bytes"):
                decode(lying, Fields())

        assert peak_bytes(read) < 4 << 20


def _encrypted(message: bytes) -> bytes:
    central = message.index(b"PK\1\2")
    return message[: central + 8] + b"\1" + message[central + 9 :]


def _two_of_a_name(_: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("detector_data.npy", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("detector_data.npy", b"2")
    return file.getvalue()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda message: b"", "it is empty"),
        (lambda message: b"\x89HDF\r\n\x1a\n", "expected a zip archive"),
        (lambda message: message[:-1], "cut short"),
        (lambda message: message[: len(message) // 2], "cut short"),
        (lambda message: message + b"\0" * 30, "bytes follow the end"),
        (lambda message: message + message[:100], "bytes follow the end"),
        (lambda message: b"junk" + message, "expected a zip archive"),
        (_encrypted, "encrypted"),
        (_two_of_a_name, "two members have the same name"),
        (lambda message: zipped("detector_data.npy", b"x" * 99, zipfile.ZIP_BZIP2), "zip compression 12"),
        (lambda message: zipped("detector_data.npy", b"x" * 99, zipfile.ZIP_LZMA), "zip compression 14"),
        (lambda message: zipped("x" * 60_000, b""), "not there"),
    ],
)
def test_archives_that_are_wrong(spoil: Callable[[bytes], bytes], said: str) -> None:
    with pytest.raises(MessageError, match=said):
        decode(spoil(encode(some_events(1))), Fields())


def test_a_directory_of_very_many_members_is_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(15_000):
            archive.writestr(f"{number:030d}", b"")
    with pytest.raises(MessageError, match="a directory of 1140000 bytes"):
        decode(file.getvalue(), Fields())


def test_large_sizes_in_zip64() -> None:
    file = io.BytesIO()
    array = io.BytesIO()
    np.save(array, pixels(1, 1, 4, 4))
    with zipfile.ZipFile(file, "w") as archive, archive.open("data.npy", "w", force_zip64=True) as member:
        member.write(array.getvalue())
    assert decode(file.getvalue(), Fields()).events[0].data.shape == (1, 4, 4)


def test_merged_panels_and_a_timestamp_of_each_event() -> None:
    frames = pixels(2, 3, 4, 4)
    message = saved(
        detector_data=frames.reshape(6, 1, 4, 4),
        detector_data_original_shape=np.array([2, 3, 4, 4], np.int32),
        timestamp=np.array([STAMP, STAMP], np.uint64),
    )
    events = decode(message, Fields()).events
    assert [event.identity.event for event in events] == [f"{STAMP}.0", f"{STAMP}.1"]
    assert all(np.array_equal(event.data, frame) for event, frame in zip(events, frames, strict=True))
