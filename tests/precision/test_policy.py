import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep import PrecisionPolicy
from halfstep.errors import InputError
from halfstep.precision import PRESETS, choose, probe, resolve, settle
from halfstep.precision.policy import STORAGE_TYPES

patterns = st.lists(st.from_regex(re.compile(r"[a-z_.*\[\]?0-9]+", re.ASCII), fullmatch=True), max_size=3).map(tuple)
scales = st.none() | st.just("dynamic") | st.floats(1e-3, 1e9)


@st.composite
def policies(draw: st.DrawFn) -> PrecisionPolicy:
    params = draw(st.sampled_from(STORAGE_TYPES))
    compute = draw(st.sampled_from(["fp32", "tf32", "bf16", "fp16"])) if params == "fp32" else params
    output, reduce, storage = (draw(st.sampled_from(STORAGE_TYPES)) for _ in range(3))
    return PrecisionPolicy(params, compute, output, reduce, storage, draw(patterns), draw(scales))


@given(policies())
def test_prints_and_parses_to_itself(policy: PrecisionPolicy) -> None:
    assert PrecisionPolicy.parse(str(policy)) == policy


@given(st.sampled_from(["auto", "auto,storage=bf16", "auto,islands=*norm*", "auto,loss_scale=dynamic"]))
def test_auto_survives_the_round_trip(text: str) -> None:
    assert str(PrecisionPolicy.parse(text)) == text


def test_presets_print_as_their_names() -> None:
    assert {name: str(policy) for name, policy in PRESETS.items()} == {name: name for name in PRESETS}


@pytest.mark.parametrize(
    ("spelling", "preset"),
    [
        ("bfloat16", "bf16-true"),
        ("bf16", "bf16-true"),
        ("float16", "16-true"),
        ("fp16", "16-true"),
        ("amp", "16-mixed"),
    ],
)
def test_usual_spellings(spelling: str, preset: str) -> None:
    assert PrecisionPolicy.parse(spelling) == PRESETS[preset]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("fp8", "'fp8'; expected one of fp32"),
        ("fp32,storage=fp8", "precision.storage: got 'fp8'; expected one of fp32, bf16, fp16"),
        ("fp32,color=red", "'color=red'"),
        ("bf16-true,compute=fp16", "precision.compute"),
        ("fp32,storage=fp16,storage=bf16", "given twice"),
        ("16-mixed,loss_scale=-1", "precision.loss_scale"),
        ("16-mixed,loss_scale=much", "precision.loss_scale"),
        ("auto,params=fp32", "auto"),
    ],
)
def test_bad_text_is_named(text: str, named: str) -> None:
    with pytest.raises(InputError, match=re.escape(named)):
        PrecisionPolicy.parse(text)


def test_resolve_keeps_what_was_set_beside_auto() -> None:
    resolved = resolve(PrecisionPolicy.parse("auto,storage=bf16,islands=head"), "cpu", "encode")
    assert not resolved.is_auto
    assert (resolved.storage, resolved.islands) == ("bf16", ("head",))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what `probe` has kept of this machine."""
    probe("cpu")
    kept = Path(os.environ["XDG_CACHE_HOME"]) / "halfstep"
    shutil.copytree(kept, tmp_path / "halfstep", ignore=shutil.ignore_patterns("*.tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "halfstep"


def _measured(own_cache: Path, **reports: dict[str, object]) -> None:
    """Put another device's measurement where `probe` keeps its own."""
    for path in own_cache.iterdir():
        values = json.loads(path.read_text())
        values["types"] = {name: {**report, **reports.get(name, {})} for name, report in values["types"].items()}
        path.write_text(json.dumps(values))


_SLOW = {"matmul_ms": 100.0, "conv_ms": 100.0, "conv_channels_last_ms": 100.0, "attention_ms": 100.0, "sound": True}
_FAST = {"matmul_ms": 1.0, "conv_ms": 1.0, "conv_channels_last_ms": 1.0, "attention_ms": 1.0, "sound": True}
_FASTEST = {"matmul_ms": 0.5, "conv_ms": 0.5, "conv_channels_last_ms": 0.5, "attention_ms": 0.5, "sound": True}


def test_auto_takes_the_fastest_sound_type(own_cache: Path) -> None:
    _measured(own_cache, fp32=_SLOW, bf16=_FAST, fp16=_FASTEST)
    assert choose("cpu", "encode").params == "fp16"
    assert choose("cpu", "train") == PrecisionPolicy.parse("16-mixed")
    _measured(own_cache, fp32=_SLOW, bf16=_FAST, fp16={**_FASTEST, "sound": False})
    policy = choose("cpu", "encode")
    assert policy.params == "bf16"
    assert "unsound" in policy.explain()


def test_auto_stays_with_fp32_where_half_is_emulated(own_cache: Path) -> None:
    _measured(own_cache, fp32=_FAST, bf16=_SLOW, fp16={**_FAST, "conv_ms": 0.99})
    policy = choose("cpu", "encode")
    assert (policy.params, policy.compute) == ("fp32", "fp32")
    assert "fp16 1." in policy.explain()


def test_one_place_settles_a_policy(own_cache: Path) -> None:
    _measured(own_cache, fp32=_FAST, bf16=_SLOW, fp16={**_FAST, "matmul_ms": math.inf})
    assert settle("auto", "cpu", "train") == (choose("cpu", "train"), ())
    policy, notes = settle("bf16-mixed,storage=fp16", "cpu", "train")
    assert str(policy) == "bf16-mixed,storage=fp16"
    assert re.fullmatch(r"bf16 is 100.0 times as slow as fp32 on .*: it is emulated, and auto .*", notes[0])
    with pytest.raises(InputError, match="cannot compute in fp16; use fp32 or auto"):
        settle("16-mixed", "cpu", "train")
    kept, notes = settle("auto,storage=bf16", "cpu", "train", kept="16-mixed,islands=head")
    assert kept == PrecisionPolicy(storage="bf16")  # what was begun on another device goes on
    assert "cannot compute in fp16, as before; fp32 is used instead" in notes[0]
    assert settle("auto", "cpu", "sample", kept="fp32,storage=fp16") == (PrecisionPolicy(storage="fp16"), ())
    assert settle("fp32", "cpu", "encode", kept="bf16-true") == (PrecisionPolicy(), ())


def test_probe_measures_again_when_its_cache_is_damaged(own_cache: Path) -> None:
    first, files = probe("cpu"), sorted(own_cache.iterdir())
    assert probe("cpu") == first
    for path in files:
        path.write_text("{")
    with pytest.warns(UserWarning, match=r"not a readable measurement"):
        again = probe("cpu")
    assert again.types.keys() == first.types.keys()
    assert probe("cpu") == again
    assert sorted(own_cache.iterdir()) == files


def test_probe_finds_the_types_of_this_machine_sound() -> None:
    assert {name: report.sound for name, report in probe("cpu").types.items()} == dict.fromkeys(
        ("fp32", "bf16", "fp16"), True
    )


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="device: got 'cuda:99'"):
        probe("cuda:99")
