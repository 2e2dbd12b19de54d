"""Share one run among the processes that torchrun started; a single process needs none of it."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

from halfstep.errors import HalfstepError
from halfstep.machine import cores

# torch is imported where processes talk to each other: the command line asks for the rank alone.

T = TypeVar("T")


def is_launched() -> bool:
    """Whether torchrun started this process, alone or with others."""
    return "RANK" in os.environ


def rank() -> int:
    """This process's number among torchrun's, 0 without it; known before a team is joined."""
    return int(os.environ.get("RANK", "0"))


def own_cores() -> int:
    """This process's share of the machine's cores."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class Team:
    """This process's place among `size`. Rank 0 leads: it decides, creates the store and tidies up."""

    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def join(cls) -> Iterator[Team]:
        """The team that torchrun's environment describes, for as long as the process lives: ask again and it is the
        same. A program that was part of one ends with `leave`."""
        size = int(os.environ.get("WORLD_SIZE", "1")) if is_launched() else 1
        if size == 1:
            yield cls()
            return
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            # Ranks finish hours apart on an uneven load.
            dist.init_process_group(backend, timeout=timedelta(days=7))
        yield cls(dist.get_rank(), size)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    def device(self, name: str, *, shared: bool = False) -> str:
        """The device of this process: of `auto` and `cuda` the GPU of its own; with `shared` others may have the same,
        where there are fewer than processes."""
        import torch

        if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
            place = self.local_rank % max(1, torch.cuda.device_count()) if shared else self.local_rank
            return f"cuda:{place}"
        return name

    def on_leader(self, work: Callable[[], T]) -> T:
        """The result of `work`, done by the leader, on every process; its error too, as one line."""
        outcome: tuple[T | None, str | None] = (None, None)
        failed: HalfstepError | None = None
        if self.leads:
            try:
                outcome = (work(), None)
            except HalfstepError as error:
                failed, outcome = error, (None, str(error))
        if self.size > 1:
            import torch.distributed as dist

            box = [outcome]
            dist.broadcast_object_list(box, src=0)
            outcome = box[0]
        if failed is not None:
            raise failed
        if outcome[1] is not None:
            raise HalfstepError(f"stopped with process 0: {outcome[1]}")
        return outcome[0]  # type: ignore[return-value]

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Every process's result of `work`, in the order of ranks, on every process. When one fails, all do."""
        result: T | None = None
        failed: HalfstepError | None = None
        try:
            result = work()
        except HalfstepError as error:
            failed = error
        mine = (result, None if failed is None else str(failed))
        every: list[tuple[T | None, str | None] | None] = [mine]
        if self.size > 1:
            import torch.distributed as dist

            every = [None] * self.size
            dist.all_gather_object(every, mine)
        if failed is not None:
            raise failed
        outcomes = [outcome for outcome in every if outcome is not None]
        for rank, (_, line) in enumerate(outcomes):
            if line is not None:
                raise HalfstepError(f"stopped with process {rank}: {line}")
        return [value for value, _ in outcomes]  # type: ignore[misc]


def leave(code: int) -> NoReturn:
    """End this process, one of a team's, with `code`, after its exit handlers and without undoing the interpreter.

    A thread of gloo may still be about to drop the tensors of the last exchange; it needs the interpreter for that, and
    aborts the process when that is on its way out.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
