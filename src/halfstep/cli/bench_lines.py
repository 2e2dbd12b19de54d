"""What `halfstep bench` prints of its results, where nobody asks for JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def timings(result: dict[str, Any]) -> Iterator[str]:
    """Of most benchmarks: medians with their spread, then all else by its name."""
    yield f"{result['benchmark']} on {result['machine']['device']}, {result['machine']['cores']} cores"
    for name, timing in result["seconds"].items():
        yield (
            f"  {name:24} {timing['median']:9.4g} s   ({timing['smallest']:.4g} to {timing['largest']:.4g}, "
            f"{timing['rounds']} rounds)"
        )
    for name, value in result.items():
        if name not in ("benchmark", "command", "machine", "seconds", "curves"):
            yield f"  {name}: {value}"


def trajectory(result: dict[str, Any]) -> Iterator[str]:
    for name, content in result["trajectories"].items():
        yield f"{name}: {content['shape']}, {content['megabytes']} MB in fp32, MB of it a second"
        for way, facts in content["ways"].items():
            yield (
                f"  {way:34} {facts['share_of_fp32']:.3f}  error {facts['rms_error']:.1e}  encode "
                f"{facts['encode_mb_per_s']:7.0f}  decode {facts['decode_mb_per_s']:7.0f}  a step "
                f"{facts['random_step_ms']:8.2f} ms"
            )
    for name, reason in result["not_measured"].items():
        yield f"  {name}: not measured ({reason})"
    if result["recorder"]:
        cost = result["recorder"]
        yield (
            f"recording: {cost['overhead']:+.2%} of a sampler's time at {cost['step_ms']:.0f} ms a step "
            f"({cost['overhead_with_finish']:+.2%} with the wait at the end), same samples: {cost['same_samples']}"
        )


def canary(result: dict[str, Any]) -> Iterator[str]:
    for name, facts in (("the same", result["same"]), ("10% more work", result["ten_percent_more"])):
        found = ", ".join(f"{count} {verdict}" for verdict, count in facts["verdicts"].items())
        by_wall = ", ".join(f"{count} {verdict}" for verdict, count in facts["verdicts_by_wall_seconds"].items())
        yield f"{name}: {found} of {facts['trials']}; by wall seconds {by_wall}"


def live(result: dict[str, Any]) -> Iterator[str]:
    for name, rate in result["frames_per_second"].items():
        yield f"{name}: {rate} frames a second"
    yield f"the engine adds {result['engine_adds']:.1%}"
    if "resident_mb" in result:
        yield f"memory: {result['resident_mb']} MB, grew by {result['growth_after_the_first_tenth']:.1%}"


def conditions(result: dict[str, Any]) -> Iterator[str]:
    for name, facts in result["ways"].items():
        yield (
            f"{name}: the loss grows by {facts['action']:.1%} with another action, {facts['context']:.1%} with another "
            f"context; loss {facts['loss']}"
        )


def simulate(result: dict[str, Any]) -> Iterator[str]:
    for name, facts in result["networks"].items():
        yield f"{name}: a simulated pass takes {facts['simulated_over_fp32']:.2f} times one in fp32"
        for policy, errors in facts["policies"].items():
            yield (
                f"  {policy:10} error {errors['simulated']:.2e} simulated, {errors['real']:.2e} on this device "
                f"({errors['real_over_simulated']:.2f} times)"
            )


def memory(result: dict[str, Any]) -> Iterator[str]:
    for row in result["cases"]:
        yield f"{row['name']:42} planned {row['planned']:7.1f} MB, measured {row['measured']:7.1f} ({row['off']:+.1%})"


def statistics(result: dict[str, Any]) -> Iterator[str]:
    for design, changes in result["designs"].items():
        for change, shares in changes.items():
            share_of_sets = f"{shares['sets_with_a_finding']:.1%} of {result['sets']} sets"
            yield f"{design}; difference: {change}; a finding in {share_of_sets}"
            for name, share in shares["below_alpha"].items():
                yield f"  {name:20} p < 0.05 in {share:6.1%}, found in {shares['found'][name]:6.1%}"
