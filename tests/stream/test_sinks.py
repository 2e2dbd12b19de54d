"""Files of results, read back the way their readers do: CXI as CrystFEL's C code does, Parquet and masks as users."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfstep.errors import FileError, InputError, StoreError
from halfstep.stream.events import Event, Fact, Identity, Result
from halfstep.stream.sinks.cxi import CxiSettings, geometry, is_hit, write_cxi
from halfstep.stream.sinks.events import EventRow, read_events, read_events_seen, read_identities, write_events
from halfstep.stream.sinks.facts import check_identity
from halfstep.stream.sinks.masks import write_masks

assert hdf5plugin.FILTERS  # that bslz4 can be read
Array = np.ndarray[Any, np.dtype[Any]]
FEW = CxiSettings(min_peaks=1)
# Every type of the wire that HDF5 has, the big-endian ones too.
DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"]
DTYPES += [">u2", ">i4", ">f4", ">f8"]


def of_bits(dtype: str, shape: Sequence[int], seed: int = 0) -> Array:
    """Numbers of any bits at all, NaN with payloads among them."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(size), dtype).reshape(shape)


def result(
    number: int = 0,
    peaks: int = 3,
    shape: tuple[int, int, int] = (2, 6, 8),
    dtype: str = "uint16",
    facts: Mapping[str, Fact] | None = None,
    identity: Identity | None = None,
    data: Array | None = None,
) -> Result:
    random = np.random.default_rng(number)
    places = np.stack([random.integers(shape[0], size=peaks), *(random.random(peaks) * (n - 1) for n in shape[1:])], 1)
    event = Event(
        identity or Identity("run", "source", str(number), number),
        of_bits(dtype, shape, number) if data is None else data,
        facts or {},
    )
    strengths = random.random(peaks).astype(np.float32)
    return Result(event, places.astype(np.float32).reshape(peaks, 3), strengths, of_bits("uint8", shape, number) > 127)


class Geometry:
    """What CrystFEL takes from a geometry file: settings, and the ranges of each panel within the slab."""

    def __init__(self, text: str) -> None:
        plain = [line.partition(";")[0] for line in text.splitlines()]
        self.values = dict(tuple(part.strip() for part in line.split(" = ")) for line in plain if line)
        names = [key.partition("/")[0] for key in self.values if key.endswith("/min_fs")]
        edges = ("min_fs", "max_fs", "min_ss", "max_ss")
        self.panels = [tuple(int(self.values[f"{name}/{edge}"]) for edge in edges) for name in names]

    def panel_of(self, fs: float, ss: float) -> tuple[int, float, float]:
        """`data_template_slabby_file_to_panel_coords`."""
        (found,) = [
            (number, fs - min_fs, ss - min_ss)
            for number, (min_fs, max_fs, min_ss, max_ss) in enumerate(self.panels)
            if min_fs <= fs < max_fs + 1 and min_ss <= ss < max_ss + 1
        ]
        return found


def read_as(file: h5py.File, path: str, row: int, kind: Any, dtype: Any, dimensions: int) -> Array:
    """One row with `H5Dread` into the machine's own type."""
    dataset = file[path].id
    space = dataset.get_space()
    shape = space.get_simple_extent_dims()
    assert len(shape) == dimensions
    values = np.empty((1, *shape[1:]), dtype)
    space.select_hyperslab((row, *[0] * (dimensions - 1)), values.shape)
    dataset.read(h5py.h5s.create_simple(values.shape), space, values, mtype=kind)
    return values[0]


