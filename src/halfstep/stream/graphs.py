"""CUDA graphs: the kernels of one batch, recorded once and started with a single call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

Network = Callable[[torch.Tensor], torch.Tensor]

_WARM_UP = 3  # calls before the recording, in which libraries choose their kernels


class Graphed:
    """A network whose batches are replayed from a graph, one for each shape and each thread; a thread works on a stream
    of its own, within `stream`. On a CPU, and where the network cannot be recorded, it is called as ever: `problem`
    says why."""

    def __init__(self, network: Network, device: torch.device) -> None:
        self._network, self._device = network, device
        self._own = threading.local()
        self._recording = threading.Lock()
        self.problem: str | None = None

    def stream(self) -> AbstractContextManager[object]:
        """The stream of the calling thread."""
        if self._device.type != "cuda":
            return nullcontext()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._own.graphs = {}
        return torch.cuda.stream(self._own.stream)

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda" or self.problem is not None:
            return self._network(samples)
        key = samples.shape, samples.dtype
        if key not in self._own.graphs:
            try:
                with self._recording:
                    self._own.graphs[key] = self._record(samples)
            except RuntimeError as error:
                self.problem = str(error).splitlines()[0]
                return self._network(samples)
        replay: Network = self._own.graphs[key]
        return replay(samples)

    def _record(self, samples: torch.Tensor) -> Network:
        held = samples.clone()
        for _ in range(_WARM_UP):
            self._network(held)
        torch.cuda.current_stream(self._device).synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile, so only this one's calls may spoil the recording.
        with torch.cuda.graph(graph, stream=self._own.stream, capture_error_mode="thread_local"):
            output = self._network(held)

        def replay(samples: torch.Tensor) -> torch.Tensor:
            held.copy_(samples)
            graph.replay()
            return output.clone()  # the graph's own memory is written again by the next batch

        return replay
