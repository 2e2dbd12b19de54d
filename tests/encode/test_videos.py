"""Videos: their frames, and the clips that autoencoders over time take."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfstep.autoencoders import load_autoencoder
from halfstep.data.base import contiguous_runs
from halfstep.data.sources import SourceConfig
from halfstep.data.videos import VideoSequence
from halfstep.encode import EncodeOptions, encode
from halfstep.encode.clips import LastClip, cut_clips
from halfstep.errors import InputError
from halfstep.spec import PixelSpec
from halfstep.store import DatasetStore
from tests.support.encoding import run
from tests.support.media import overwrite, packets, write_video
from tests.support.training import Listening


@given(st.sets(st.integers(0, 40)), st.integers(1, 7), st.sampled_from(get_args(LastClip)))
def test_clips_are_their_definition(numbers: set[int], length: int, last: LastClip) -> None:
    frames = [(number, f"frame {number}") for number in sorted(numbers)]
    expected = []
    for start, stop in contiguous_runs([number for number, _ in frames]):
        part = frames[start:stop]
        whole = len(part) // length * length
        expected += [part[i : i + length] for i in range(0, whole, length)]
        rest = part[whole:]
        if rest and last == "pad":
            rest = rest + [rest[-1]] * (length - len(rest))
        elif rest and last == "overlap" and whole:
            rest = part[-length:]
        if rest:
            expected.append(rest)
    assert list(cut_clips(iter(frames), length, last)) == expected


def test_videos_thinned_short_and_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    for label, name, frames in (("run", "a.avi", 20), ("run", "b.avi", 20), ("walk", "c.avi", 3)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        write_video(folder / label / name, frames)
    data = (folder / "run" / "b.avi").read_bytes()
    (folder / "run" / "b.avi").write_bytes(data[: len(data) * 2 // 3])
    report = run(folder, tmp_path / "s")
    store = DatasetStore.open(tmp_path / "s")
    assert report.failed == 1
    assert "run/b.avi" in report.failures[0].reason
    assert [store.length(key) for key in ("run/a.avi", "walk/c.avi")] == [20, 3]
    assert 5 < store.length("run/b.avi") < 20
    assert store.label("walk/c.avi") == "walk"
    again = run(folder, tmp_path / "s")
    assert (again.encoded, again.failed) == (0, 1)  # told again, not encoded again
    thinned = SourceConfig(path=folder, stride=5)
    encode([thinned], EncodeOptions(tmp_path / "t", precision="fp32", storage="fp32", size=(32, 32), batch_size=4))
    every_fifth = DatasetStore.open(tmp_path / "t")
    assert every_fifth.read_array("run/a.avi", "frame").tolist() == [0, 1, 2, 3]
    assert np.array_equal(every_fifth.read("run/a.avi"), store.read("run/a.avi")[::5])


@pytest.mark.slow
def test_clips_through_an_autoencoder_over_time(tmp_path: Path, small_wan: Path) -> None:
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v" / "long.avi", 13)
    write_video(tmp_path / "v" / "short.avi", 3)
    report = run(tmp_path / "v", tmp_path / "s", autoencoder=str(small_wan), clip_length=5, batch_size=1)
    store = DatasetStore.open(tmp_path / "s")
    assert store.read("long.avi").shape == (2, 16, 2, 4, 4)  # the three frames left over make no clip
    assert store.read_array("long.avi", "frame").tolist() == [0, 5]
    assert report.failures[0].reason.endswith("3 frames; one clip has 5")
    assert report.left_out == {"long.avi": 3}
    again = run(tmp_path / "v", tmp_path / "s", autoencoder=str(small_wan), clip_length=5, batch_size=1)
    assert (again.encoded, again.left_out) == (0, {"long.avi": 3})
    options = {"autoencoder": str(small_wan), "clip_length": 5, "batch_size": 1, "precision": "fp32", "storage": "fp32"}
    planned = encode(
        [SourceConfig(path=tmp_path / "v")], EncodeOptions(tmp_path / "s", size=(32, 32), **options), dry_run=True
    )
    assert planned.left_out == {"long.avi": 3}
    with pytest.raises(InputError, match="--clip-length: got 6"):
        run(tmp_path / "v", tmp_path / "t", autoencoder=str(small_wan), clip_length=6)


@pytest.mark.slow
def test_the_last_clip_is_padded_or_overlaps(tmp_path: Path, small_wan: Path) -> None:
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v" / "long.avi", 13)
    write_video(tmp_path / "v" / "short.avi", 3)
    sequence = VideoSequence("long.avi", None, tmp_path / "v" / "long.avi", PixelSpec(32, 32))
    frames = np.stack([load() for _, load in sequence.frames()])
    codec = load_autoencoder(str(small_wan))

    def encoded(places: list[int]) -> np.ndarray:
        clip = torch.from_numpy(frames[places]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        return codec.scaled(codec.encode(clip).mean)[0].detach().numpy()

    options = {"autoencoder": str(small_wan), "clip_length": 5, "batch_size": 1}
    for last, places, failed in (("pad", [10, 11, 12, 12, 12], 0), ("overlap", [8, 9, 10, 11, 12], 1)):
        report = run(tmp_path / "v", tmp_path / last, last_clip=last, **options)
        assert (report.failed, report.left_out) == (failed, {})
        store = DatasetStore.open(tmp_path / last)
        assert store.read_array("long.avi", "frame").tolist() == [0, 5, places[0]]
        np.testing.assert_allclose(store.read("long.avi")[2], encoded(places), rtol=1e-4, atol=1e-4)
        assert ("short.avi" in store.keys()) == (last == "pad")
        again = run(tmp_path / "v", tmp_path / last, **options)  # the store keeps how it was made
        assert (again.encoded, again.left_out) == (0, {})
    notes = Listening()
    sources = [SourceConfig(path=tmp_path / "v")]
    dropped = EncodeOptions(
        tmp_path / "pad", precision="fp32", storage="fp32", size=(32, 32), last_clip="drop", **options
    )
    assert encode(sources, dropped, progress=notes).left_out == {"long.avi": 3}
    assert any("was made with other settings (last_clip: was 'pad', is 'drop')" in line for line in notes.notes)


@pytest.mark.slow
def test_no_clip_crosses_a_lost_frame(tmp_path: Path, small_wan: Path) -> None:
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v" / "v.avi", 20)
    overwrite(tmp_path / "v" / "v.avi", lost := packets(tmp_path / "v" / "v.avi")[7], bytes(len(lost)))
    report = run(tmp_path / "v", tmp_path / "s", autoencoder=str(small_wan), clip_length=5, batch_size=1)
    assert DatasetStore.open(tmp_path / "s").read_array("v.avi", "frame").tolist() == [0, 8, 13]
    assert report.left_out == {"v.avi": 2 + 2}
    assert ["damaged: frame 7 cannot be decoded" in failure.reason for failure in report.failures] == [True]


def test_what_an_older_reader_gave_up_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v" / "v.avi", 20)
    data = (tmp_path / "v" / "v.avi").read_bytes()
    (tmp_path / "v" / "v.avi").write_bytes(data[: len(data) * 2 // 3])
    with monkeypatch.context() as patch:
        patch.setattr("halfstep.encode.filling.READER", 1)
        first = run(tmp_path / "v", tmp_path / "s")
    assert (first.encoded > 5, first.failed) == (True, 1)
    assert [run(tmp_path / "v", tmp_path / "s").encoded for _ in range(2)] == [first.encoded, 0]
