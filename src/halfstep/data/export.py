"""Write the latents of a store in the formats of other tools."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from halfstep.data.walks import POSES_FILE
from halfstep.errors import InputError
from halfstep.files import claim, new_folder
from halfstep.store.dataset import DatasetStore

_TAR_BYTES = 256 << 20


def export(store: DatasetStore, form: str, output: Path) -> int:
    """Write all sequences, model-ready in float32, to the new folder `output`; return the number of items. The folder
    is there whole or not at all.

    `pt-tree`: `<key>/<frame>.pt`, each a dict {"latent": [C, h, w]}, with `traj_data.pkl` where there are poses.
    `npy`: `<key>.npy`, [n, C, (T,) h, w]. `webdataset`: tar files of `<number>.latents.npy` and `<number>.json`, which
    holds key and label. `spec.json` beside them says what the latents are. Raises InputError for another form or when
    `output` is not empty.
    """
    if form not in FORMS:
        raise InputError(f"--format: got {form!r}; expected one of {', '.join(FORMS)}")
    claim(output, "export")
    for key in store.keys():
        parts = PurePosixPath(key).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise InputError(f"{store.location}: key {key!r} would leave the folder of the export; it is not written")
    with new_folder(output) as folder:
        (folder / "spec.json").write_text(json.dumps(store.spec.to_dict(), indent=2) + "\n")
        FORMS[form](store, folder)
    return len(store)


def _pt_tree(store: DatasetStore, output: Path) -> None:
    for key in store.keys():
        folder = output / key
        folder.mkdir(parents=True)
        arrays = store.arrays(key)
        numbers = store.read_array(key, "frame") if "frame" in arrays else np.arange(store.length(key))
        for place, number in enumerate(numbers.tolist()):
            # A latent of its own: saving a view would save the storage of all the others with it.
            latent = torch.from_numpy(store.read(key, place, place + 1)[0])
            buffer = io.BytesIO()  # torch does not say which error of the disk it met
            torch.save({"latent": latent}, buffer)
            (folder / f"{number}.pt").write_bytes(buffer.getbuffer())
        if {"position", "yaw"} <= arrays:
            poses = {name: _filled(store.read_array(key, name), numbers) for name in ("position", "yaw")}
            with (folder / POSES_FILE).open("wb") as file:
                pickle.dump(poses, file)


def _filled(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Poses by frame number again; frames that are not in the store repeat the pose before them."""
    places = np.searchsorted(numbers, np.arange(int(numbers[-1]) + 1), side="right") - 1
    filled: np.ndarray = values[np.maximum(places, 0)]
    return filled


def _npy(store: DatasetStore, output: Path) -> None:
    for key in store.keys():
        path = output / f"{key}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.ascontiguousarray(store.read(key))
        with path.open("wb") as file:  # as np.save, which does not say which error of the disk it met
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
            file.write(values.data)


def _webdataset(store: DatasetStore, output: Path) -> None:
    tar: tarfile.TarFile | None = None
    written = shard = 0
    for number, key in enumerate(store.keys()):
        if tar is None or written >= _TAR_BYTES:
            if tar is not None:
                tar.close()
            tar = tarfile.open(output / f"shard-{shard:06d}.tar", "w")  # noqa: SIM115 - closed when the next one starts
            written, shard = 0, shard + 1
        buffer = io.BytesIO()
        np.save(buffer, store.read(key))
        facts = json.dumps({"key": key, "label": store.label(key)}).encode()
        # A sample's name must have no dot of its own: readers take what follows the first one for the extension.
        for extension, data in (("latents.npy", buffer.getvalue()), ("json", facts)):
            member = tarfile.TarInfo(f"{number:09d}.{extension}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            written += len(data)
    if tar is not None:
        tar.close()


FORMS: dict[str, Callable[[DatasetStore, Path], None]] = {
    "pt-tree": _pt_tree,
    "npy": _npy,
    "webdataset": _webdataset,
}
