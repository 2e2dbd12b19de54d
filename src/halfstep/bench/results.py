"""Documents that benchmarks wrote: read them, and hold two suites against each other as far as that goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halfstep.bench.gate import TOLERANCE
from halfstep.bench.suite import FORMAT
from halfstep.errors import InputError, some
from halfstep.files import file_errors

_SAME = ("device", "cores", "torch", "halfstep")  # of a machine, for two runs to be worth a look


def read_result(path: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The document of a benchmark of one of `kinds`. Raises InputError for another file, or one without rows."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected what `halfstep bench {kinds[0]}` wrote")
    try:
        with file_errors(path):
            result = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error}); expected what `halfstep bench {kinds[0]}` wrote") from error
    kind = result.get("benchmark") if isinstance(result, dict) else None
    if not isinstance(result, dict) or kind not in kinds:
        raise InputError(f"{path}: is not of `halfstep bench {'` or `'.join(kinds)}`; got {kind or 'something else'}")
    if kind == "canary":
        return result
    if result.get("format") != FORMAT:
        raise InputError(
            f"{path}: has format {result.get('format')}; this version reads {FORMAT}: measure again with it"
        )
    if not result.get("rows"):
        raise InputError(f"{path}: holds no rows; nothing was measured")
    return result


def compare_files(before: Path, after: Path, *, tolerance: float = TOLERANCE, force: bool = False) -> dict[str, Any]:
    """Costs of a call in suite `after` as multiples of those in `before`, by case.

    Two runs at two times can only warn: `warnings` names what differs by more than the tolerance. Raises InputError
    when machine or versions differ, unless `force`, and when no case is in both.
    """
    old, new = (read_result(path, ("suite",)) for path in (before, after))
    differ = [
        f"{name} {old['machine'].get(name)} and {new['machine'].get(name)}"
        for name in _SAME
        if old["machine"].get(name) != new["machine"].get(name)
    ]
    if differ and not force:
        raise InputError(
            f"{before}, {after}: were measured with {'; '.join(differ)}, which no ratio would tell from a change; "
            "measure again, or compare with --force"
        )
    costs = [{row["case"]: row["cost_ms"] for row in result["rows"]} for result in (old, new)]
    common = [name for name in costs[0] if name in costs[1]]
    if not common:
        listed = " and ".join(some(list(of_one), 2) for of_one in costs)
        raise InputError(f"{before}, {after}: have no case in common; they hold {listed}")
    ratios = {name: round(costs[1][name] / costs[0][name], 4) for name in common}
    return {
        "differences": differ,
        "ratios": ratios,
        "warnings": [
            f"{name}: {abs(ratio - 1):.1%} {'slower' if ratio > 1 else 'faster'}"
            for name, ratio in ratios.items()
            if not 1 / (1 + tolerance) <= ratio <= 1 + tolerance
        ],
        "only_before": [name for name in costs[0] if name not in costs[1]],
        "only_after": [name for name in costs[1] if name not in costs[0]],
    }
