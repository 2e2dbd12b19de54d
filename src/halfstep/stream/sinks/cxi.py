"""CXI files of hits, as CrystFEL's indexamajig reads them (`--peaks=cxi`, a name that ends in `.cxi`).

With n hits in the file, of C panels with H x W pixels:

- `/entry_1/data_1/data` [n, C * H, W]: the values of the wire in the type of the wire, the panels one below the other.
- `/entry_1/result_1/nPeaks` [n], and `peakXPosRaw`, `peakYPosRaw`, `peakTotalIntensity` [n, most peaks of a hit].
- `/LCLS/photon_energy_eV` [n], NaN where it is not known. `/LCLS/timestamp` [n], float64 or uint64 as it was sent, NaN
  or 0 where it is not known. Where both were sent, whole numbers are in `/LCLS/timestamp_uint64`, and NaN is in their
  place in the other. What no event has is not there.
- `/halfstep`: the identities of the hits and the layout of the panels, `peaks_cut` [n] the peaks left out of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np

from halfstep.errors import InputError
from halfstep.stream.events import Array, Result
from halfstep.stream.sinks.facts import photon_energy, timestamps
from halfstep.stream.sinks.hdf5 import FILTERS, check_identities, common_layout, new_hdf5, write_identities


@dataclass(frozen=True)
class CxiSettings:
    """`peak_list` and `data` are where indexamajig is told to look. A hit has `min_peaks` or more; of more than
    `max_peaks` the strongest are written. HDF5 reads "gzip" wherever it is installed and "bslz4" with its plugin."""

    peak_list: str = "/entry_1/result_1"
    data: str = "/entry_1/data_1/data"
    min_peaks: int = 10
    max_peaks: int = 2048
    compression: Literal["none", "gzip", "bslz4"] = "none"

    def __post_init__(self) -> None:
        if not 1 <= self.min_peaks <= self.max_peaks:
            raise InputError(f"min_peaks, max_peaks: got {self.min_peaks}, {self.max_peaks}; expected 1 <= min <= max")
        if self.compression not in FILTERS:
            raise InputError(f"compression: got {self.compression!r}; expected one of {', '.join(FILTERS)}")
        for name in ("peak_list", "data"):
            path = getattr(self, name)
            if not path.startswith("/") or "%" in path:  # a placeholder in CrystFEL
                raise InputError(f"{name}: got {path!r}; expected a path within the file, as /entry_1/result_1")


def is_hit(result: Result, settings: CxiSettings) -> bool:
    """Whether an event has peaks enough to be written. The rows of a file are the hits in the order of the results."""
    return len(result.peaks) >= settings.min_peaks


def write_cxi(path: Path, results: Sequence[Result], settings: CxiSettings) -> int:
    """Write the hits among `results` to a new file and count them. Without a hit nothing is written.

    Raises InputError, before anything is written, when hits are not all of one shape and type, are not of real numbers
    of at most 64 bits, or have an identity that cannot be stored; FileError when the system could not write.
    """
    hits = [result for result in results if is_hit(result, settings)]
    if not hits:
        return 0
    (panels, height, width), dtype = common_layout([hit.event.data for hit in hits], hits)
    check_identities(hits)
    if dtype.kind == "b":  # h5py makes it an enumeration, which nobody else takes for numbers
        dtype = np.dtype(np.uint8)
    slab = (panels * height, width)
    with new_hdf5(path) as file:
        kept = _write_peaks(file.create_group(settings.peak_list), hits, height, settings.max_peaks)
        _write_facts(file, hits)
        own = write_identities(file, hits)
        own["peaks_cut"] = np.array([len(hit.peaks) for hit in hits], np.int32) - kept
        # One type of the wire or another, whole or real, big or little endian, of 16 bits too: CrystFEL lets HDF5 turn
        # it into floats as it reads.
        filters = FILTERS[settings.compression]
        data = file.create_dataset(settings.data, (len(hits), *slab), dtype, chunks=(1, *slab), **filters)
        for row, hit in enumerate(hits):
            values = np.ascontiguousarray(hit.event.data).reshape(slab).view(dtype)
            if filters:
                data[row] = values
            else:  # 1.7 times as fast
                data.id.write_direct_chunk((row, 0, 0), values)
    return len(hits)


def strongest(intensities: Array, most: int) -> Array:
    """The numbers of the `most` strongest of `intensities` [P], in the order in which they are there."""
    if len(intensities) <= most:
        return np.arange(len(intensities))
    return np.sort(np.argsort(-intensities, kind="stable")[:most])  # NaN comes last


def slab_places(peaks: Array, height: int) -> tuple[Array, Array]:
    """x and y, float32 [P], of `peaks` [P, 3] (panel, y, x) where the panels lie one below the other."""
    # Ours are centers of mass of pixel numbers, so that a whole number is the center of a pixel. So CXI means it, and
    # indexamajig adds the half pixel to its own corners: they are written as they are.
    y = peaks[:, 1].astype(np.float64) + height * peaks[:, 0].astype(np.float64)
    return peaks[:, 2].astype(np.float32), y.astype(np.float32)


def geometry(panels: int, height: int, width: int, settings: CxiSettings, live: bool = False) -> str:
    """The part of a CrystFEL geometry that is ours: where indexamajig finds data, peaks and panels, in our CXI files
    or, `live`, in what `CrystfelResponder` sends. What only the beamline knows, distances above all, is left to be
    filled in: each line with `FILL IN`. CrystFEL names what is missing."""
    data, peak_list, energy = settings.data, settings.peak_list, "/LCLS/photon_energy_eV"
    axes = ["dim0 = %", "dim1 = ss", "dim2 = fs"]
    if live:  # it refuses a message for a geometry with events in the first dimension
        data, peak_list, energy, axes = "detector_data", "peak_list", "photon_energy_eV", []
    lines = [
        f"; {panels} panels of {height} x {width} pixels, one below the other",
        f"photon_energy = {energy} eV",
        ";clen = FILL IN m ; from the sample to the detector",
        ";res = FILL IN ; pixels a meter",
        ";adu_per_photon = FILL IN",
        f"data = {data}",
        f"peak_list = {peak_list}",
        *axes,
    ]
    for panel in range(panels):
        first, last = panel * height, (panel + 1) * height - 1
        lines += ["", f"p{panel}/min_fs = 0", f"p{panel}/max_fs = {width - 1}"]
        lines += [f"p{panel}/min_ss = {first}", f"p{panel}/max_ss = {last}"]
        lines += [f";p{panel}/{name} = FILL IN" for name in ("fs", "ss", "corner_x", "corner_y")]
    return "\n".join(lines) + "\n"


def _write_peaks(group: h5py.Group, hits: Sequence[Result], height: int, most: int) -> Array:
    """Writes the peaks, and returns how many of each hit: int32 [n]."""
    chosen = [strongest(hit.intensities, most) for hit in hits]
    counts = np.array([len(numbers) for numbers in chosen], np.int32)
    x, y, total = np.zeros((3, len(hits), counts.max()), np.float32)
    for row, (hit, numbers) in enumerate(zip(hits, chosen, strict=True)):
        x[row, : len(numbers)], y[row, : len(numbers)] = slab_places(hit.peaks[numbers], height)
        total[row, : len(numbers)] = hit.intensities[numbers]
    group["nPeaks"] = counts
    group["peakXPosRaw"], group["peakYPosRaw"], group["peakTotalIntensity"] = x, y, total
    return counts


def _write_facts(file: h5py.File, hits: Sequence[Result]) -> None:
    facts = [hit.event.facts for hit in hits]
    file["LCLS/photon_energy_eV"] = np.array([photon_energy(one) for one in facts], np.float64)
    floats, whole = zip(*map(timestamps, facts), strict=True)
    some_float, some_whole = (any(value is not None for value in values) for values in (floats, whole))
    if some_float:
        file["LCLS/timestamp"] = np.array(floats, np.float64)
    if some_whole:
        name = "LCLS/timestamp_uint64" if some_float else "LCLS/timestamp"
        file[name] = np.array([value or 0 for value in whole], np.uint64)
