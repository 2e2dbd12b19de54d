"""What streams: an event is one exposure of a detector, with all of its panels; what is known of it goes with it.

Axes: C panels, H W pixels of a panel, P peaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from halfstep.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]
Fact = int | float | str


class Identity(NamedTuple):
    """Which event this is, whatever the order in which events arrive. `run` is new each time that a producer begins,
    `source` names the producer. `event` is the producer's own name of the event (a timestamp, an image's number) and
    `sequence` its number among those of the source in this run, -1 where the producer does not number."""

    run: str
    source: str
    event: str
    sequence: int = -1


@dataclass(frozen=True)
class Event:
    """`data` [C, H, W] of the type it was sent in. `facts` are what else was sent of it: `timestamp` (a float or whole
    number, as sent), `photon_energy_eV`, and others by the producer's names."""

    identity: Identity
    data: Array
    facts: Mapping[str, Fact] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """What one message says: events, or that a source's run starts or ends. `facts` of a start hold for all events of
    the run. `expected` counts the events of the run, where the message tells. `asked` are the first and last of numbers
    of events whose state the producer wants to know."""

    events: tuple[Event, ...] = ()
    run: str = ""
    source: str = ""
    starts: bool = False
    ends: bool = False
    expected: int | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict)
    asked: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Result:
    """An event that went through the network. `peaks` [P, 3] are float32 (panel, y, x) in pixels of the wire's panels;
    `intensities` [P] float32 are sums of the wire's values. `mask` [C, H, W] bool marks the pixels of peaks; None where
    nobody asked for it. `output` [samples, ...] float32 is there instead where the network tells no two classes
    apart."""

    event: Event
    peaks: Array
    intensities: Array
    mask: Array | None = None
    output: Array | None = None


class MessageError(InputError):
    """A message that cannot be used: cut short, damaged, of another format or shape, or asking for what is refused.
    `identity` is of the event in it, where the message itself is sound and says which."""

    identity: Identity | None = None
