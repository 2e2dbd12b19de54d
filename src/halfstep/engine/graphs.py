"""CUDA graphs: the kernels of one call, recorded once and started together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Network = Callable[..., torch.Tensor]

_WARM_UP = 3  # calls before the recording, in which libraries choose their kernels


class Graphed:
    """A network whose calls are replayed from a graph, one for each of their shapes and each thread; a thread works on
    a stream of its own, within `stream`. On a CPU, and where the network cannot be recorded, it is called as ever:
    `problem` says why."""

    def __init__(self, network: Network, device: torch.device) -> None:
        self._network, self._device = network, device
        self._own = threading.local()
        self._recording = threading.Lock()
        self.problem: str | None = None

    def stream(self) -> AbstractContextManager[object]:
        """The stream of the calling thread."""
        if self._device.type != "cuda":
            return nullcontext()
        self._begin()
        return torch.cuda.stream(self._own.stream)

    def _begin(self) -> None:
        """In each thread."""
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._own.graphs = {}

    def __call__(self, *inputs: Any, **named: Any) -> torch.Tensor:
        if self._device.type != "cuda" or self.problem is not None:
            return self._network(*inputs, **named)
        if named or not all(isinstance(given, torch.Tensor) for given in inputs):
            self.problem = "its calls are not of tensors alone"
            return self._network(*inputs, **named)
        self._begin()
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._own.graphs:
            try:
                with self._recording:
                    self._own.graphs[key] = self._record(inputs)
            except RuntimeError as error:
                self.problem = str(error).splitlines()[0]
                return self._network(*inputs)
        replay: Network = self._own.graphs[key]
        return replay(*inputs)

    def _record(self, inputs: tuple[torch.Tensor, ...]) -> Network:
        held = [tensor.clone() for tensor in inputs]
        for _ in range(_WARM_UP):
            self._network(*held)
        torch.cuda.current_stream(self._device).synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile, so only this one's calls may spoil the recording.
        with torch.cuda.graph(graph, stream=self._own.stream, capture_error_mode="thread_local"):
            output = self._network(*held)

        def replay(*inputs: torch.Tensor) -> torch.Tensor:
            for place, tensor in zip(held, inputs, strict=True):
                place.copy_(tensor)
            graph.replay()
            return output.clone()  # the graph's own memory is written again by the next batch

        return replay
