"""What the message formats share: which key is what, shapes, names, energies; and that damage is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.errors import InputError
from halfstep.stream.events import Array, Message, MessageError
from halfstep.stream.formats import FORMATS, Fields
from halfstep.stream.formats.arrays import HC_EV_ANGSTROM, energy_of, events_shape, message_of, names_of
from tests.stream.messages import all_messages, pixels

MESSAGES = all_messages()


def decoded(arrays: dict[str, Array], fields: Fields = Fields()) -> Message:  # noqa: B008
    return message_of(fields, lambda key, _: arrays.get(key), lambda: list(arrays))


def test_valid_messages_are_read() -> None:
    for name, (format_name, message, fields) in MESSAGES.items():
        found = FORMATS[format_name](memoryview(bytearray(message)), fields)
        assert found.starts or found.ends or found.events[0].data.shape == (2, 24, 40), name


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(MESSAGES)), st.data())
def test_damage_is_refused_in_one_line_or_does_no_harm(name: str, draw: st.DataObject) -> None:
    format_name, message, fields = MESSAGES[name]
    damaged = bytearray(message)
    for _ in range(draw.draw(st.sampled_from([0, 1, 1, 3]))):
        # Half of them in the first bytes, where a format says what it holds.
        places = st.integers(0, min(3000, len(damaged) - 1)) | st.integers(0, len(damaged) - 1)
        damaged[draw.draw(places)] = draw.draw(st.integers(0, 255))
    if draw.draw(st.booleans()):
        del damaged[draw.draw(st.integers(0, len(damaged) - 1)) :]
    try:
        found = FORMATS[format_name](bytes(damaged), fields)
    except MessageError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600
    else:
        assert isinstance(found, Message)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.binary(max_size=200))
def test_any_bytes_are_refused_in_one_line_or_are_a_message(name: str, message: bytes) -> None:
    try:
        FORMATS[name](message, Fields(shape=(1, 1)))
    except MessageError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("shape", "original", "stamps", "expected"),
    [
        ((5, 6), None, None, (1, 1, 5, 6)),
        ((3, 5, 6), None, None, (3, 1, 5, 6)),
        ((3, 5, 6), None, 3, (3, 1, 5, 6)),
        ((3, 5, 6), None, 1, (1, 3, 5, 6)),
        ((1, 5, 6), None, 1, (1, 1, 5, 6)),
        ((3, 2, 5, 6), None, 3, (3, 2, 5, 6)),
        ((6, 1, 5, 6), None, 6, (6, 1, 5, 6)),
        ((6, 1, 5, 6), (3, 2, 5, 6), 3, (3, 2, 5, 6)),
        ((6, 1, 5, 6), (3, 2, 4, 3), 3, (3, 2, 5, 6)),  # padded
        ((3, 2, 5, 6), (3, 2, 5, 6), 3, (3, 2, 5, 6)),
        ((6, 5, 6), (3, 2, 5, 6), 3, (3, 2, 5, 6)),
    ],
)
def test_shapes_that_are_understood(
    shape: tuple[int, ...], original: tuple[int, ...] | None, stamps: int | None, expected: tuple[int, ...]
) -> None:
    assert events_shape(shape, original, stamps) == expected


@pytest.mark.parametrize(
    ("shape", "original"),
    [
        ((5,), None),
        ((2, 3, 4, 5, 6), None),
        ((6, 1, 5, 6), (2, 2, 5, 6)),
        ((2, 3, 5, 6), (3, 2, 5, 6)),
        ((6, 1, 5, 6), (3, 2, 5, 7)),
        ((6, 1, 5, 6), (3, 2, 5)),
        ((6, 1, 5, 6), (-3, -2, 5, 6)),
    ],
)
def test_shapes_that_are_refused(shape: tuple[int, ...], original: tuple[int, ...] | None) -> None:
    with pytest.raises(MessageError, match="shape"):
        events_shape(shape, original, None)


def test_merged_panels_go_back_to_their_events() -> None:
    batch = pixels(3, 2, 5, 6)
    merged = {
        "detector_data": batch.reshape(6, 1, 5, 6),
        "detector_data_original_shape": np.array(batch.shape, np.int32),
        "timestamp": np.arange(1, 4, dtype=np.uint64),
    }
    assert all(np.array_equal(event.data, frame) for event, frame in zip(decoded(merged).events, batch, strict=True))
    del merged["detector_data_original_shape"]
    with pytest.raises(MessageError, match=r"6 events but 3 values of timestamp.*original_shape"):
        decoded(merged)


def test_facts_are_python_values_and_what_is_missing_is_left_out() -> None:
    arrays = {
        "data": pixels(3, 1, 4, 4),
        "timestamp": np.array([1.5, np.nan, 2.5]),
        "wavelength": np.array([[1.3], [0.0], [np.nan]]),
        "laser": np.array([1, -999, 3], np.int16),
        "sample": np.array(["a", "None", "c"]),
        "spectrum": np.zeros((3, 7)),
    }
    others = (("laser", "laser"), ("sample", "sample"), ("spectrum", "spectrum"), ("not there", "x"))
    first, second, third = decoded(arrays, Fields(others=others)).events
    energy = HC_EV_ANGSTROM / 1.3
    assert first.facts == {"timestamp": 1.5, "laser": 1, "sample": "a", "photon_energy_eV": energy}
    assert [type(value) for value in first.facts.values()] == [float, int, str, float]
    assert second.facts == {}
    assert third.facts == {"timestamp": 2.5, "laser": 3, "sample": "c"}
    assert [event.identity.event for event in (first, second, third)] == ["1.5", "", "2.5"]


def test_timestamps_keep_their_type() -> None:
    for stamps in (np.array([(1 << 63) + 1], np.uint64), np.array([0.1])):
        (event,) = decoded({"data": pixels(1, 1, 4, 4), "timestamp": stamps}).events
        assert event.facts["timestamp"] == stamps[0].item()
        assert type(event.facts["timestamp"]) is type(stamps[0].item())
        assert event.identity == ("", "", repr(stamps[0].item()), -1)


def test_equal_timestamps_have_names_of_their_own_that_a_replay_repeats() -> None:
    assert names_of([7, 8, 7, 7]) == ["7.0", "8", "7.1", "7.2"]
    assert names_of([9, 7, 7, 7]) == ["9", "7.0", "7.1", "7.2"]
    assert names_of([None, None]) == ["", ""]


def test_wavelengths_are_metres_or_angstrom() -> None:
    assert energy_of(None, 1.0) == pytest.approx(12398.419843320026)
    assert energy_of(None, 1e-10) == pytest.approx(12398.419843320026)
    assert energy_of(9500, 1.0) == 9500
    assert energy_of(0, 0) is energy_of(None, float("inf")) is energy_of(None, 5e-324) is energy_of(None, "1") is None


@pytest.mark.parametrize("dtype", ["complex64", "bool", "int64", "uint64", "<U3", "S3", "object", "datetime64[s]"])
def test_other_types_of_data_are_refused(dtype: str) -> None:
    with pytest.raises(MessageError, match="expected one of float16"):
        decoded({"data": np.zeros((1, 1, 4, 4)).astype(dtype)})


def test_data_comes_in_native_and_c_order() -> None:
    frames = pixels(2, 3, 4, 5)
    for sent in (frames.astype(">f4"), np.asfortranarray(frames)):
        for event, frame in zip(decoded({"data": sent}).events, frames, strict=True):
            assert event.data.dtype == np.float32
            assert event.data.dtype.isnative
            assert event.data.flags.c_contiguous
            assert np.array_equal(event.data, frame)


def test_fields_of_a_user() -> None:
    fields = Fields.of({"detector_data": "/e/d", "timestamp": "t", "beam": "b"}, required=["detector_data", "beam"])
    assert fields.data == ("/e/d",)
    assert fields.original_shape == ("/e/d_original_shape",)
    assert fields.photon_wavelength == Fields().photon_wavelength
    assert fields.others == (("beam", "b"),)
    assert fields.required == {"data", "beam"}
    with pytest.raises(MessageError, match=r"beam is not there under b; it holds /e/d: set fields\.beam"):
        decoded({"/e/d": pixels(1, 1, 4, 4)}, fields)
    with pytest.raises(InputError, match=r"fields\.data: '/' is not a key"):
        Fields.of({"data": "/"})
    with pytest.raises(InputError, match=r"shape: \[3\] is not that of an image"):
        Fields.of({}, shape=[3])


def test_a_start_tells_the_shape() -> None:
    fields = Fields()
    assert fields.after(Message(starts=True, facts={"shape": "8x512x1024"})).shape == (8, 512, 1024)
    for text in ("8x0x4", "8", "axb", "²x2", ""):
        assert fields.after(Message(starts=True, facts={"shape": text})) == fields
    assert fields.after(Message(facts={"shape": "8x8"})) == fields
