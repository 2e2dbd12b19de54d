"""One network in one precision after another, while it runs."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import nn

from halfstep.engine.graphs import Graphed
from halfstep.live.frames import Network
from halfstep.precision import PrecisionPolicy, Target, prepare, probe, simulate

POLICIES = {"fp32": "fp32", "bf16": "bf16-true", "fp16": "16-true"}


class Variants:
    """`network`, in fp32 on `device`, and a copy of it in another precision, one at a time. A half type that the device
    only emulates is simulated: that is faster, and it is said."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._network, self._device = network, device
        self._simulation = ExitStack()
        self._graphed = {"fp32": Graphed(network, device)}
        self.exact: Network = self._graphed["fp32"]
        self._current: tuple[str, Network] = ("fp32", self.exact)
        self.name, self.simulated = "fp32", False

    @property
    def launches(self) -> str:
        """How kernels are launched."""
        if self._device.type != "cuda":
            return "eager"
        problem = next((one.problem for one in self._graphed.values() if one.problem is not None), None)
        return "CUDA graphs" if problem is None else f"eager ({problem})"

    def stream(self) -> AbstractContextManager[object]:
        """The stream of the calling thread, within which networks are called."""
        return self._graphed["fp32"].stream()

    def use(self, name: str) -> None:
        """From the next call on in `fp32`, `bf16` or `fp16`."""
        self.name = name
        self.simulated = name != "fp32" and probe(self._device).speedup(name, "sample") < 1

    @property
    def current(self) -> Network:
        """The network in the precision that is used; made when it is first asked for. Ask for it, and `close`, in the
        thread that computes: a simulation is entered and left in one thread."""
        if self._current[0] != self.name:
            self.close()
            self._current = (self.name, self._made())
        return self._current[1]

    def close(self) -> None:
        """Leave a simulation; the next call begins another."""
        self._simulation.close()
        self._graphed = {"fp32": self._graphed["fp32"]}
        self._current = ("fp32", self.exact)

    def _made(self) -> Network:
        if self.name == "fp32":
            return self.exact
        policy, copied = PrecisionPolicy.parse(POLICIES[self.name]), copy.deepcopy(self._network)
        if self.simulated:
            return self._simulation.enter_context(simulate(copied, policy, Target(self.name)))
        self._graphed[self.name] = Graphed(prepare(copied, policy), self._device)
        return self._graphed[self.name]
