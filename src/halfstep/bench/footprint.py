"""halfstep bench memory: what is planned without a model's weights, beside what a process then holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from halfstep.bench.compare import document
from halfstep.bench.memory import ENVIRONMENT, peak_of
from halfstep.errors import HalfstepError
from halfstep.opening import Inputs, open_model
from halfstep.precision import PrecisionPolicy, prepare
from halfstep.precision.audits.gradients import mean_square
from halfstep.precision.memory import with_batch
from halfstep.progress import SILENT, Progress
from halfstep.train.memory import as_network, plan
from halfstep.train.state import TrainState, Updates

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Planned:
    """One case: a forward call of `batch` samples, or a training step."""

    model: str
    precision: str
    batch: int
    train: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}, {self.precision}, batch {self.batch}{', training' if self.train else ''}"


CASES = (
    Planned("EqM-S/2", "fp32", 8),
    Planned("EqM-S/2", "bf16-true", 16),
    Planned("CDiT-S/2", "bf16-mixed", 4),
    Planned("PeakNet", "fp32", 2),
    Planned("PeakNet", "bf16-mixed", 2),
    Planned("AutoencoderKL", "bf16-true", 2),
    Planned("T5 encoder", "bf16-mixed", 8),
    Planned("EqM-S/2", "bf16-mixed", 4, train=True),
    Planned("CDiT-S/2", "fp32", 2, train=True),
    Planned("T5 encoder", "bf16-true", 4, train=True),
)


def bench_memory(cases: tuple[Planned, ...] = CASES, progress: Progress = SILENT) -> dict[str, Any]:
    """Each case in a process of its own with one thread, which plans it, runs it once so that libraries have set
    themselves up, and measures it three times then. MB of the whole: `planned`, and `measured`, by which the process's
    resident memory grew at most, the median. Raises HalfstepError when a process fails, naming the case."""
    progress.start(len(cases))
    rows = []
    for case in cases:
        script = f"from halfstep.bench.footprint import print_case; print_case({json.dumps(asdict(case))!r})"
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
        )
        if done.returncode:
            raise HalfstepError(f"{case.name}: failed ({(done.stderr.splitlines() or ['no word'])[-1]})")
        planned, measured = json.loads(done.stdout.splitlines()[-1])
        off = round(planned / measured - 1, 4)
        rows.append({"name": case.name, **asdict(case), "planned": planned, "measured": measured, "off": off})
        progress.advance()
    return document("memory", {}, worst_off=max((row["off"] for row in rows), key=abs), cases=rows)


def print_case(text: str) -> None:
    """Print the MB of a case, planned and measured in this process, as JSON."""
    torch.set_num_threads(1)
    case = Planned(**json.loads(text))
    policy = PrecisionPolicy.parse(case.precision)
    shapes, inputs = open_case(case.model, weights=False)
    planned = plan(shapes, inputs, policy, _CPU, train=case.train, batch=case.batch).footprint.peak / 1e6
    _call(case, policy)()
    before = peak_of(lambda: None, _CPU).held_mb
    measured = median(peak_of(_call(case, policy), _CPU).peak_mb - before for _ in range(3))
    sys.stdout.write(f"\n{json.dumps([round(planned, 1), round(measured, 1)])}\n")


def open_case(model: str, *, weights: bool) -> tuple[nn.Module, Inputs]:
    """The model of a case and the inputs of one sample."""
    if model not in _SMALL:
        opened = open_model(model, weights=weights)
        return opened.module, opened.inputs or (torch.zeros(1, 1, 256, 256),)
    with torch.device("cpu" if weights else "meta"):
        module, inputs = _SMALL[model]()
    return module.eval(), inputs


def _autoencoder() -> tuple[nn.Module, Inputs]:
    """Of two levels, for pictures of 128 pixels."""
    from diffusers import AutoencoderKL

    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(64, 128), **levels), (torch.zeros(1, 3, 128, 128),)


def _text_encoder() -> tuple[nn.Module, Inputs]:
    """Of six layers, for 128 tokens."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=8000, d_model=512, d_kv=64, d_ff=1024, num_layers=6, num_heads=8)
    return T5EncoderModel(config), (torch.zeros(1, 128, dtype=torch.int64),)


_SMALL: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "AutoencoderKL": _autoencoder,
    "T5 encoder": _text_encoder,
}


def _call(case: Planned, policy: PrecisionPolicy) -> Callable[[], None]:
    """The case for real: a call, or two steps, of which the first makes the moments."""
    module, inputs = open_case(case.model, weights=True)
    shapes = with_batch(inputs, case.batch)
    given: Any = tree_map_only(torch.Tensor, lambda tensor: torch.zeros_like(tensor, device=_CPU), shapes)
    if not case.train:
        prepare(module, policy)

        def forward() -> None:
            with torch.no_grad():
                module(*given)

        return forward
    state = TrainState(as_network(module), policy, Updates(1e-4), _CPU)

    def steps() -> None:
        for _ in range(2):
            with state.microbatch(last=True):
                state.backward(mean_square(state.model(*given)))
            state.update()

    return steps
