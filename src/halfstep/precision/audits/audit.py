"""audit(module, inputs): which modules must stay in fp32 when the rest is half, on a device that need not be here."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from halfstep.errors import InputError
from halfstep.precision.apply import original_class, plain_attention
from halfstep.precision.arithmetic import Target
from halfstep.precision.audits.calls import Call, calls_of, floats_of, relative_error, require_sound
from halfstep.precision.audits.cure import Islands, cured, is_inside, without_inner
from halfstep.precision.audits.rescale import Rescaling, find_rescaling, rescaled
from halfstep.precision.audits.spread import Contributions, Range, contributions
from halfstep.precision.audits.trace import (
    HEADROOM,
    LOST,
    MIXED,
    OVERFLOW,
    READS,
    Event,
    Stressed,
    trace,
    weight_events,
)
from halfstep.precision.policy import PrecisionPolicy, torch_dtype
from halfstep.precision.simulate import as_it_was, require_fp32, simulate
from halfstep.precision.watch import Place

CURES = ("islands", "rescale")
_ROUNDS = 8  # of finding what a policy has no room for and adding islands
_MOST_FORWARDS = 80
_MADE_FROM = 3  # calls; what more there are verifies
_RISK_BITS = 2
_SPREAD = 0.4  # of the modules: where the error is cured by no fewer, they are not listed as islands
_SPARE = 0.7  # of the tolerance that an audit uses up where it has the choice: other inputs have other errors


@dataclass(frozen=True)
class Finding:
    """An event and what it does. harm: the relative error of the output when everything but its cure is in place,
    infinite where the output is not finite; None where that was not tried. cure: the island, empty for none."""

    event: Event
    cure: str
    harm: float | None


@dataclass(frozen=True)
class AuditReport:
    """policy: to give to `prepare`, `encode --precision` and the like. islands: the names in it. error: relative, of
    the output under the policy against fp32, on held-out inputs where there were some. verdict: one line. met: whether
    the error is within the tolerance. findings: what the half type has no room for, the most harmful first. ranges: of
    every operation in fp32. risks: those with less than two bits to spare that stay half. opaque: operations of
    extensions, whose insides cannot be simulated. forwards: passes of the module that it took."""

    policy: PrecisionPolicy
    islands: list[str]
    error: float
    tolerance: float
    verdict: str
    met: bool
    target: Target
    findings: tuple[Finding, ...]
    ranges: tuple[Range, ...]
    risks: tuple[Event, ...]
    opaque: tuple[str, ...]
    forwards: int
    held_out: int
    rescaling: Rescaling

    def to_dict(self) -> dict[str, Any]:
        """What `halfstep audit --json` prints."""
        return {
            "policy": str(self.policy),
            "islands": self.islands,
            "error": _number(self.error),
            "tolerance": self.tolerance,
            "verdict": self.verdict,
            "met": self.met,
            "target": str(self.target),
            "verified": "simulated",
            "held_out": self.held_out,
            "forwards": self.forwards,
            "opaque": list(self.opaque),
            "rescaling": asdict(self.rescaling) if self.rescaling else None,
            "events": [
                {**{k: _number(v) for k, v in asdict(f.event).items()}, "cure": f.cure, "harm": _number(f.harm)}
                for f in self.findings
            ],
            "risks": [{k: _number(v) for k, v in asdict(risk).items()} for risk in self.risks],
        }


def audit(
    module: nn.Module,
    inputs: Any,
    *,
    types: Sequence[str] | None = None,
    tolerance: float = 1e-2,
    target: Target | str = "fp16",
    held_out: Any = None,
    prune: bool = True,
    cure: str = "islands",
) -> AuditReport:
    """Find the smallest set of modules of an fp32 module that must stay in fp32 so that its output in a half type is
    within `tolerance` of fp32: the norm of the difference over the norm.

    inputs: of one call (a tensor, a tuple, a dict of keywords), or a list of such. held_out: calls that the policy is
    verified on and not made from; of several `inputs` the last is held out where none are given. types: half types to
    try in turn, the first that is within the tolerance is taken; by default the target's. prune: try to do without each
    island, which takes most of the time. cure: `islands`, or `rescale`, which first divides streams that the type
    cannot hold by powers of two where fp32 gives the same bits; `rescale(module, report.rescaling)` then comes before
    `prepare`. The arithmetic is simulated, so that the device is not needed; the module is as it was afterwards.

    Raises InputError for weights that are not fp32, weights or inputs that are not finite or on two devices, a module
    whose outputs have no floating-point tensor, are all zero, or differ from pass to pass (dropout, random numbers of
    its own), and an unknown type.
    """
    target = Target.parse(target) if isinstance(target, str) else target
    if not 0 < tolerance < float("inf"):
        raise InputError(f"audit: got tolerance {tolerance}; expected a positive number, such as 1e-2")
    calls = calls_of(inputs)
    count = min(_MADE_FROM, len(calls) if held_out is not None else max(1, len(calls) - 1))
    calls, others = calls[:count], [*calls[count:], *([] if held_out is None else calls_of(held_out))]
    if cure not in CURES:
        raise InputError(f"audit: got cure {cure!r}; expected {' or '.join(CURES)}")
    require_fp32(module)
    require_sound(module, [*calls, *others])
    if original_class(module) is not type(module):
        raise InputError(f"audit: the module is prepared for {module._halfstep_policy}; audit it as it was before")
    reports = []
    with as_it_was(module), plain_attention():
        for name in types or (target.type,):
            state = _Audit(module, calls, others, tolerance, replace(target, type=name))
            reports.append(state.run_rescaled(prune) if cure == "rescale" else state.run(prune))
            if reports[-1].met:
                break
    return min(reports, key=lambda report: (not report.met, report.error))


class _Audit:
    """The state of an audit for one type."""

    def __init__(
        self, module: nn.Module, calls: list[Call], held_out: list[Call], tolerance: float, target: Target
    ) -> None:
        self.module, self.calls, self.held_out = module, calls, held_out
        self.tolerance, self.target = tolerance, target
        self.place = Place(module)
        self.forwards = 0
        self.opaque: set[str] = set()
        self.events: dict[tuple[str, str, str, str], Event] = {}
        self.cures: dict[tuple[str, str, str, str], set[str]] = {}
        self._expected: dict[int, list[torch.Tensor]] = {}
        self._known: dict[tuple[Any, ...], float] = {}
        self._failure = ""  # of the module's own code in half, the newest

    def run_rescaled(self, prune: bool) -> AuditReport:
        self._require_repeatable()
        rescaling, why = find_rescaling(self.module, [*self.calls, *self.held_out], self.target, self.place)
        self.forwards += 3 * len(self.calls) + 3 * len(self.held_out)
        with rescaled(self.module, rescaling):
            report = self.run(prune)
        return replace(report, rescaling=rescaling, verdict=f"{report.verdict}; {why}" if why else report.verdict)

    def run(self, prune: bool) -> AuditReport:
        self._require_repeatable()
        islands = self._without_room(self.calls, self._for_weights())
        spread: Contributions | None = None
        note = ""
        error = self.error(islands, self.calls)
        if error > self.tolerance:
            islands, error, spread, note = self._for_rounding(islands, error)
        if prune and error <= self.tolerance:
            islands = self._pruned(islands)
        error = self.error(islands, self.calls)
        if self.held_out and error <= self.tolerance < self.error(islands, self.held_out):
            islands = self._without_room(self.held_out, islands)  # made from them too, so that nothing is held out
            self.calls, self.held_out = [*self.calls, *self.held_out], []
            error = self.error(islands, self.calls)
        verified = max(error, self.error(islands, self.held_out))
        if spread is None:
            spread = self._contributions()
        return self._report(islands, verified, spread, note)

    def error(self, islands: Islands, calls: Sequence[Call], *, stress: bool = False) -> float:
        """The largest over the calls; stops at the first beyond the tolerance."""
        worst = 0.0
        for call in calls:
            key = (id(call), stress, *sorted(islands.items()))
            if key not in self._known:
                self._known[key] = self._measured(islands, call, stress)
            worst = max(worst, self._known[key])
            if worst > self.tolerance:
                break
        return worst

    def policy(self, islands: Islands) -> PrecisionPolicy:
        if "" in islands:
            return PrecisionPolicy(reason="all of it must be fp32")
        half = self.target.type
        odd = [name for name in islands if set(name) & set(",|=") or name.endswith("+")]
        if odd:
            raise InputError(f"audit: {odd[0]!r} cannot be named in a policy; rename it, without ',', '|', '=' and '+'")
        patterns = tuple(glob.escape(name) + "+" * hands_on for name, hands_on in sorted(islands.items()))
        return PrecisionPolicy(params=half, compute=half, storage=half, islands=patterns)

    def _measured(self, islands: Islands, call: Call, stress: bool) -> float:
        self.forwards += 1
        observer = Stressed(torch.finfo(torch_dtype(self.target.type)).max / HEADROOM) if stress else None
        policy = self.policy(islands)
        target = self.target if policy.compute != "fp32" else None
        try:
            with simulate(self.module, policy, target, observer=observer) as run, torch.no_grad():
                found = floats_of(call.on(run))
                self.opaque.update(run.opaque)
        except (InputError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - of the module's own code, which ran in fp32
            self._failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return float("inf")
        return relative_error(found, self._expectation(call))

    def _expectation(self, call: Call) -> list[torch.Tensor]:
        if id(call) not in self._expected:
            self.forwards += 1
            try:
                with torch.no_grad():
                    self._expected[id(call)] = floats_of(call.on(self.module))
            except Exception as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise InputError(f"audit: the module cannot be called with the inputs in fp32 ({reason})") from error
        return self._expected[id(call)]

    def _require_repeatable(self) -> None:
        call = self.calls[0]
        if id(call) in self._expected:
            return
        for other in (*self.calls, *self.held_out):
            self._expectation(other)
        first = self._expectation(call)
        outputs = [tensor for found in self._expected.values() for tensor in found if tensor.numel()]
        if any(tensor.isnan().any() or not tensor.isfinite().any() for tensor in outputs):
            raise InputError(
                "audit: the module returns NaN, or nothing finite, in fp32; there is nothing to compare with"
            )
        if not first:
            raise InputError("audit: the module returns no floating-point tensor; there is nothing to be exact about")
        if not any(tensor.any() for tensor in first):
            raise InputError(
                "audit: the module returns only zeros in fp32, as a network before its training does; load its weights"
            )
        self.forwards += 1
        with torch.no_grad():
            second = floats_of(call.on(self.module))
        if relative_error(second, first) > 0:
            raise InputError(
                "audit: the module gives another result each time (dropout, or random numbers of its own); call "
                ".eval(), or let it draw from a generator that begins anew in each call"
            )

    def _for_weights(self) -> Islands:
        islands: Islands = {}
        for event in weight_events(self.module, self.target, self.place):
            self._note(event, {event.module})
            islands[event.module] = False
        return without_inner(islands)

    def _without_room(self, calls: Sequence[Call], islands: Islands) -> Islands:
        """Islands for all that the type has no room for."""
        for _ in range(_ROUNDS):
            before = dict(islands)
            for call in calls:
                if "" in islands:
                    return islands
                self.forwards += 1
                found = trace(self.module, call, self.policy(before), self.target, self.place)
                wanted, cures = cured(found, before, self.place)
                for event, names in zip(found.events, cures, strict=True):
                    if event.kind != MIXED or not before:  # what islands that were tried brought about is no finding
                        self._note(event, names)
                islands = without_inner({n: islands.get(n, False) or wide for n, wide in (islands | wanted).items()})
            if islands == before:
                break
        return islands

    def _note(self, event: Event, cures: set[str]) -> None:
        if event.kind == READS and not cures:
            return
        key = (event.kind, event.module, event.operation, event.line)
        if key not in self.events or self.events[key].local_error < event.local_error:
            self.events[key] = event
        self.cures.setdefault(key, set()).update(cures)

    def _contributions(self) -> Contributions:
        self.forwards += 1
        return contributions(self.module, self.calls[0], self.target, self.place)

    def _for_rounding(self, islands: Islands, error: float) -> tuple[Islands, float, Contributions, str]:
        """Islands where roundings add up to more than the tolerance: the fewest of those that contribute most."""
        spread = self._contributions()
        ranked = [
            name
            for name, share in sorted(spread.units.items(), key=lambda item: -item[1])
            if share > 0 and name and not is_inside(name, islands)
        ]

        def with_first(count: int) -> Islands:
            return without_inner({**islands, **dict.fromkeys(ranked[:count], True)})

        low, high = 0, len(ranked)
        if not ranked or self.error(with_first(high), self.calls) > self.tolerance:
            best = min((0, high), key=lambda count: self.error(with_first(count), self.calls))
            note = "no set of islands is within it" if ranked else "no rounding can be told from another"
            return with_first(best), self.error(with_first(best), self.calls), spread, note
        left = sum(spread.units.values())
        guess = 0
        while guess < high and left > (0.8 * self.tolerance) ** 2:
            left -= spread.units[ranked[guess]]
            guess += 1
        step = guess or 1
        while low + 1 < high:
            if self.error(with_first(step), self.calls) <= self.tolerance:
                high = step
            else:
                low = step
            step = (low + high) // 2
        of = f"{high} of {len(ranked)} modules"
        if high > _SPREAD * len(ranked) and high > 4:
            return islands, error, spread, f"rounding is spread: {of} would have to be fp32"
        note = f"rounding is spread, over {of}" if high > _SPREAD / 2 * len(ranked) and high > 4 else ""
        return with_first(high), self.error(with_first(high), self.calls), spread, note

    def _pruned(self, islands: Islands) -> Islands:
        """Without the islands that can be done without, also when values are twice as large."""
        stress = self.error(islands, self.calls, stress=True) <= self.tolerance
        goal = max(_SPARE * self.tolerance, self.error(islands, self.calls, stress=stress))
        likely = {name for key, event in self.events.items() if event.kind == LOST for name in self.cures[key]}
        for name in sorted(islands, key=lambda n: (n not in likely, n)):
            if self.forwards >= _MOST_FORWARDS - 2 * len(self.calls) - len(self.held_out) - 2:
                break
            fewer = {other: wide for other, wide in islands.items() if other != name}
            if self.error(fewer, self.calls, stress=stress) <= goal:
                islands = fewer
        return islands

    def _report(self, islands: Islands, error: float, spread: Contributions, note: str) -> AuditReport:
        policy = self.policy(islands)
        met = error <= self.tolerance
        findings = []
        for key, event in self.events.items():
            cures = [island for island in islands if any(is_inside(name, {island}) for name in self.cures[key])]
            cure = min(cures, default="")
            harms = [value for island in cures if (value := self._harm(islands, island)) is not None]
            findings.append(Finding(event, cure, max(harms, default=None) if cures or harms else 0.0))
        findings.sort(key=lambda f: (-(f.harm if f.harm is not None else 0.0), -f.event.local_error))
        self.forwards += 1
        narrow = trace(self.module, self.calls[0], policy, self.target, self.place, headroom=2.0**_RISK_BITS)
        risks = tuple(event for event in narrow.events if event.kind == OVERFLOW)
        return AuditReport(
            policy=policy,
            islands=sorted(islands) if "" not in islands else [],
            error=error,
            tolerance=self.tolerance,
            verdict=self._verdict(islands, error, met, note),
            met=met,
            target=self.target,
            findings=tuple(findings),
            ranges=spread.ranges,
            risks=risks if policy.compute != "fp32" else (),
            opaque=tuple(sorted(self.opaque)),
            forwards=self.forwards,
            held_out=len(self.held_out),
            rescaling=Rescaling(),
        )

    def _harm(self, islands: Islands, name: str) -> float | None:
        """The error without an island, where it was tried."""
        fewer = {other: wide for other, wide in islands.items() if other != name}
        known = [v for k, v in self._known.items() if k[2:] == tuple(sorted(fewer.items())) and name in islands]
        return max(known, default=None)

    def _verdict(self, islands: Islands, error: float, met: bool, note: str) -> str:
        kind = self.target.type
        count = len(self.held_out)
        where = f"on {count} held-out call" + "s" * (count > 1) if count else "on the inputs it was made from"
        if "" in islands:
            return f"{kind} has no room for it: all of it must be fp32"
        if not met:
            found = f"the tolerance of {self.tolerance:g} is not met, the error is {error:.2g} {where}"
            why = note or (self._failure if error == float("inf") else "")
            return f"{found}: {why}" if why else found
        kept = "no island" if not islands else f"{len(islands)} island" + "s" * (len(islands) > 1)
        held = f"{kind} with {kept} is within {self.tolerance:g}: the error is {error:.2g} {where} (simulated)"
        return f"{held}; {note}" if note else held


def _number(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, float):
        return None if value != value else value if abs(value) < float("inf") else "inf"
    return value
