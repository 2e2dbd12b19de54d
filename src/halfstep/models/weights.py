"""Weights on disk to networks: files of this package, which say what they hold, and the published checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from halfstep.errors import InputError, some
from halfstep.models.eqm import ENERGY_NAMES
from halfstep.models.family import Family, Network, StateDict
from halfstep.models.published import Published, from_state, read_published
from halfstep.models.registry import FAMILIES, family_of
from halfstep.spec import LatentSpec


@dataclass(frozen=True)
class About:
    """What a network is and what it was trained on. `network`: its family's name, `config`: its arguments; `latents`:
    of what it makes, None when unknown; `classes`: names of the labels; `spacing`: meters a waypoint, of a walk."""

    network: str
    config: dict[str, Any]
    latents: LatentSpec | None = None
    classes: tuple[str, ...] = ()
    spacing: float | None = None

    @property
    def family(self) -> Family:
        """The row of the registry that it is of."""
        return family_of(self.network)

    @property
    def name(self) -> str:
        """The published name, `EqM-S/2`, or the class and its sizes."""
        size = next((s for s, sizes in self.family.sizes.items() if sizes == self._sizes), None)
        patch = self.config.get("patch_size")
        if size is None:
            depth, width, heads = self._sizes
            patched = "" if patch is None else f", patch {patch}"
            return f"{self.network} of depth {depth}, width {width}, {heads} heads{patched}"
        return f"{self.network}-{size}" if patch is None else f"{self.network}-{size}/{patch}"

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.config["depth"], self.config["hidden_size"], self.config["num_heads"]

    def build(self) -> Network:
        """A new network with random weights."""
        return self.family.build(**self.config)

    def to_metadata(self) -> dict[str, str]:
        """As the strings that a safetensors file carries."""
        values = {
            "network": self.network,
            "config": self.config,
            "latents": None if self.latents is None else self.latents.to_dict(),
            "classes": self.classes,
            "spacing": self.spacing,
        }
        return {"halfstep": json.dumps(values)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: Path) -> About:
        try:
            values = json.loads(metadata["halfstep"])
            latents = None if values["latents"] is None else LatentSpec.from_dict(values["latents"])
            config = {**values["config"], "input_size": tuple(values["config"]["input_size"])}
            return cls(values["network"], config, latents, tuple(values["classes"]), values["spacing"])
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{where}: does not say which network it is of; expected weights written by halfstep, or the file of a "
                "published checkpoint (.pt, .pth, .pth.tar, .safetensors)"
            ) from error


@dataclass(frozen=True)
class Checkpoint:
    """Weights by their published names. `weights` are those last trained, `ema` their moving average; a published file
    may hold the average alone, which is both then. `moments` are AdamW's after `updates`, as `exp_avg.NAME` and
    `exp_avg_sq.NAME`, where a checkpoint brings them. `ema_start`: the share of the average that are still random
    weights it began with, None when unknown."""

    path: Path
    about: About
    weights: StateDict
    ema: StateDict | None = None
    moments: StateDict = field(default_factory=dict)
    updates: int = 0
    ema_start: float | None = None

    @property
    def best(self) -> StateDict:
        """The moving average where there is one."""
        return self.weights if self.ema is None else self.ema

    def build(self, *, ema: bool = True) -> Network:
        """The network with its weights, in evaluation mode. Raises InputError when they do not fit."""
        network = self.about.build()
        load_exactly(network, self.best if ema else self.weights, self.path)
        return network.eval()


def read_checkpoint(path: Path, *, assumed: Mapping[str, Any] | None = None, **known: Any) -> Checkpoint:
    """Read a checkpoint: a folder or file of weights that halfstep wrote, or a published file.

    `known` are arguments of the network that a published file need not hold (`num_frames`, `energy`, `uncond`,
    `num_heads`, `input_size`), `assumed` those that count where it says nothing; None stands for what the file says.
    Published files are read without running what they name. Raises InputError when the file cannot be read, is of
    neither network, or says otherwise than `known` itself.
    """
    known = {name: value for name, value in known.items() if value is not None}
    assumed = assumed or {}
    if path.is_dir():
        return _read_folder(_newest(path), known)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected a checkpoint")
    if path.suffix != ".safetensors":
        return _checkpoint(read_published(path), known, assumed, path)
    metadata, tensors = _read_tensors(path)
    if "halfstep" not in metadata:
        return _checkpoint(from_state(tensors, path), known, assumed, path)
    about = About.from_metadata(metadata, path)
    _require_as_written(about, known, path)
    return Checkpoint(path, about, tensors)


def load_exactly(network: torch.nn.Module, state: StateDict, where: Path) -> None:
    """Load `state`, name by name. Raises InputError naming what is missing, unexpected or of another shape."""
    require_fitting(network, state, where)
    network.load_state_dict(state, strict=True)


def require_fitting(network: torch.nn.Module, state: StateDict, where: Path) -> None:
    """Raise InputError when the names or shapes of `state` are not those of the network."""
    own = network.state_dict()
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
    problems = []
    if missing:
        problems.append(f"missing are {some(missing, 3)}")
    if surplus:
        problems.append(f"not known are {some(surplus, 3)}")
    if shapes:
        name = min(shapes)
        more = f" (and {len(shapes) - 1} more differ)" if len(shapes) > 1 else ""
        problems.append(f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}{more}")
    if problems:
        raise InputError(f"{where}: does not fit the {type(network).__name__} asked for: {'; '.join(problems)}")


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint below the folder of a training run, or None. A checkpoint is a folder named by its step;
    one that is being written has another name."""
    folders = [path for path in (run / "checkpoints").glob("[0-9]*") if path.name.isdecimal()]
    return max(folders, key=lambda path: int(path.name), default=None)


