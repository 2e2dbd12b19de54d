"""Durable files: whole or not there, refused untouched where they are somebody else's."""

import os
from pathlib import Path

import pytest

from halfstep.errors import BusyError, FileError, InputError
from halfstep.files import alone, claim, file_errors, is_unfinished, new_folder, place, replacing, write_durably


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_durably(path, b"old")
    with pytest.raises(KeyError), replacing(path) as unfinished:
        unfinished.write_bytes(b"half of the new")
        assert path.read_bytes() == b"old"
        raise KeyError
    assert (path.read_bytes(), listed(tmp_path)) == (b"old", ["a.txt"])
    with replacing(path) as unfinished:
        unfinished.write_bytes(b"new")
        assert is_unfinished(unfinished)
    assert (path.read_bytes(), listed(tmp_path)) == (b"new", ["a.txt"])


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out") as unfinished:
        (unfinished / "deep").mkdir()
        (unfinished / "deep" / "a").touch()
        raise ZeroDivisionError
    assert listed(tmp_path) == []
    (tmp_path / "out").mkdir()  # empty
    with new_folder(tmp_path / "out") as unfinished:
        (unfinished / "a").write_text("x")
    assert listed(tmp_path / "out") == ["a"]
    with pytest.raises(FileError), new_folder(tmp_path / "out") as unfinished:
        (unfinished / "b").touch()
    assert (listed(tmp_path), listed(tmp_path / "out")) == (["out"], ["a"])


def test_whose_a_folder_is(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    assert not claim(folder, "run", ("config.json",))
    assert not folder.exists()
    folder.mkdir()
    (folder / ".lock").touch()
    assert not claim(folder, "run", ("config.json",))
    (folder / "thesis.txt").touch()
    (folder / "photos").mkdir()
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    with pytest.raises(InputError, match=r"f: holds photos, thesis.txt and is no run; name a new or empty folder"):
        claim(folder, "run", ("config.json",))
    with pytest.raises(InputError, match=r"f: holds \.lock, photos and 1 more; name a new folder for the export"):
        claim(folder, "export")
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before
    (folder / "config.json").touch()
    assert claim(folder, "run", ("other", "config.json"))
    with pytest.raises(InputError, match=r"thesis.txt: is a file; name a folder for the run"):
        claim(folder / "thesis.txt", "run")


def test_one_holds_a_folder(tmp_path: Path) -> None:
    with alone(tmp_path / "new"):
        with pytest.raises(BusyError, match="is being written by another process"), alone(tmp_path / "new"):
            pass
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()  # nothing was written
    with alone(tmp_path / "new"):
        (tmp_path / "new" / "a").touch()
    assert listed(tmp_path / "new") == [".lock", "a"]


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (28, "No space left on device; what was complete before is kept; free some space"),
        (13, "Permission denied; check its owner and mount, or name another place"),
        (20, "Not a directory; name another place"),
        (5, "Input/output error; what was complete before is kept"),
    ],
)
def test_errors_of_the_system_are_one_line(number: int, told: str) -> None:
    with pytest.raises(FileError, match=f"^/some/file: {told}"), file_errors("elsewhere"):
        raise OSError(number, os.strerror(number), "/some/file")


def test_a_place_is_a_path_or_a_url() -> None:
    assert place("a/b") == Path("a/b")
    assert place("file:///a/b%20c") == Path("/a/b c")
    assert place("s3://bucket/a") == "s3://bucket/a"
