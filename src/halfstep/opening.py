"""A model by the name that was given on the command line, with the arguments of one of its forward calls."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from halfstep.autoencoders.hub import cached_models, hub_answers, quiet_hub
from halfstep.errors import InputError, some
from halfstep.models import FAMILIES, Family, LiveStreamLoad, Network, PeakNet, family_of, read_checkpoint
from halfstep.models.livestream_load import is_load, load_inputs
from halfstep.models.peaknet import config_of
from halfstep.models.published import read_published

# The arguments of one forward call: by position, or by name.
Inputs = tuple[Any, ...] | dict[str, Any]

_SCRIPTED = (".ts", ".torchscript")
TORCH_FILES = (".pt2", *_SCRIPTED)

_INPUT_FILES = (".npz", ".safetensors", ".pt")
_PEAKNET = "head_segmask.weight"  # which no other network has
_RANDOM = " (random weights)"
_SIDE, _TOKENS = 64, 16  # of inputs that are guessed
# What a published name does not say: latents of EqM's pictures of 256 pixels, of CDiT's frames of 224; livestream's
# frames of 64 pixels.
_UNSAID = {
    "EqM": {"input_size": 32, "num_classes": 1000},
    "CDiT": {"input_size": 28, "context_size": 4},
    "livestream": {"input_size": 64, "context_size": 4},
}
# What files that hold something else, or half of it, lead their readers to.
_DAMAGE = (
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Opened:
    """`module`: in fp32, in evaluation mode, on the CPU. `inputs`: the arguments of one forward call, None when nothing
    tells them. `name`: what it was opened by, and whether its weights are random."""

    module: nn.Module
    inputs: Inputs | None
    name: str


def open_model(name: str, *, weights: bool = True) -> Opened:
    """Open what `name` says:

    - `package.module:factory`, found as `python -m` finds it, from the current folder too: a function without
      arguments that returns a module, or a module and its inputs;
    - `EqM-S/2`, `CDiT-B/2` or another published size, or `PeakNet`: with random weights of seed 0, for latents of
      32 x 32 and 1000 classes, or of 28 x 28 and 4 frames of context; `livestream-S`, so too, for frames of 64 x 64
      pixels; `livestream-load-192`, which is not to be trained;
    - a training run, one of its checkpoints, a published checkpoint (its average where it has one), PeakNet's weights;
    - a file of `torch.export` (.pt2), in the types in which it was exported, or of TorchScript (.ts, .torchscript);
    - a folder or a hub id of a model of diffusers or transformers; of one that reads and writes text, what reads.

    Without `weights` its tensors are on the meta device, which has shapes and types and no values; those of torch's own
    files are as they are in them. Raises InputError when nothing is there by that name, or when it cannot be opened.
    """
    path = Path(name)
    if path.is_dir():
        return _from_folder(path, weights)
    if path.suffix in TORCH_FILES:
        return _from_torch_file(path)
    if path.is_file():
        return _from_weights(path, weights)
    if ":" in name:
        return _from_factory(name, weights)
    if name == "PeakNet" or name.partition("-")[0] in FAMILIES:
        return _with_random_weights(name, weights)
    return _from_hub(name, weights)


def example_inputs(module: nn.Module) -> Inputs:
    """Inputs of a module of which nothing else is known, guessed from its first layer with weights: [2, features] of a
    linear one, [1, channels, 64, 64] of a convolution, both normal noise of seed 0, [1, 16] numbers of an embedding's
    rows. Raises InputError when there is no such layer, or when the module cannot be called with them."""
    layer = next((child for child in module.modules() if isinstance(child, (nn.Linear, nn.Conv2d, nn.Embedding))), None)
    name = type(module).__name__
    if layer is None:
        raise InputError(f"{name}: has no linear layer, convolution or embedding to guess its inputs from; give them")
    with _seeded(), torch.device(layer.weight.device):
        if isinstance(layer, nn.Linear):
            guess = torch.randn(2, layer.in_features)
        elif isinstance(layer, nn.Conv2d):
            guess = torch.randn(1, layer.in_channels, _SIDE, _SIDE)
        else:
            guess = torch.randint(layer.num_embeddings, (1, _TOKENS))
    try:
        with torch.no_grad():
            module(guess)
    except Exception as error:
        raise InputError(
            f"{name}: cannot be called with one tensor {list(guess.shape)}, guessed from its first "
            f"{type(layer).__name__} ({_reason(error)}); give its inputs"
        ) from error
    return (guess,)


def read_inputs(path: Path) -> list[Inputs]:
    """The arguments of forward calls out of a file: .npz, .safetensors, or .pt with a dict of tensors.

    Tensors are named as the forward's arguments, or by their position: "0", "1", ...; fp64 becomes fp32. Several calls
    are told apart by what stands before a slash: "first/x", "second/x", in the order in which they come. Raises
    InputError when the file cannot be read, or has other names.
    """
    calls: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in _read_tensors(path).items():
        call, _, argument = name.rpartition("/")
        calls.setdefault(call, {})[argument] = tensor.float() if tensor.dtype == torch.float64 else tensor
    if not calls:
        raise InputError(f"{path}: holds no tensors; expected the arguments of a forward call")
    return [_arguments(call, path) for call in calls.values()]


def _arguments(call: dict[str, torch.Tensor], path: Path) -> Inputs:
    positions = [str(number) for number in range(len(call))]
    if set(call) == set(positions):
        return tuple(call[position] for position in positions)
    if odd := [name for name in call if not name.isidentifier()]:
        raise InputError(
            f"{path}: has tensors {some(list(call))}; {odd[0]!r} is no argument's name, and together they are not the "
            'positions "0", "1", ...'
        )
    return dict(call)


def _read_tensors(path: Path) -> Mapping[str, torch.Tensor]:
    if not path.is_file() or path.suffix not in _INPUT_FILES:
        raise InputError(f"{path}: no such file of inputs; expected {', '.join(_INPUT_FILES)}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise InputError(f"{path}: cannot be read ({_reason(error)}); expected tensors by their names") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise InputError(f"{path}: holds a {type(content).__name__}; expected a dict of tensors by their names")
    return content


def _from_weights(path: Path, weights: bool) -> Opened:
    if path.is_file():
        state = read_published(path).weights
        if _PEAKNET in state:
            if weights:
                return Opened(PeakNet.load(path), None, str(path))
            with torch.device("meta"):
                return Opened(PeakNet(**config_of(state, path)).eval(), None, str(path))
    checkpoint = read_checkpoint(path)
    if weights:
        built = checkpoint.build()
    else:
        with torch.device("meta"):
            built = checkpoint.about.build().to("meta").eval()
    return Opened(built, _example(built, checkpoint.about.family, weights), str(path))


def _with_random_weights(name: str, weights: bool) -> Opened:
    with _seeded(), _device(weights):
        if name == "PeakNet":
            return Opened(PeakNet().eval(), None, name + _RANDOM)
        if is_load(name):
            load = LiveStreamLoad.named(name).to(_device(weights)).eval()
            return Opened(load, _normal(load_inputs()), name + _RANDOM)
        family = family_of(name)
        network = family.build(**family.named(name), **_UNSAID[family.name]).to(_device(weights)).eval()
    return Opened(network, _example(network, family, weights), name + _RANDOM)


def _example(network: Network, family: Family, weights: bool) -> Inputs:
    """The family's example, as normal noise."""
    with _seeded(), _device(weights):
        return _normal(family.example(network))