def indexamajig(path: Path, text: str, row: int) -> tuple[list[Array], list[tuple[int, float, float, float]]]:
    """The panels' pixels and the peaks (panel, fs, ss from the panel's corner, intensity), as `image_hdf5_read` and
    `image_hdf5_read_peaks_cxi` get them for the event `//row`: floats all, and half a pixel added to places."""
    geometry = Geometry(text)
    assert [geometry.values[f"dim{axis}"] for axis in range(3)] == ["%", "ss", "fs"]
    where = geometry.values["peak_list"]
    with h5py.File(path) as file:
        slab = read_as(file, geometry.values["data"], row, h5py.h5t.NATIVE_FLOAT, np.float32, 3)
        images = [slab[s0 : s1 + 1, f0 : f1 + 1] for f0, f1, s0, s1 in geometry.panels]
        count = int(read_as(file, f"{where}/nPeaks", row, h5py.h5t.NATIVE_INT32, np.int32, 1))
        x, y, strength = (
            read_as(file, f"{where}/{name}", row, h5py.h5t.NATIVE_FLOAT, np.float32, 2)
            for name in ("peakXPosRaw", "peakYPosRaw", "peakTotalIntensity")
        )
    assert count <= len(x) == len(y) == len(strength)
    places = zip(x[:count], y[:count], strength, strict=False)
    return images, [(*geometry.panel_of(fs + 0.5, ss + 0.5), float(v)) for fs, ss, v in places]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_indexamajig_finds_pixels_and_peaks_where_they_were(tmp_path: Path, dtype: str) -> None:
    results = [result(number, number + 1, (3, 6, 8), dtype) for number in range(4)]
    own = CxiSettings(min_peaks=1, peak_list="/a/peaks", data="/b/c/data")
    assert write_cxi(tmp_path / "x.cxi", results, own) == 4
    for row, one in enumerate(results):
        images, peaks = indexamajig(tmp_path / "x.cxi", geometry(3, 6, 8, own), row)
        np.testing.assert_array_equal(np.stack(images), one.event.data.astype(np.float32))
        assert len(peaks) == row + 1
        for (panel, fs, ss, strength), place, sent in zip(peaks, one.peaks, one.intensities, strict=True):
            assert panel == place[0]
            assert (ss, fs) == pytest.approx((place[1] + 0.5, place[2] + 0.5), abs=1e-5)
            assert strength == sent


def test_a_whole_number_is_the_center_of_its_pixel(tmp_path: Path) -> None:
    """A peak of one bright pixel, in each corner of each panel: CrystFEL must look at that pixel, in its middle."""
    corners = [(panel, y, x) for panel in range(3) for y in (0, 5) for x in (0, 7)]
    data = np.zeros((3, 6, 8), np.int32)
    for number, place in enumerate(corners):
        data[place] = 100 + number
    one = Result(result().event, np.array(corners, np.float32), np.arange(100, 112, dtype=np.float32))
    one = Result(Event(one.event.identity, data), one.peaks, one.intensities)
    write_cxi(tmp_path / "x.cxi", [one], CxiSettings())
    images, peaks = indexamajig(tmp_path / "x.cxi", geometry(3, 6, 8, CxiSettings()), 0)
    assert len(peaks) == 12
    for panel, fs, ss, strength in peaks:
        assert images[panel][int(ss), int(fs)] == strength
        assert (fs % 1, ss % 1) == (0.5, 0.5)


@pytest.mark.parametrize("compression", ["none", "gzip", "bslz4"])
@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
def test_values_of_the_wire_bit_for_bit(tmp_path: Path, dtype: str, compression: Any) -> None:
    shape = (2, 16, 20)
    results = [result(n, dtype="uint8", shape=shape, data=of_bits("uint8", shape, n) % 2 > 0) for n in range(3)]
    if dtype != "bool":
        results = [result(number, dtype=dtype, shape=shape) for number in range(3)]
    results[1] = result(1, data=np.asfortranarray(results[1].event.data))
    write_cxi(tmp_path / "x.cxi", results, CxiSettings(min_peaks=1, compression=compression))
    with h5py.File(tmp_path / "x.cxi") as file:
        data = file["entry_1/data_1/data"]
        assert (data.shape, data.chunks) == ((3, 32, 20), (1, 32, 20))
        assert data.dtype == ("uint8" if dtype == "bool" else dtype)
        for row, one in enumerate(results):
            assert data[row].tobytes() == one.event.data.tobytes()


def test_only_hits_and_no_file_without_one(tmp_path: Path) -> None:
    results = [result(number, peaks) for number, peaks in enumerate([9, 10, 0, 11])]
    assert [is_hit(one, CxiSettings()) for one in results] == [False, True, False, True]
    assert write_cxi(tmp_path / "x.cxi", results, CxiSettings()) == 2
    with h5py.File(tmp_path / "x.cxi") as file:
        assert list(file["halfstep/event"].asstr()) == ["1", "3"]
        assert list(file["entry_1/result_1/nPeaks"]) == [10, 11]
    assert write_cxi(tmp_path / "y.cxi", results[:1], CxiSettings()) == 0
    assert write_cxi(tmp_path / "y.cxi", [], CxiSettings()) == 0
    assert write_masks(tmp_path / "y.h5", []) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.cxi"]


