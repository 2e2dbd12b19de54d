"""HDF5 messages: every layout and filter of the producers, and what a file can be made to reach or to claim."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.errors import InputError
from halfstep.stream.events import Array, MessageError
from halfstep.stream.formats import Fields
from halfstep.stream.formats.hdf5 import decode, encode
from tests.stream.messages import PATHS, TYPES, pixels, some_events

BITSHUFFLE = hdf5plugin.Bitshuffle(cname="lz4")


def made(build: Callable[[h5py.File], Any], **options: Any) -> bytes:
    content = io.BytesIO()
    with h5py.File(content, "w", **options) as file:
        build(file)
    return content.getvalue()


def holding(data: Array, **options: Any) -> bytes:
    return made(lambda file: file.create_dataset("data/data", data=data, **options))


def refused(message: bytes, said: str, fields: Fields | None = None) -> None:
    with pytest.raises(MessageError, match=said) as found:
        decode(message, fields or Fields())
    assert "\n" not in str(found.value)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TYPES),
    st.tuples(*[st.integers(1, 5)] * 4),
    st.sampled_from([None, "gzip", "bslz4", "bszstd"]),
    st.sampled_from("<>"),
)
def test_round_trip(dtype: str, shape: tuple[int, ...], compression: str | None, order: str) -> None:
    events = some_events(shape[0], pixels(*shape, dtype=dtype).astype(np.dtype(dtype).newbyteorder(order)))  # type: ignore[call-overload]
    found = decode(encode(events, PATHS, compression), Fields()).events
    for event, sent in zip(found, events, strict=True):
        assert event.data.dtype == dtype
        assert event.data.dtype.isnative
        assert np.array_equal(event.data, sent.data)
        assert event.identity == sent.identity
        assert event.facts["timestamp"] == sent.facts["timestamp"]
        assert event.facts["photon_energy_eV"] == pytest.approx(9500)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["int32", "float32", "float64"])
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"reversible": True},
        {"accuracy": 0.1},
        {"rate": 8},
        {"rate": 3.5},
        {"precision": 12},
        {"minbits": 20, "maxbits": 700, "maxprec": 20, "minexp": -30},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 1, 9, 17), (2, 3, 5, 6), (1, 1, 1, 30)])
def test_zfp_in_every_mode_is_what_the_library_reads(
    dtype: str, order: str, mode: dict[str, Any], shape: tuple[int, ...]
) -> None:
    if dtype == "int32" and mode.keys() & {"reversible", "accuracy", "minbits"}:
        mode = {"rate": 16}  # the others are for floats
    counts = np.random.default_rng(0).poisson(50, shape).astype(np.dtype(dtype).newbyteorder(order))  # type: ignore[call-overload]
    message = holding(counts, chunks=(1, *shape[1:]), compression=hdf5plugin.Zfp(**mode))
    with h5py.File(io.BytesIO(message)) as file:
        expected = file["data/data"][...]
    found = np.stack([event.data for event in decode(message, Fields()).events])
    assert np.array_equal(found, expected.astype(dtype))


def test_a_short_zfp_stream_reads_nothing_else() -> None:
    """The library's own decoder goes on into the memory that follows."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        dataset = file.create_dataset(
            "data", (1, 1, 256, 256), "f4", chunks=(1, 1, 256, 256), **hdf5plugin.Zfp(accuracy=1)
        )
        dataset.id.write_direct_chunk((0, 0, 0, 0), b"\xff" * 1000)
    first = decode(content.getvalue(), Fields()).events[0].data
    assert np.array_equal(first, decode(content.getvalue(), Fields()).events[0].data)
    assert not first[0, 128:].any()


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (1, 2, 24, 40)},
        {"chunks": (3, 2, 24, 40)},
        {"chunks": (2, 1, 7, 40), "compression": "gzip"},
        {"chunks": (1, 1, 7, 9), "compression": "gzip", "shuffle": True},
        {"chunks": (2, 2, 24, 40), "shuffle": True},
        {"chunks": (4, 3, 7, 40), "maxshape": (None, None, None, None), **BITSHUFFLE},
        {"chunks": (1, 2, 24, 40), **hdf5plugin.Bitshuffle(nelems=128, cname="lz4")},
        {"chunks": (1, 2, 5, 11), **hdf5plugin.Bitshuffle(cname="zstd")},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_every_layout_is_read_as_the_library_does(options: dict[str, Any], libver: str) -> None:
    frames = pixels(3, 2, 24, 40)
    message = made(lambda file: file.create_dataset("data/data", data=frames, **options), libver=libver)
    assert np.array_equal(np.stack([event.data for event in decode(message, Fields()).events]), frames)


