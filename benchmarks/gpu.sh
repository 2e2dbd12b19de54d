#!/usr/bin/env bash
# What needs a GPU: its tests, then the benchmarks, a JSON file each in folder OUT.
#   benchmarks/gpu.sh OUT [tests | verbs | precision | live | suite]...
# All parts, or those named: each is meant to take less than ten minutes.
# PYTHON is the interpreter that halfstep is installed for, .venv/bin/python by default.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT}
shift
parts=" ${*:-tests verbs precision live suite} "
python=${PYTHON:-.venv/bin/python}
failed=0
mkdir -p "$out"

bench() { # NAME ARGUMENTS...
    name=$1
    shift
    echo "== bench $name $*"
    "$python" -m halfstep bench "$name" "$@" --json >"$out/.$name" || failed=1
    if [[ -s $out/.$name ]]; then mv "$out/.$name" "$out/$name.json"; fi # a verdict may be an exit code
}

wanted() { [[ $parts == *" $1 "* ]]; }

"$python" -m halfstep probe --json >"$out/probe.json" || failed=1
if wanted tests; then
    "$python" -m pytest tests/gpu -n 0 || failed=1
fi
if wanted verbs; then
    bench encode --images 256 --size 256 --rounds 3 --no-memory
    bench sample --batch 16 --updates 100 --rounds 3
    bench trajectory --rounds 2
    bench stream --rounds 5 --frames 200
    bench train --batch 32 --steps 5 --rounds 2 --no-memory
fi
if wanted precision; then
    bench simulate --rounds 10
    bench memory
fi
if wanted live; then
    bench live --rounds 5
    bench live-load --rounds 5
    bench drift
fi
if wanted suite; then
    bench suite --device auto
fi
exit "$failed"