def test_the_strongest_peaks_are_kept_and_the_others_counted(tmp_path: Path) -> None:
    many = result(5, 50)
    many = Result(many.event, many.peaks, np.where(np.arange(50) % 7 == 3, np.nan, many.intensities))
    write_cxi(tmp_path / "x.cxi", [result(1, 4), many], CxiSettings(min_peaks=2, max_peaks=20))
    numbers = sorted(sorted(range(50), key=lambda n: -many.intensities[n] if n % 7 != 3 else math.inf)[:20])
    with h5py.File(tmp_path / "x.cxi") as file:
        assert list(file["halfstep/peaks_cut"]) == [0, 30]
        assert list(file["entry_1/result_1/nPeaks"]) == [4, 20]
        np.testing.assert_array_equal(file["entry_1/result_1/peakTotalIntensity"][1], many.intensities[numbers])
        np.testing.assert_array_equal(file["entry_1/result_1/peakXPosRaw"][1], many.peaks[numbers, 2])
        assert not file["entry_1/result_1/peakXPosRaw"][0, 4:].any()


NAMES = [
    Identity("été 2026/\U0001f52c", "rank-0", "00\n\t'\"", 0),
    Identity("", "", "", -1),
    Identity("r" * 70_000, "日本" * 40_000, "e" * 1_000_000, (1 << 63) - 1),
]


def test_identities_come_back(tmp_path: Path) -> None:
    results = [result(number, identity=identity) for number, identity in enumerate(NAMES)]
    write_cxi(tmp_path / "x.cxi", results, FEW)
    write_masks(tmp_path / "x.h5", results)
    write_events(tmp_path / "x.parquet", [EventRow(one, False, 0, 0.0) for one in results])
    assert read_identities(tmp_path / "x.parquet") == NAMES
    for name in ("x.cxi", "x.h5"):
        with h5py.File(tmp_path / name) as file:
            own = file["halfstep"]
            texts = [own[part].asstr()[()] for part in ("run", "source", "event")]
            assert [Identity(*one) for one in zip(*texts, own["sequence"], strict=True)] == NAMES
            assert (own["sequence"].dtype, own.attrs["version"]) == ("int64", 1)
            assert [own.attrs[part] for part in ("panels", "height", "width")] == [2, 6, 8]


@pytest.mark.parametrize("bad", [("a\0b", 0), ("\ud800", 0), ("a", 1 << 63), ("a", -2)])
def test_an_identity_that_cannot_be_stored_is_refused_by_every_file(tmp_path: Path, bad: tuple[str, int]) -> None:
    one = result(identity=Identity("run", bad[0], "1", bad[1]))
    for write in (
        lambda: check_identity(one.event.identity),
        lambda: write_cxi(tmp_path / "x", [one], FEW),
        lambda: write_masks(tmp_path / "x", [one]),
        lambda: write_events(tmp_path / "x", [EventRow(one, False, 0, 0.0)]),
    ):
        with pytest.raises(InputError, match="cannot be stored"):
            write()
    assert not list(tmp_path.iterdir())


NANOSECONDS = (1_700_000_000 << 32) + 123_456_789  # s << 32 | ns: 63 bits
FLOAT = 1_700_000_000.123456


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([NANOSECONDS, (1 << 64) - 1, None], {"timestamp": np.array([NANOSECONDS, (1 << 64) - 1, 0], np.uint64)}),
        ([FLOAT, None, 5.0], {"timestamp": np.array([FLOAT, np.nan, 5])}),
        (
            [NANOSECONDS, FLOAT, "noon", -1],
            {
                "timestamp": np.array([np.nan, FLOAT, np.nan, np.nan]),
                "timestamp_uint64": np.array([NANOSECONDS, 0, 0, 0], np.uint64),
            },
        ),
        ([None, "noon"], {}),
    ],
)
def test_timestamps_as_they_were_sent(tmp_path: Path, sent: list[Any], expected: dict[str, Array]) -> None:
    results = [result(n, facts={} if value is None else {"timestamp": value}) for n, value in enumerate(sent)]
    write_cxi(tmp_path / "x.cxi", results, FEW)
    with h5py.File(tmp_path / "x.cxi") as file:
        found = {name: values[()] for name, values in file["LCLS"].items() if name != "photon_energy_eV"}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