def test_noise_that_gzip_leaves_as_it_is() -> None:
    """The library skips a filter for a chunk that it makes larger, and says so in the chunk's mask."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 1, 64, 64), np.uint8)
    message = holding(noise, chunks=(1, 1, 64, 64), compression="gzip", shuffle=True)
    assert np.array_equal(np.stack([event.data for event in decode(message, Fields()).events]), noise)


@pytest.mark.parametrize("options", [{}, {"chunks": (2, 2, 24, 40)}], ids=str)
def test_plain_data_is_a_view_of_the_message(options: dict[str, Any]) -> None:
    message = bytearray(holding(pixels(2, 2, 24, 40), **options))
    event = decode(memoryview(message), Fields()).events[1]
    assert np.shares_memory(event.data, np.frombuffer(message, np.uint8))


def test_compact_data_and_texts() -> None:
    def build(file: h5py.File) -> None:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        frames = pixels(1, 1, 4, 4)
        space = h5py.h5s.create_simple(frames.shape)
        h5py.h5d.create(file.id, b"data", h5py.h5t.IEEE_F32LE, space, dcpl=plist).write(space, space, frames)
        file["sample"] = np.array([b"lysozyme"])

    (event,) = decode(made(build), Fields(others=(("sample", "sample"),))).events
    assert np.array_equal(event.data, pixels(1, 4, 4))
    assert event.facts == {"sample": "lysozyme"}


def test_missing_fields_are_named_with_what_is_there() -> None:
    message = encode(some_events(1), PATHS)
    refused(
        message,
        r"data is not there under /e/d; it holds 'data', 'data/data', 'data/timestamp'",
        Fields.of({"data": "/e/d"}),
    )
    refused(message, "data is not there under /data;", Fields.of({"data": "/data"}))
    refused(message, "timestamp is not there under /t;", Fields.of({"timestamp": "/t"}, required=["timestamp"]))
    assert decode(message, Fields.of({"timestamp": "/t"})).events[0].identity.event == ""


def test_external_storage_is_refused_unread(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(4 * 4 * 4))
    message = made(lambda file: file.create_dataset("data", (1, 1, 4, 4), "f4", external=[(str(secret), 0, 4 * 4 * 4)]))
    with h5py.File(io.BytesIO(message)) as file:
        assert file["data"][...].shape == (1, 1, 4, 4)  # the library reads the local file
    refused(message, "its data is in other files")


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (None, 1, 4, 4)])
def test_virtual_datasets_are_refused(tmp_path: Path, shape: tuple[Any, ...]) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file.create_dataset("data", data=pixels(1, 1, 4, 4), maxshape=shape)
    layout = h5py.VirtualLayout((1, 1, 4, 4), "f4", maxshape=shape)
    layout[...] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "data", (1, 1, 4, 4), maxshape=shape)
    refused(made(lambda file: file.create_virtual_dataset("data", layout)), "its data is in other files")


def test_links_that_may_lead_out_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.h5"
    secret.write_bytes(holding(pixels(1, 1, 4, 4)))

    def link(name: str, to: Any) -> Callable[[h5py.File], None]:
        return lambda file: file.__setitem__(name, to)

    refused(made(link("data/data", h5py.ExternalLink(str(secret), "data/data"))), "'data' is a soft or external link")
    refused(made(link("data", h5py.ExternalLink(str(secret), "data"))), "'data' is a soft or external link")
    refused(made(link("data", h5py.SoftLink("/data"))), "'data' is a soft or external link")
    refused(made(link("data/timestamp", h5py.SoftLink("/out"))), "'timestamp' is a soft or external link")

    def around(file: h5py.File) -> None:
        file["out"] = h5py.ExternalLink(str(secret), "/")
        file["detector_data"] = h5py.SoftLink("/out/data/data")

    refused(made(around), "'detector_data' is a soft or external link")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compression": "lzf"}, r"filter 32000 \('lzf'\)"),
        ({"fletcher32": True}, "filter 3"),
        (dict(hdf5plugin.LZ4()), "filter 32004"),
        (dict(hdf5plugin.Blosc()), "filter 32001"),
        ({"scaleoffset": 2}, "filter 6"),
        (dict(hdf5plugin.Bitshuffle(cname="none")), "bitshuffle with values"),
        ({"shuffle": True, **BITSHUFFLE}, "byte shuffle before filter 32008"),
    ],
    ids=str,
)
def test_other_filters_are_refused_by_number(options: dict[str, Any], said: str) -> None:
    refused(holding(pixels(1, 1, 24, 40), chunks=(1, 1, 24, 40), **options), said)


@pytest.mark.parametrize(
    "data",
    [
        np.zeros((1, 1, 4, 4), "c8"),
        np.zeros((1, 1, 4, 4), bool),
        np.zeros((1, 1, 4, 4), [("a", "f4")]),
        np.full((1, 1, 4, 4), "x", h5py.string_dtype()),
        np.zeros((1, 1, 4, 4), "S3"),
        np.zeros((1, 1, 4, 4), "i8"),
        np.zeros((1, 1, 4, 4), h5py.enum_dtype({"a": 0})),
        np.zeros((1, 1, 4, 4), np.longdouble),
    ],
    ids=lambda data: str(data.dtype),
)
def test_other_types_are_refused(data: Array) -> None:
    refused(holding(data), "expected ")


def test_number_formats_that_numpy_has_not_are_refused() -> None:
    def build(file: h5py.File) -> None:
        kind = h5py.h5t.STD_U16LE.copy()
        kind.set_precision(12)
        kind.set_offset(4)
        h5py.h5d.create(file.id, b"data", kind, h5py.h5s.create_simple((1, 1, 4, 4)))

    refused(made(build), "a number format that numpy has not")


def test_vlen_and_null_data_are_refused() -> None:
    refused(made(lambda file: file.create_dataset("data", (2,), h5py.vlen_dtype(np.float32))), "expected plain numbers")
    refused(made(lambda file: file.create_dataset("data", data=h5py.Empty("f4"))), "it has no shape")


def test_declared_sizes_are_checked_before_anything_is_made() -> None:
    huge = {"chunks": (1, 1, 1024, 1024), "compression": "gzip"}
    refused(
        made(lambda file: file.create_dataset("data", (1 << 20, 1, 1024, 1024), "f4", **huge)),
        "declares 4398046511104 bytes",
    )
    wide = {"chunks": (1, 1, 20_000, 20_000), "maxshape": (None,) * 4, "compression": "gzip"}
    refused(
        made(lambda file: file.create_dataset("data", (1, 1, 2, 2), "f4", **wide)),
        "1600000000 bytes",
        Fields(largest_bytes=1 << 20),
    )
    refused(made(lambda file: file.create_dataset("data", (1, 1, 0, 2), "f4")), "expected sizes of 1 and more")
    refused(made(lambda file: file.create_dataset("data", (1, 1, 2, 2), "f4")), "0 bytes are stored, expected 16")
    refused(
        made(lambda file: file.create_dataset("data", (2, 1, 2, 2), "f4", chunks=(1, 1, 2, 2))), "0 chunks are there"
    )
    tiny = {"chunks": (1, 1, 1, 1)}
    refused(made(lambda file: file.create_dataset("data", (1, 1, 400, 400), "f4", **tiny)), "100000 at most")


def test_a_gzip_bomb_in_a_chunk_takes_no_memory() -> None:
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        dataset = file.create_dataset("data", (1, 1, 8, 8), "f4", chunks=(1, 1, 8, 8), compression="gzip")
        dataset.id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(1 << 26)))
    refused(content.getvalue(), "inflates to other than the 256 bytes")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda chunk: chunk[:-1], "do not end where its bytes do"),
        (lambda chunk: chunk + b"\0", "do not end where its bytes do"),
        (lambda chunk: chunk[:5], "too few for their header"),
        (lambda chunk: struct.pack(">QI", 1 << 40, 8192) + chunk[12:], "compressed from 1099511627776 bytes"),
        (lambda chunk: chunk[:8] + bytes(4) + chunk[12:], "in blocks of 0 bytes"),
        (lambda chunk: chunk[:8] + struct.pack(">I", 8191) + chunk[12:], "in blocks of 8191 bytes"),
        (lambda chunk: chunk[:12] + b"\xff" * 4 + chunk[16:], "do not end where its bytes do"),
        (lambda chunk: chunk[:16] + b"\xff" * 8 + chunk[24:], "compressed bytes are damaged"),
    ],
)
def test_blocks_that_would_lead_a_decoder_beyond_them_are_refused(spoil: Callable[[bytes], bytes], said: str) -> None:
    """The filter itself reads beyond its input for most of these: the process dies."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        dataset = file.create_dataset("data", data=pixels(1, 1, 64, 100), chunks=(1, 1, 64, 100), **BITSHUFFLE)
        chunk = bytes(dataset.id.read_direct_chunk((0, 0, 0, 0))[1])
        dataset.id.write_direct_chunk((0, 0, 0, 0), spoil(chunk))
    refused(content.getvalue(), said)


