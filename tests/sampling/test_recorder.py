"""Recording: nothing promised is lost, samples stay what they are, and a full disk does not stop the sampler."""

import multiprocessing
import os
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from halfstep.errors import InputError
from halfstep.sampling import MemoryRecorder, NullRecorder, Recorder, Step, StoreRecorder
from halfstep.store import TrajectoryFormat, TrajectoryStore, repair_trajectories, verify_trajectories
from halfstep.store.predictive import count_states
from tests.support.cli import run_script

EXACT = TrajectoryFormat(storage="fp32")


def sample(
    recorder: Recorder, steps: int = 20, shape: tuple[int, ...] = (4, 8, 8), seed: int = 0
) -> list[torch.Tensor]:
    """A sampler that works in place on one latent, as some do."""
    generator = torch.Generator().manual_seed(seed)
    x, states = torch.randn(shape, generator=generator), []
    for k in range(steps + 1):
        recorder.record(Step(k, 1000.0 - 50 * k, 1 - k / steps, x))
        states.append(x.clone())
        x.mul_(0.9).add_(0.05 * torch.randn(shape, generator=generator))
    return states


def test_all_recorders_see_the_same_and_change_nothing(tmp_path: Path) -> None:
    memory = MemoryRecorder()
    with StoreRecorder(TrajectoryStore.create(tmp_path / "s"), "a", format=EXACT, prompt="p") as recorder:
        recorded = sample(recorder)
    assert all(
        torch.equal(a, b) and torch.equal(a, c)
        for a, b, c in zip(sample(NullRecorder()), recorded, sample(memory), strict=True)
    )
    run = TrajectoryStore.open(tmp_path / "s")["a"]
    assert run.problems == ()
    assert run.sigmas.tolist() == [1 - k / 20 for k in range(21)]
    assert all(np.array_equal(run.latents[k], state.numpy()) for k, state in enumerate(recorded))
    assert all(torch.equal(step.latent, state) for step, state in zip(memory.steps, recorded, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_latents_are_kept_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    latent = torch.randn(4, 8, 8).to(torch.float16).to(dtype)
    with StoreRecorder(TrajectoryStore.create(tmp_path / "s"), "a", format=EXACT) as recorder:
        recorder.record(Step(0, 0.0, 1.0, latent))
    assert np.array_equal(TrajectoryStore.open(tmp_path / "s")["a"].latents[0], latent.float().numpy())


@pytest.mark.parametrize(("interval", "kept"), [(1, list(range(21))), (5, [0, 5, 10, 15, 20]), (8, [0, 8, 16, 20])])
def test_the_interval_keeps_the_first_and_the_last(tmp_path: Path, interval: int, kept: list[int]) -> None:
    with StoreRecorder(TrajectoryStore.create(tmp_path / "s"), "a", format=EXACT, interval=interval) as recorder:
        states = sample(recorder)
    run = TrajectoryStore.open(tmp_path / "s")["a"]
    assert run.steps.tolist() == kept
    assert all(np.array_equal(run.latents[i], states[k].numpy()) for i, k in enumerate(kept))


def test_a_done_ticket_is_a_durable_step(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    recorder = StoreRecorder(store, "a", format=EXACT)
    for k in range(20):
        latent = torch.full((4, 8, 8), float(k))
        recorder.record(Step(k, float(k), float(k), latent)).result()
        assert np.array_equal(store["a"].latents[k], latent.numpy())  # as another process would see it
    recorder.close()
    assert store["a"].problems[0].startswith("incomplete")


def test_a_sampler_keeps_its_cores(tmp_path: Path) -> None:
    """Groups are encoded in the end and not beside it. What is left is what packing early leaves, byte for byte."""
    store = TrajectoryStore.create(tmp_path / "s")
    latents = store.root / "a" / "latents"
    with StoreRecorder(store, "a", seed=3) as recorder:
        states = sample(recorder, steps=20)
        recorder.record(Step(21, 0.0, 0.0, torch.zeros(4, 8, 8))).result()
        assert sorted(path.name for path in latents.iterdir()) == ["zarr.json"]
    sigmas = [1 - k / 20 for k in range(21)] + [0.0]
    store.add("b", [*(state.numpy() for state in states), np.zeros((4, 8, 8), np.float32)], sigmas=sigmas, seed=3)
    kept, early = (
        {path.name: path.read_bytes() for path in (store.root / key / "latents").iterdir()} for key in ("a", "b")
    )
    assert kept == early
    assert len(kept) == 2
    assert count_states(kept["c.0.0.0.0"]) == 22


def test_leaving_by_an_exception_keeps_what_was_recorded(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    with pytest.raises(KeyboardInterrupt), StoreRecorder(store, "a", format=EXACT) as recorder:
        sample(recorder, steps=6)
        raise KeyboardInterrupt
    assert len(store["a"]) == 7
    assert not store["a"].attributes["complete"]


def test_finishing_twice_is_finishing_once(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    with StoreRecorder(store, "a", format=EXACT, interval=4) as recorder:
        sample(recorder, steps=5)
        recorder.finish()
        with (tmp_path / "other").open("w") as other:  # it may get the descriptor that the journal had
            recorder.close()
            recorder.finish()
            other.write("mine")
    assert store["a"].steps.tolist() == [0, 4, 5]
    assert store["a"].attributes["complete"]
    with pytest.raises(InputError, match="got step 9 after the recording was finished"):
        recorder.record(Step(9, 0.0, 0.0, torch.zeros(4, 8, 8)))


def test_nobody_waits_for_ever_for_a_step_that_is_left_out(tmp_path: Path) -> None:
    with StoreRecorder(TrajectoryStore.create(tmp_path / "s"), "a", interval=3) as recorder:
        for k in range(8):
            recorder.record(Step(k, float(k), float(k), torch.zeros(4, 8, 8))).result()


def test_bad_steps_are_named_at_once(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    recorder = StoreRecorder(store, "a")
    recorder.record(Step(0, 1.0, 1.0, torch.zeros(4, 8, 8)))
    with pytest.raises(InputError, match=r"s/a: step 1 has the shape \[4, 8, 7\], the steps before \[4, 8, 8\]"):
        recorder.record(Step(1, 1.0, 1.0, torch.zeros(4, 8, 7)))
    with pytest.raises(InputError, match="got step 0 after step 0"):
        recorder.record(Step(0, 1.0, 1.0, torch.zeros(4, 8, 8)))
    with pytest.raises(InputError, match="sigma nan; expected numbers"):
        recorder.record(Step(1, 1.0, float("nan"), torch.zeros(4, 8, 8)))
    with pytest.raises(InputError, match="already being recorded"):
        StoreRecorder(store, "a")
    recorder.finish()
    with pytest.raises(InputError, match="already in the store"):
        StoreRecorder(store, "a")
    with pytest.raises(InputError, match="storage interval: got 0"):
        StoreRecorder(store, "b", interval=0)


FULL_DISK = """
import resource, sys, warnings
import torch
from tests.sampling.test_recorder import sample
from halfstep.sampling import NullRecorder, StoreRecorder
from halfstep.store import TrajectoryStore
store = TrajectoryStore.create(sys.argv[1])
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
shape = (4, 32, 32)
resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 4 * 4 * 32 * 32 + 2000, resource.RLIM_INFINITY))
with StoreRecorder(store, "a") as recorder:
    states = sample(recorder, shape=shape)
assert all(torch.equal(a, b) for a, b in zip(states, sample(NullRecorder(), shape=shape), strict=True))
print(len(states))
"""


def test_a_full_disk_does_not_stop_the_sampler(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writes fail with EFBIG as they do with ENOSPC."""
    done = run_script(FULL_DISK, tmp_path / "s")
    assert done.stdout == "21\n"
    assert done.stderr.count("recording stopped, sampling goes on") == 1
    assert "free some space" in done.stderr
    run = TrajectoryStore.open(tmp_path / "s")["a"]
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    assert run.problems[0] == "incomplete: its recording did not finish"
    assert "recording stopped" in run.problems[1]
    assert verify_trajectories(tmp_path / "s").ok


def test_what_the_format_cannot_hold_stops_the_recording_only(tmp_path: Path) -> None:
    recorder = StoreRecorder(TrajectoryStore.create(tmp_path / "s"), "a", format=TrajectoryFormat("raw"))
    assert recorder.record(Step(0, 1.0, 1.0, torch.ones(2, 4, 4))).exception() is None
    failed = recorder.record(Step(1, 1.0, 0.5, torch.full((2, 4, 4), 1e6)))
    assert "not finite in fp16" in str(failed.exception())
    with pytest.warns(RuntimeWarning, match="recording stopped"):
        after = recorder.record(Step(2, 1.0, 0.2, torch.ones(2, 4, 4)))
    assert after.exception() is failed.exception()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        recorder.finish()
    run = TrajectoryStore.open(tmp_path / "s")["a"]
    assert run.steps.tolist() == [0]
    assert "not finite in fp16" in run.problems[1]


def _record_for_ever(root: Path, first: int, said: Connection) -> None:
    """Record runs, and say on the pipe, a line at once, which tickets are done."""
    say = said.fileno()
    store = TrajectoryStore.create(root)
    os.write(say, b"ready\n")
    for run in range(first, 10**9):
        with StoreRecorder(store, f"r{run}", format=EXACT) as recording:
            for k in range(37):
                ticket = recording.record(Step(k, float(k), float(-k), _latent(run, k)))
                ticket.add_done_callback(lambda _, line=f"{run} {k}\n": os.write(say, line.encode()))
        os.write(say, f"{run} end\n".encode())


def _latent(run: int, k: int) -> torch.Tensor:
    return torch.full((2, 4, 4), float(run)) * torch.arange(32).reshape(2, 4, 4) + k


@pytest.mark.slow
def test_200_kills_lose_nothing_that_was_promised(tmp_path: Path) -> None:
    """kill -9 after any number of done tickets, anywhere in a step; every step whose ticket was done is there, exactly,
    before and after repair."""
    rng = np.random.default_rng(0)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    promised: dict[int, set[int]] = {}
    ended: set[int] = set()
    for kill in range(200):
        reading, writing = processes.Pipe(duplex=False)
        recording = processes.Process(target=_record_for_ever, args=(tmp_path / "s", 1000 * kill, writing))
        recording.start()
        writing.close()
        with os.fdopen(os.dup(reading.fileno()), "rb") as said:
            assert said.readline() == b"ready\n"
            heard = [said.readline() for _ in range(rng.integers(1, 46))]
            time.sleep(float(rng.uniform(0, 0.004)))  # about a step, and nothing depends on how far it got
            recording.kill()
            recording.join()
            for line in b"".join([*heard, *said]).decode().splitlines():
                run, _, step = line.partition(" ")
                if step == "end":
                    ended.add(int(run))
                else:
                    promised.setdefault(int(run), set()).add(int(step))
    store = TrajectoryStore.open(tmp_path / "s")
    _hold_promises(store, promised, ended)
    repair_trajectories(tmp_path / "s")
    _hold_promises(store, promised, ended)
    assert verify_trajectories(tmp_path / "s").ok
    assert 0 < len(ended) < len(promised)


def _hold_promises(store: TrajectoryStore, promised: dict[int, set[int]], ended: set[int]) -> None:
    for number, steps in promised.items():
        run = store[f"r{number}"]
        assert steps <= set(run.steps.tolist())
        assert run.attributes["complete"] or number not in ended
        for k, latent in zip(run.steps.tolist(), run.latents, strict=True):
            assert np.array_equal(latent, _latent(number, k).numpy())
        assert np.array_equal(run.sigmas, -run.steps.astype(float))


MEMORY = """
import resource, sys, torch
from halfstep.sampling import Step, StoreRecorder
from halfstep.store import TrajectoryFormat, TrajectoryStore
store, latent = TrajectoryStore.create(sys.argv[1]), torch.zeros(16, 256, 256)  # 4 MB
def run(name, steps):
    with StoreRecorder(store, name, format=TrajectoryFormat("raw")) as recorder:
        for k in range(steps):
            recorder.record(Step(k, float(k), float(k), latent))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
few = run("few", 8)
print(run("many", 40) - few)
"""


@pytest.mark.slow
def test_the_limit_on_waiting_steps_holds(tmp_path: Path) -> None:
    """A sampler that is faster than the disk waits: 40 steps, 160 MB, need no more memory than 8."""
    done = run_script(MEMORY, tmp_path / "s")
    assert int(done.stdout) < 60_000  # kB


@pytest.mark.parametrize(
    ("latent", "named"),
    [
        (torch.zeros(4, 8, 8, dtype=torch.complex64), r"step 0 is complex64 \[4, 8, 8\]; expected floating numbers"),
        (torch.zeros(4, 8, 8, dtype=torch.int32), "step 0 is int32"),
        (torch.zeros(4, 0, 8), r"step 0 is float32 \[4, 0, 8\]; expected floating numbers, and some of them"),
    ],
)
def test_what_is_no_latent_is_refused_and_leaves_nothing(latent: torch.Tensor, named: str, tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    with pytest.raises(InputError, match=named), StoreRecorder(store, "a") as recorder:
        recorder.record(Step(0, 0.0, 1.0, latent))
    assert sorted(path.name for path in store.root.iterdir()) == ["zarr.json"]


def test_float64_beyond_float32_is_named(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    large = torch.tensor([[1e300, float("inf")], [1.0, float("nan")]], dtype=torch.float64)
    named = "step 0: 1 of its float64 values are beyond float32's range"
    with pytest.warns(RuntimeWarning, match=named), StoreRecorder(store, "a") as recorder:
        recorder.record(Step(0, 0.0, 1.0, large))
    assert "a" not in store
    with StoreRecorder(store, "a") as recorder:  # the name is free, and what is infinite already is kept
        recorder.record(Step(0, 0.0, 1.0, large[:, 1]))
    assert store["a"].latents[0].tolist()[0] == float("inf")