def test_photon_energies(tmp_path: Path) -> None:
    sent: list[Mapping[str, Fact]] = [{"photon_energy_eV": 9500.25}, {}, {"photon_energy_eV": 9000}]
    write_cxi(tmp_path / "x.cxi", [result(n, facts=facts) for n, facts in enumerate(sent)], FEW)
    with h5py.File(tmp_path / "x.cxi") as file:
        energies = file["LCLS/photon_energy_eV"]
        assert energies.dtype == np.float64
        np.testing.assert_array_equal(energies, [9500.25, np.nan, 9000])


@pytest.mark.parametrize(
    "other",
    [
        result(1, shape=(2, 8, 6)),
        result(1, dtype="int16"),
        result(1, dtype="complex64"),
        result(1, data=np.ones((6, 8))),
    ],
)
def test_what_does_not_fit_into_one_file_is_refused_before_it_is_begun(tmp_path: Path, other: Result) -> None:
    with pytest.raises(InputError, match=r"event '1': got .*; expected"):
        write_cxi(tmp_path / "x.cxi", [result(0), other], FEW)
    with pytest.raises(InputError, match="1 of 2 results have none"):
        write_masks(tmp_path / "x.h5", [result(0), Result(other.event, other.peaks, other.intensities)])
    assert not list(tmp_path.iterdir())
    assert write_cxi(tmp_path / "x.cxi", [result(0, 9), Result(other.event, other.peaks[:0], other.intensities)], FEW)


def test_settings_that_cannot_be() -> None:
    for bad in ({"min_peaks": 0}, {"max_peaks": 9}, {"compression": "zip"}, {"data": "x"}, {"peak_list": "/a/%/b"}):
        with pytest.raises(InputError, match="expected"):
            CxiSettings(**bad)  # type: ignore[arg-type]


def test_a_live_geometry_has_no_axis_of_events() -> None:
    """CrystFEL refuses a message for a geometry with `dim0 = %`."""
    values = Geometry(geometry(2, 6, 8, CxiSettings(), live=True)).values
    assert (values["data"], values["peak_list"]) == ("detector_data", "peak_list")
    assert not any(key.startswith("dim") for key in values)


FULL_DISK = """
import resource, sys
from pathlib import Path
from halfstep.errors import FileError
from halfstep.stream.sinks.cxi import CxiSettings, write_cxi
from halfstep.stream.sinks.events import EventRow, write_events
from halfstep.stream.sinks.masks import write_masks
from tests.stream.test_sinks import result

folder = Path(sys.argv[1])
results = [result(n, 200, (1, 64, 64)) for n in range(20)]
writers = [
    lambda: write_cxi(folder / "x.cxi", results, CxiSettings()),
    lambda: write_cxi(folder / "x.cxi", results, CxiSettings(compression="gzip")),
    lambda: write_masks(folder / "x.h5", results),
    lambda: write_events(folder / "x.parquet", [EventRow(one, False, 0, 0.0) for one in results]),
]
for write in writers:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    write()
    (path,) = folder.iterdir()
    size = path.stat().st_size
    for limit in [size * part // 20 for part in range(20)]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            write()
        except FileError as error:
            print(error)
    path.unlink()
"""


def test_a_full_disk_is_an_error_in_one_line_and_no_crash(tmp_path: Path) -> None:
    """Wherever in the file it happens. HDF5 by itself ends the process with a segmentation fault."""
    ran = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    assert len(lines) == 4 * 20
    assert {line.partition(": ")[2].partition(";")[0] for line in lines} == {"File too large"}


def test_a_file_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none" / "x", tmp_path / "folder"):
        for write in (
            lambda path: write_cxi(path, [result()], FEW),
            lambda path: write_masks(path, [result()]),
            lambda path: write_events(path, []),
        ):
            with pytest.raises(FileError, match=f"^{path}: "):
                write(path)
    with pytest.raises(FileError, match="No such file"):
        read_identities(tmp_path / "none")


def test_masks(tmp_path: Path) -> None:
    results = [result(number) for number in range(3)]
    assert write_masks(tmp_path / "x.h5", results) == 3
    with h5py.File(tmp_path / "x.h5") as file:
        assert (file["mask"].dtype, file["mask"].chunks) == ("uint8", (1, 2, 6, 8))
        np.testing.assert_array_equal(file["mask"], np.stack([one.mask for one in results if one.mask is not None]))


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
IDENTITIES = st.builds(Identity, TEXTS, TEXTS, TEXTS, st.integers(-1, (1 << 63) - 1))
VALUES = st.integers() | st.floats() | st.text(max_size=10)
FACTS = st.dictionaries(st.sampled_from(["timestamp", "photon_energy_eV", "a", "é", ""]), VALUES)
ROWS = st.builds(
    EventRow,
    st.builds(
        result,
        st.integers(0, 9),
        st.integers(0, 40),
        st.tuples(*[st.integers(1, 4)] * 3),
        st.sampled_from(DTYPES),
        FACTS,
        IDENTITIES,
    ),
    st.booleans(),
    st.integers(0, (1 << 32) - 1),
    st.floats(0, 1e12),
    TEXTS,
    st.none() | TEXTS,
    st.none() | st.integers(0, 99),
)


