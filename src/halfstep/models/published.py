"""State dicts out of files that other programs wrote, read without running what they name, by the networks' names."""

from __future__ import annotations

import argparse
import datetime
import pathlib
import pickle
import re
import struct
import threading
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfstep.errors import InputError, some
from halfstep.models.family import StateDict

# Where trainers keep the weights and their moving average, in the order in which they are looked for.
_WEIGHTS = ("model", "model_state_dict", "state_dict", "module")
_AVERAGES = ("ema", "ema_model", "model_ema", "ema_state_dict", "ema_model_state_dict")

# Parts of names that wrappers put in: distributed training, torch.compile, sharding, activation checkpoints.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# What moving averages count beside the weights.
_COUNTERS = {"n_averaged", "num_updates", "decay", "initted", "step"}

# The parameter that all networks have, by which they are found in the state dict of a larger module.
_ANCHOR = "x_embedder.proj.weight"


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Stands for a defaultdict, which torch's reader makes but does not fill."""
    return {}


def _plain_list(*_: Any) -> list[Any]:
    """Stands for a deque, likewise."""
    return []


_scalar: Any = np.float64(0).__reduce__()[0]
_reconstruct: Any = np.empty(0).__reduce__()[0]
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")  # before numpy 2, and since

# What else a file may name: classes that hold values and do nothing. Paths are read as names alone, on any system.
_HARMLESS: tuple[Any, ...] = (
    argparse.Namespace,
    types.SimpleNamespace,
    torch.torch_version.TorchVersion,
    *(bool, int, float, str, bytes, list, tuple, dict, frozenset),
    (_plain_dict, "collections.defaultdict"),
    (_plain_list, "collections.deque"),
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta),
    *(
        (pure, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name, pure in (
            ("PosixPath", pathlib.PurePosixPath),
            ("PurePosixPath", pathlib.PurePosixPath),
            ("WindowsPath", pathlib.PureWindowsPath),
            ("PureWindowsPath", pathlib.PureWindowsPath),
        )
    ),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdgFDSU"},
    *((made, f"{module}.{made.__name__}") for made in (_scalar, _reconstruct) for module in _MULTIARRAY),
)

# Whatever bytes that are no checkpoint lead an unpickler to.
_DAMAGE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)

# torch keeps the names that it may read for the whole process.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Published:
    """What a file holds: `weights` as they were last trained and their average, or the average as both where it is
    alone; the trainer's `arguments`, and the `optimizer`'s state as torch has it."""

    weights: StateDict
    ema: StateDict | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Any = None


def read_published(path: Path) -> Published:
    """Read a file of `torch.save`. Raises InputError when it cannot be read, names what could run code, or holds no
    state dict."""
    content = _load(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; expected a state dict or a dict with 'model'")
    arguments = content.get("args")
    if isinstance(arguments, (argparse.Namespace, types.SimpleNamespace)):
        arguments = vars(arguments)
    weights, average = (_inner(content, names) for names in (_WEIGHTS, _AVERAGES))
    found = from_state(weights or average or content, path)
    ema = found.ema
    if average is not None:
        within = from_state(average, path)
        ema = within.ema or within.weights
    return Published(found.weights, ema, arguments if isinstance(arguments, dict) else {}, content.get("opt"))


def from_state(state: Mapping[str, Any], path: Path) -> Published:
    """A state dict by the networks' own names. It may be that of a larger module, with the network and its average as
    parts. Raises InputError when it holds anything but tensors, or more than one network."""
    plain = {}
    for name, value in state.items():
        parts = [part for part in str(name).split(".") if part not in _WRAPPERS]
        if parts[-1:] and parts[-1] in _COUNTERS:
            continue
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{path}: {name} is a {type(value).__name__}; expected a state dict of tensors")
        plain[".".join(parts)] = value
    owners = [name.removesuffix(_ANCHOR) for name in plain if name == _ANCHOR or name.endswith(f".{_ANCHOR}")]
    averages = [owner for owner in owners if "ema" in re.split(r"[._]", owner)]
    trained = [owner for owner in owners if owner not in averages]
    if len(averages) > 1 or len(trained) > 1:
        found = some([owner + _ANCHOR for owner in owners], 3)
        raise InputError(f"{path}: holds {len(owners)} networks ({found}); expected one, and its average")
    if not owners:
        return Published(plain)
    networks = [_part(plain, owner) for owner in trained + averages]
    return Published(networks[0], networks[-1] if averages else None)


def _part(state: StateDict, owner: str) -> StateDict:
    return {name.removeprefix(owner): value for name, value in state.items() if name.startswith(owner)}


def _inner(content: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any] | None:
    """The first of the dicts that are there, or what it has inside in its turn."""
    found = next((content[name] for name in names if isinstance(content.get(name), dict)), None)
    if found is None:
        return None
    return _inner(found, _WEIGHTS) or found


def _load(path: Path) -> Any:
    with _one_at_a_time:
        known = torch.serialization.get_safe_globals()  # what is there stays there
        with torch.serialization.safe_globals([name for name in _HARMLESS if name not in known]):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except _DAMAGE as error:
                refused = _refused(path, error)
                if refused:
                    raise InputError(
                        f"{path}: names {some(refused, 3)}; what could run code is not read, so save the file anew "
                        "without it, best of all the state dicts alone"
                    ) from error
                raise InputError(
                    f"{path}: cannot be read ({type(error).__name__}); expected a file of torch.save with tensors alone"
                ) from error


def _refused(path: Path, error: Exception) -> list[str]:
    """The names in the file that torch does not read."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except _DAMAGE:  # it does not look into files of torch before 1.6, so there the one that stopped the reading
        return re.findall(r"GLOBAL (\S+) was not", str(error))
