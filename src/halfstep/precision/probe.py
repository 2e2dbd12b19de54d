"""Measure what a device really does with each number format: speed against fp32, range, rounding, accumulation."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import conv2d, scaled_dot_product_attention
from torch.utils.benchmark import Timer

from halfstep.files import write_durably
from halfstep.machine import device_name, open_device
from halfstep.precision.policy import torch_dtype

_CACHE_VERSION = 2
_ROUNDS = 3

# The share of each operation in a task's time. An autoencoder is convolutions with one attention block; the
# transformers spend 62% of their time in products and 10% in attention (measured on EqM-XL/2), the rest alike.
TASKS = {
    "encode": {"conv": 0.9, "attention": 0.1},
    "sample": {"matmul": 0.85, "attention": 0.15},
    "train": {"matmul": 0.85, "attention": 0.15},
}


@dataclass(frozen=True)
class TypeReport:
    """One number format on one device. Times are milliseconds for one call, the best of interleaved rounds.

    `sound` holds when overflow gives infinity, rounding is to nearest even and products accumulate wider than the type.
    """

    matmul_ms: float
    conv_ms: float
    conv_channels_last_ms: float
    attention_ms: float
    sound: bool

    def time_ms(self, operation: str) -> float:
        if operation == "conv":
            return min(self.conv_ms, self.conv_channels_last_ms)
        return self.matmul_ms if operation == "matmul" else self.attention_ms

    @property
    def prefers_channels_last(self) -> bool:
        """Measured no slower than contiguous; a tie within the noise counts, so that the answer does not flip."""
        return self.conv_channels_last_ms < 1.1 * self.conv_ms


@dataclass(frozen=True)
class ProbeResult:
    """What `probe` measured: the device's name, torch's version and a TypeReport for each of fp32, bf16, fp16 (and tf32
    on CUDA); products are of two square matrices of `matmul_size`."""

    device: str
    torch_version: str
    threads: int
    matmul_size: int
    types: dict[str, TypeReport]

    def speedup(self, type_name: str, task: str) -> float:
        """How many times as fast as fp32 the task's mix of operations runs; 1.0 for fp32."""
        report, fp32 = self.types[type_name], self.types["fp32"]
        return 1 / sum(share * report.time_ms(op) / fp32.time_ms(op) for op, share in TASKS[task].items())

    def products_per_second(self, type_name: str) -> float:
        """Floating-point operations a second in the product of two square matrices. A device without tf32 computes it
        as fp32."""
        report = self.types.get(type_name, self.types["fp32"])
        return 2 * self.matmul_size**3 / (report.matmul_ms / 1e3)


def probe(device: str | torch.device = "cpu", *, refresh: bool = False) -> ProbeResult:
    """Time matmul, convolution and attention in each format on `device`, and check range and rounding there.

    Takes a few seconds once; the result is kept in the user's cache folder for this device, torch version and number of
    threads. `refresh` measures again. Raises InputError when torch has no such device.
    """
    target = open_device(device)
    name = device_name(target)
    identity = f"{_CACHE_VERSION}|{name}|{torch.__version__}|{torch.get_num_threads()}"
    cache_root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache_root / "halfstep" / f"probe-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    if not refresh and (cached := _read_cache(path)) is not None:
        return cached
    with torch.random.fork_rng(devices=[]):
        result = ProbeResult(name, torch.__version__, torch.get_num_threads(), _sizes(target)[0], _measure(target))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(asdict(result), indent=1).encode())
    except OSError as error:
        warnings.warn(f"{path}: could not keep the measurement ({error}); it is repeated next time", stacklevel=2)
    return result


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Allow or forbid TF32 products on CUDA within the block; convolutions allow it by default, so fp32 must say no."""
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


def _read_cache(path: Path) -> ProbeResult | None:
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        types = {name: TypeReport(**report) for name, report in values.pop("types").items()}
        return ProbeResult(types=types, **values)
    except (ValueError, TypeError, KeyError, OSError) as error:
        warnings.warn(f"{path}: not a readable measurement ({error}); measuring again", stacklevel=3)
        return None


def _measure(device: torch.device) -> dict[str, TypeReport]:
    names = ["fp32", "bf16", "fp16"] + (["tf32"] if device.type == "cuda" else [])
    calls = {(name, op): call for name in names for op, call in _operations(device, torch_dtype(name)).items()}
    best = dict.fromkeys(calls, math.inf)
    for _ in range(_ROUNDS):  # the formats take turns, so that a busy moment does not fall on one of them alone
        for (name, op), call in calls.items():
            if 100 < best[name, op] < math.inf:
                continue  # once is enough to know that an emulated format is slow
            with tf32(name == "tf32"):
                best[name, op] = min(best[name, op], _time_ms(call))
    return {
        name: TypeReport(
            matmul_ms=best[name, "matmul"],
            conv_ms=best[name, "conv"],
            conv_channels_last_ms=best[name, "conv_channels_last"],
            attention_ms=best[name, "attention"],
            sound=_is_sound(device, torch_dtype(name)),
        )
        for name in names
    }


def _time_ms(call: Callable[[], torch.Tensor]) -> float:
    """Median time of a call; infinite where the device has no such operation in the type."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    try:
        return timer.blocked_autorange(min_run_time=0.02).median * 1e3
    except RuntimeError as error:  # NotImplementedError is one
        if not _says_missing(error):
            raise
        return math.inf


def _says_missing(error: RuntimeError) -> bool:
    """Whether the device lacks an operation in a type, rather than memory or health."""
    return isinstance(error, NotImplementedError) or any(w in str(error) for w in ("not implemented", "not supported"))


def _operations(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """The calls to time."""
    size, batch, heads = _sizes(device)
    a = torch.randn(size, size, device=device, dtype=dtype)
    pixels = torch.randn(batch, 128, 32, 32, device=device, dtype=dtype)
    kernel = torch.randn(128, 128, 3, 3, device=device, dtype=dtype)
    pixels_last, kernel_last = (t.contiguous(memory_format=torch.channels_last) for t in (pixels, kernel))
    query = torch.randn(batch, heads, 512, 64, device=device, dtype=dtype)
    return {
        "matmul": lambda: a @ a,
        "conv": lambda: conv2d(pixels, kernel, padding=1),
        "conv_channels_last": lambda: conv2d(pixels_last, kernel_last, padding=1),
        "attention": lambda: scaled_dot_product_attention(query, query, query),
    }


def _sizes(device: torch.device) -> tuple[int, int, int]:
    """Of matrices, batch and heads, for calls of milliseconds: on a GPU they must outweigh the launch."""
    return (4096, 16, 16) if device.type == "cuda" else (384, 1, 4)


def _is_sound(device: torch.device, dtype: torch.dtype) -> bool:
    info = torch.finfo(dtype)
    try:
        return _rounds_as_it_should(device, dtype, info)
    except RuntimeError as error:
        if not _says_missing(error):
            raise
        return False


def _rounds_as_it_should(device: torch.device, dtype: torch.dtype, info: torch.finfo) -> bool:
    one = torch.ones((), device=device, dtype=dtype)
    overflows = torch.isinf(one * info.max * 2).item()
    nearest_even = (one + info.eps / 2 == 1).item() and (one + 1.5 * info.eps == 1 + 2 * info.eps).item()
    ones = torch.ones(8, 4096, device=device, dtype=dtype)
    # A sum of ones kept in bf16 stalls at 256, in fp16 at 2048.
    wide_accumulation = (ones @ ones.T == 4096).all().item()
    return bool(overflows and nearest_even and wide_accumulation)