def _normal(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The same, with normal noise in place of what memory held."""
    return tuple(torch.randn_like(x) if x.is_floating_point() else x for x in inputs)


def _from_factory(name: str, weights: bool) -> Opened:
    module_name, _, function_name = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # for good, as `python -m` does: a factory may import more when it runs
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:
        raise InputError(
            f"model: {name}: {_reason(error)}; expected package.module:function that can be imported"
        ) from error
    try:
        with _device(weights):
            made = function()
    except Exception as error:
        raise InputError(
            f"model: {name}: failed ({_reason(error)}); expected a function without arguments"
            f"{'' if weights else ' that looks at no values of tensors'}"
        ) from error
    module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module) or not isinstance(inputs, tuple | dict | None):
        found = type(made).__name__ if module is made else f"{type(module).__name__} and {type(inputs).__name__}"
        raise InputError(
            f"model: {name}: returned {found}; expected a torch module, or one and its inputs as a tuple or a dict"
        )
    tensors = [*module.parameters(), *module.buffers()]
    made_real = sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)
    if not weights and 2 * made_real > sum(tensor.nbytes for tensor in tensors):
        warnings.warn(
            f"model: {name}: took {made_real / 1e6:.0f} MB for tensors while it was built; make them without naming a "
            "device, so that a plan takes none",
            stacklevel=2,
        )
    return Opened(module.to(_device(weights)).float().eval(), inputs, name)


def _from_torch_file(path: Path) -> Opened:
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a network of torch.export or TorchScript")
    try:
        if path.suffix in _SCRIPTED:
            network = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
            return Opened(TorchScript(network.float().eval()), None, str(path))
        program = torch.export.load(path)
        positional, named = program.example_inputs or ((), {})
        return Opened(program.module(), None if positional and named else positional or named or None, str(path))
    except _DAMAGE as error:
        raise InputError(f"{path}: cannot be read as a network ({_reason(error)}); save it again") from error


class TorchScript(nn.Module):
    """A network of TorchScript, whose own class cannot be another one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)


