"""A ring of host buffers for copies to and from a device: as many as are asked for, made once and used in turn."""

from __future__ import annotations

from queue import SimpleQueue
from types import TracebackType
from typing import Self

import torch


class Ring:
    """`count` buffers in host memory, pinned where `device` is a GPU, so that copies run beside its work. A buffer is
    as large as the largest tensor it ever held. Who asks for one while all are in use waits. Safe between threads."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.device = device
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(count):
            self._free.put(_Buffer(pinned=device.type == "cuda"))

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor of the host on the device; `values` may be changed afterwards unless the device is the CPU, where it
        is returned as it is."""
        if self.device.type == "cpu":
            return values
        buffer = self._free.get()
        try:
            host = buffer.shaped(values)
            host.copy_(values)
            moved = host.to(self.device, non_blocking=True)
            buffer.mark(self.device)
        finally:
            self._free.put(buffer)
        return moved

    def fetch(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor of the device in memory of its own on the host; on the CPU as it is."""
        if self.device.type == "cpu":
            return values
        with self.download(values) as copy:
            return copy.wait().clone()

    def download(self, values: torch.Tensor) -> HostCopy:
        """A copy on its way to a buffer of the host, which it holds until it is released. Does not wait for the
        device, only for a buffer."""
        buffer = self._free.get()
        try:
            host = buffer.shaped(values)
            host.copy_(values, non_blocking=True)
            buffer.mark(values.device)
        except BaseException:
            self._free.put(buffer)
            raise
        return HostCopy(self._free, buffer, host)


class HostCopy:
    """A tensor in a buffer of a ring. As a context manager it releases the buffer in the end."""

    def __init__(self, free: SimpleQueue[_Buffer], buffer: _Buffer, host: torch.Tensor) -> None:
        self._free, self._buffer, self._host = free, buffer, host
        self._held = True

    def wait(self) -> torch.Tensor:
        """The tensor, once the copy has arrived; it is in the buffer, so it is lost with the release. Raises
        RuntimeError after that: the buffer may hold another's values by then."""
        if not self._held:
            raise RuntimeError("HostCopy: its buffer was given back; wait for the copy before it is released")
        self._buffer.wait()
        return self._host

    def release(self) -> None:
        """Give the buffer back; a second call does nothing."""
        if self._held:
            self._held = False
            self._free.put(self._buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.release()


class _Buffer:
    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def shaped(self, like: torch.Tensor) -> torch.Tensor:
        """The buffer as a tensor of the shape and type of `like`, once no copy uses it any more."""
        self.wait()
        size = like.numel() * like.element_size()
        if len(self._bytes) < size:
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        return self._bytes[:size].view(like.dtype).view(like.shape)

    def mark(self, device: torch.device) -> None:
        """A copy was started on the device's current stream."""
        if device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