def same(found: Any, sent: Any) -> bool:
    return type(found) is type(sent) and (found == sent or (found != found and sent != sent))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.lists(ROWS, max_size=6))
def test_a_table_says_all_that_was_known(tmp_path: Path, rows: list[EventRow]) -> None:
    path = tmp_path / "x.parquet"
    write_events(path, rows)
    assert read_identities(path) == [row.result.event.identity for row in rows]
    assert read_events_seen(path) == [(row.result.event.identity, row.crc32c) for row in rows]
    table = read_events(path)
    assert table.num_rows == len(rows)
    for row, line in zip(rows, table.to_pylist(), strict=True):
        one = row.result
        assert [line[name] for name in ("panels", "height", "width")] == list(one.event.data.shape)
        assert np.dtype(line["dtype"]) == one.event.data.dtype
        columns = [line[f"peak_{name}"] for name in ("panel", "y", "x")]
        np.testing.assert_array_equal(np.array(columns, np.float32).reshape(3, -1).T, one.peaks)
        np.testing.assert_array_equal(np.array(line["peak_intensity"], np.float32), one.intensities)
        assert line["n_peaks"] == len(one.peaks)
        for name in ("retried_in_fp32", "crc32c", "received", "network", "file", "row"):
            assert same(line[name], getattr(row, name))
        # Every fact is in one place, and is what was sent.
        told = json.loads(line["facts"], parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        told = {name: float(v) if isinstance(one.event.facts[name], float) else v for name, v in told.items()}
        for name in ("timestamp", "timestamp_uint64", "photon_energy_eV"):
            if line[name] is not None:
                told.setdefault(name.removesuffix("_uint64"), line[name])
        assert told.keys() == one.event.facts.keys()
        for name, value in one.event.facts.items():
            wanted = float(value) if name == "photon_energy_eV" and isinstance(value, int) else value
            assert same(told[name], wanted)


def test_a_table_names_its_format_and_its_peaks_are_arrays(tmp_path: Path) -> None:
    write_events(tmp_path / "x.parquet", [EventRow(result(n, n), False, 0, 0.0) for n in range(3)])
    assert pq.read_schema(tmp_path / "x.parquet").metadata[b"halfstep.events"] == b"1"
    column = [row.values.to_numpy() for row in read_events(tmp_path / "x.parquet")["peak_y"]]
    assert [(len(values), values.dtype) for values in column] == [(n, np.float32) for n in range(3)]


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    """Cut anywhere it is refused. With a bit flipped anywhere it is refused too, or holds the same events."""
    rows = [EventRow(result(number, 20), False, 0, 0.0) for number in range(5)]
    path, broken = tmp_path / "x.parquet", tmp_path / "broken.parquet"
    write_events(path, rows)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for length in [*range(12), *random.integers(12, len(whole), 50)]:
        broken.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=f"^{broken}: no readable table of events .*; move it away"):
            read_identities(broken)
    refused = 0
    bits = random.integers(0, 8 * len(whole), 300)
    footer = random.integers(4 * len(whole), 8 * len(whole), 300)
    for bit in [*bits, *footer]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        broken.write_bytes(flipped)
        try:
            assert read_identities(broken) == [row.result.event.identity for row in rows]
            assert read_events(broken).num_rows == len(rows)
        except StoreError as error:
            assert str(error).startswith(f"{broken}: ")
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100


def test_other_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"run": ["r"]}), path)
    with pytest.raises(StoreError, match="no readable table of events"):
        read_events(path)
    write_events(path, [])
    assert read_identities(path) == []
    later = read_events(path).replace_schema_metadata({b"halfstep.events": b"2", b"halfstep": b"9.1"})
    sink = io.BytesIO()
    pq.write_table(later, sink)
    path.write_bytes(sink.getvalue())
    with pytest.raises(StoreError, match="is of format 2; expected 1; use a newer halfstep"):
        read_identities(path)