def test_zfp_headers_of_another_shape_are_refused() -> None:
    message = holding(pixels(1, 1, 64, 100), chunks=(1, 1, 64, 100), **hdf5plugin.Zfp(accuracy=1))
    other = holding(pixels(1, 1, 64, 101), chunks=(1, 1, 64, 101), **hdf5plugin.Zfp(accuracy=1))
    values = []
    for each in (message, other):
        with h5py.File(io.BytesIO(each)) as file:
            values.append(np.array(file["data/data"].id.get_create_plist().get_filter(0)[2][1:], "<u4").tobytes())
    refused(message.replace(*values), "of another shape, type or version")
    slow = values[0][:8] + np.array([0xFFFFFFFF] * 2, "<u4").tobytes()
    refused(message.replace(values[0], slow[: len(values[0])]), "ZFP|of another shape")


def test_what_is_no_file_is_refused() -> None:
    message = encode(some_events(1), PATHS)
    refused(b"", "it is empty")
    refused(message[:1000], "HDF5 message: damaged")
    refused(b"PK\3\4", "expected b'")
    refused(bytes(512) + message, "expected b'")


def test_what_cannot_be_encoded() -> None:
    with pytest.raises(InputError, match="compression 'lzma': expected one of gzip, bslz4, bszstd, zfp"):
        encode(some_events(1), PATHS, "lzma")
    with pytest.raises(InputError, match=r"paths\.laser"):
        encode(some_events(1), {**PATHS, "laser": "/l"})
    with pytest.raises(InputError, match=r"paths\.data"):
        encode(some_events(1), {"timestamp": "/t"})
