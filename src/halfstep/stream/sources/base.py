"""What a source of messages is, for the thread that receives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from halfstep.stream.events import Identity, Message
from halfstep.stream.protocol import Ranges

Guarantee = Literal["acknowledged", "numbered", "unnumbered"]


@dataclass(frozen=True)
class Incoming:
    """A message that came, not yet read. `load` reads it, in any thread, and raises MessageError; `size` is in bytes,
    `raw` what came, for the dead letters; `origin` says from where."""

    size: int
    load: Callable[[], Message]
    raw: bytes | memoryview
    origin: str


class Source:
    """Where messages come from. `receive`, `tell` and `close` are called by one thread, the rest by any.

    `guarantee` is the best that can be had of it: *acknowledged*: what was not committed comes again; *numbered*: what
    is missing is known; *unnumbered*: what did not reach us cannot be known.
    """

    guarantee: Guarantee = "unnumbered"
    exhausted = False  # nothing more will come
    urls: Sequence[str] = ()  # addresses, of sockets

    def receive(self, timeout_s: float) -> Incoming | None:
        """The next message; None when none came for so long."""
        raise NotImplementedError

    def tell(self) -> None:
        """Let producers know what there is to tell them; `receive` does so too."""

    def committed(self, identities: Sequence[Identity]) -> None:
        """These events are on disk."""

    def refused(self, identity: Identity, reason: str) -> None:
        """This event cannot be used, and is among the dead letters."""

    def answer(self, message: Message, committed: Ranges, leased: Ranges, refused: Ranges) -> None:
        """Tell the producer that asked what became of its events; with the end of its run, that it was heard."""

    def close(self) -> None:
        """Let go of sockets and files; what is to be told is told before."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()