def _from_folder(folder: Path, weights: bool) -> Opened:
    config = _read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "_class_name" in config or "model_type" in config:
        return _from_library(str(folder), config, weights, offline=True)
    if (folder / "model_index.json").is_file() and (parts := sorted(folder.glob("*/config.json"))):
        names = [path.parent.name for path in parts]
        raise InputError(f"{folder}: is a pipeline of {some(names)}; name one of them, as {parts[0].parent}")
    return _from_weights(folder, weights)


def _from_hub(name: str, weights: bool) -> Opened:
    from huggingface_hub import hf_hub_download

    here = some([*FAMILIES, "PeakNet", *cached_models()])
    expected = f"expected a file, a folder, package.module:function, or a model that is there ({here})"
    offline = not hub_answers(name, None, expected)
    try:
        config = _read_config(Path(hf_hub_download(name, "config.json", local_files_only=offline)))
    except OSError as error:
        where = "no such file or folder, and no network" if offline else "its config.json cannot be had from the hub"
        raise InputError(f"{name}: {where}; {expected}") from error
    return _from_library(name, config, weights, offline)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({_reason(error)}); save the model again") from error
    return config if isinstance(config, dict) else {}


def _from_library(name: str, config: dict[str, Any], weights: bool, offline: bool) -> Opened:
    """A model of diffusers, whose configs name their class, or of transformers, whose configs name their type."""
    make = _diffusers_model if "_class_name" in config else _transformers_model
    try:
        with quiet_hub():
            return Opened(make(name, config, weights, offline).float().eval(), None, name)
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{name}: cannot be loaded ({_reason(error)}); save or download it again") from error


def _diffusers_model(name: str, config: dict[str, Any], weights: bool, offline: bool) -> Any:
    import diffusers

    found = getattr(diffusers, config["_class_name"], None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise InputError(f"{name}: is a {config['_class_name']}; expected a model of diffusers")
    kind: Any = found
    if weights:
        # low_cpu_mem_usage: its other way needs accelerate
        return kind.from_pretrained(name, local_files_only=offline, low_cpu_mem_usage=False)
    with torch.device("meta"):
        return kind.from_config(config)


def _transformers_model(name: str, config: dict[str, Any], weights: bool, offline: bool) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    reads_text = config.get("model_type") in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    kind: Any = AutoModelForTextEncoding if reads_text else AutoModel
    if weights:
        return kind.from_pretrained(name, local_files_only=offline)
    with torch.device("meta"):
        return kind.from_config(AutoConfig.from_pretrained(name, local_files_only=offline))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _device(weights: bool) -> torch.device:
    return torch.device("cpu" if weights else "meta")


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed 0 within; the caller's generator is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
