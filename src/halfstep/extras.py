"""Which libraries come with which extra: a base install reads and writes stores and recorded runs."""

from __future__ import annotations

from halfstep.errors import InputError

_ENCODE = ("torch", "diffusers", "av", "PIL", "safetensors", "huggingface_hub", "httpx2")

# The modules that each extra brings.
EXTRAS: dict[str, tuple[str, ...]] = {
    "encode": _ENCODE,
    "train": _ENCODE,
    "sample": _ENCODE,
    "generate": (*_ENCODE, "accelerate", "ftfy", "transformers"),
    "analyze": ("matplotlib", "plotly", "sklearn", "scipy"),
    "audit": (*_ENCODE, "matplotlib", "transformers"),
    "eval": (*_ENCODE, "sklearn", "torchmetrics"),
    "fid": ("torch_fidelity",),
    "ray": ("ray",),
    "stream": (*_ENCODE, "cbor2", "h5py", "hdf5plugin", "msgpack", "prometheus_client", "psutil", "scipy", "zmq"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "web": (*_ENCODE, "starlette", "uvicorn", "websockets"),
}

# Verbs that go through all of it.
_OF_EVERYTHING = ("bench", "demo")


def missing(error: ImportError, wanted: str) -> InputError | None:
    """The line for an import that failed because an extra is not installed, by preference the one of `wanted`, a verb
    or a public name; None when the error is of something else."""
    module = (error.name or "").partition(".")[0]
    found = [name for name, modules in EXTRAS.items() if module in modules]
    if not found:
        return None
    extra = wanted if wanted in found else "all" if wanted in _OF_EVERYTHING else found[0]
    return InputError(f"{wanted}: {module} is not installed; pip install 'halfstep[{extra}]'")