def _newest(folder: Path) -> Path:
    if (folder / "model.safetensors").exists():
        return folder
    found = newest_checkpoint(folder)
    if found is None:
        raise InputError(f"{folder}: no checkpoint in it; expected a training run, or model.safetensors")
    return found


def _read_folder(folder: Path, known: dict[str, Any]) -> Checkpoint:
    about, weights = _read_file(folder / "model.safetensors")
    ema = _read_file(folder / "ema.safetensors")[1] if (folder / "ema.safetensors").exists() else None
    _require_as_written(about, known, folder)
    return Checkpoint(folder, about, weights, ema, ema_start=_ema_start(folder / "state.json"))


def _ema_start(path: Path) -> float | None:
    """By what a run's checkpoint says of itself; None where it does not."""
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_text())
        if facts["config"]["ckpt"] is not None:  # the average began with weights that were trained already
            return None
        return float(facts["config"]["ema_decay"] ** facts["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); remove its folder to take an older checkpoint") from error


def _read_file(path: Path) -> tuple[About, StateDict]:
    metadata, tensors = _read_tensors(path)
    return About.from_metadata(metadata, path), tensors


def _read_tensors(path: Path) -> tuple[dict[str, str], StateDict]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error})") from error


def _require_as_written(about: About, known: dict[str, Any], path: Path) -> None:
    for name, value in known.items():
        if name in about.config and about.config[name] != value:
            raise InputError(f"{path}: {name} is {about.config[name]}, not {value}")


def _checkpoint(found: Published, known: Mapping[str, Any], assumed: Mapping[str, Any], path: Path) -> Checkpoint:
    told = _from_arguments(found.arguments)
    about = _recognize(found.weights, {**told, **known}, assumed, path)
    moments, updates = _moments(found.optimizer, found.weights, path)
    return Checkpoint(path, about, found.weights, found.ema, moments, updates)


def _moments(optimizer: Any, weights: StateDict, path: Path) -> tuple[StateDict, int]:
    """AdamW's state, which torch keeps by the parameter's number, by its name."""
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
        return {}, 0
    names = list(weights)  # in the order of the module's parameters, as the optimizer had them
    moments: StateDict = {}
    updates = 0
    for number, kept in optimizer["state"].items():
        name = names[number] if isinstance(number, int) and 0 <= number < len(names) else None
        for moment in ("exp_avg", "exp_avg_sq"):
            value = kept.get(moment) if isinstance(kept, dict) and "step" in kept else None
            if name is None or not isinstance(value, torch.Tensor) or value.shape != weights[name].shape:
                raise InputError(
                    f"{path}: opt: what it keeps of parameter {number} is not AdamW's of {name}; take 'opt' out"
                )
            moments[f"{moment}.{name}"] = value
        updates = int(kept["step"])
    return moments, updates


def _from_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the published trainer's command line says of the network."""
    found: dict[str, Any] = {}
    if "uncond" in arguments:
        found["uncond"] = bool(arguments["uncond"])
    if isinstance(arguments.get("ebm"), str) and arguments["ebm"] in ENERGY_NAMES:
        found["energy"] = ENERGY_NAMES[arguments["ebm"]]
    if arguments.get("video") and arguments.get("clip_len"):
        found["num_frames"] = int(arguments["clip_len"])
    return found


def _recognize(state: StateDict, known: Mapping[str, Any], assumed: Mapping[str, Any], path: Path) -> About:
    """The network that a state dict is of, from its names and shapes, and from what is known otherwise."""
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        _, tokens, _ = state["pos_embed"].shape
    except KeyError as error:
        raise InputError(f"{path}: neither an EqM nor a CDiT: no {error.args[0]} among {len(state)} tensors") from None
    except ValueError as error:
        raise InputError(
            f"{path}: neither an EqM nor a CDiT: x_embedder or pos_embed of other axes ({error})"
        ) from None
    family, own = next((f, read) for f in FAMILIES.values() if (read := f.read(state)) is not None)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    config: dict[str, Any] = {
        "patch_size": patch,
        "hidden_size": width,
        "depth": depth,
        "num_heads": next((s[2] for s in family.sizes.values() if s[:2] == (depth, width)), None),
        "in_channels": channels,
        "input_size": _size(tokens, patch, assumed.get("input_size")),
        **own,
        **{name: assumed.get(name, value) for name, value in family.silent.items()},
    }
    config |= {name: value for name, value in known.items() if name in config}
    for name, what in (("num_heads", "number of heads"), ("input_size", "size of the latents")):
        config[name] = assumed.get(name) if config[name] is None else config[name]
        if config[name] is None:
            raise InputError(f"{path}: the {what} of depth {depth}, width {width} is not in the file; give it")
    return About(family.name, config)


def _size(tokens: int, patch: int, assumed: tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width of the latents that make so many tokens: those assumed where they do, else a square."""
    if assumed is not None and assumed[0] * assumed[1] == tokens * patch**2:
        return assumed
    side = math.isqrt(tokens)
    return (side * patch, side * patch) if side**2 == tokens else None
