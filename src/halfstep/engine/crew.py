"""Who shares a run's work: this process, those that torchrun started, or actors on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from halfstep.engine.lanes import Lanes
from halfstep.engine.remote import cluster, remote_functions, require_ray
from halfstep.errors import HalfstepError
from halfstep.progress import SILENT, Progress
from halfstep.team import Team

T = TypeVar("T")
Worker = Callable[[Sequence[int], Progress], T]

_BLOCKS_PER_ACTOR = 8  # enough to even out the load, few enough that a block is worth a commit
_LARGEST_BLOCK = 1024


class Crew(Protocol):
    """`leads`: this process decides, prepares and tidies up. A worker is called with the numbers of some items."""

    @property
    def leads(self) -> bool: ...

    def device(self, name: str) -> str:
        """The device of this process, of `auto` and `cuda` the GPU of its own."""

    def on_leader(self, work: Callable[[], T]) -> T:
        """The result of `work`, done by the leader, on every process."""

    def together(self, work: Callable[[], T]) -> list[T]:
        """Every process's result of `work`, on every process."""

    def own(self, items: int) -> range:
        """The numbers of those items that this process sees to, itself or by its actors."""

    def share(self, items: int, worker: Worker[T], progress: Progress, done: Callable[[T], int]) -> list[T]:
        """What workers made of `items` items, on every process. `done` says of how many units of progress a result
        is, for workers that cannot tell of it themselves."""


class TeamCrew:
    """This process alone, or with those that torchrun started: each has its share, one worker at work on it."""

    def __init__(self, team: Team = Team()) -> None:  # noqa: B008 - a frozen value
        self._team = team

    @classmethod
    @contextmanager
    def join(cls) -> Iterator[TeamCrew]:
        with Team.join() as team:
            yield cls(team)

    @property
    def leads(self) -> bool:
        return self._team.leads

    def device(self, name: str) -> str:
        return self._team.device(name, shared=True)

    def on_leader(self, work: Callable[[], T]) -> T:
        return self._team.on_leader(work)

    def together(self, work: Callable[[], T]) -> list[T]:
        return self._team.gather(work)

    def own(self, items: int) -> range:
        return range(self._team.rank, items, self._team.size)

    def share(self, items: int, worker: Worker[T], progress: Progress, done: Callable[[T], int]) -> list[T]:
        return self._team.gather(lambda: worker(self.own(items), progress))


class RayCrew:
    """Actors on a Ray cluster (the one that RAY_ADDRESS names, or one started here), one worker each. This process
    leads, hands out blocks of items and keeps account of them: an actor that dies is started again, and its block given
    out again, a few times."""

    leads = True

    def __init__(self) -> None:
        require_ray()

    def device(self, name: str) -> str:
        return name

    def on_leader(self, work: Callable[[], T]) -> T:
        return work()

    def together(self, work: Callable[[], T]) -> list[T]:
        return [work()]

    def own(self, items: int) -> range:
        return range(items)

    def share(self, items: int, worker: Worker[T], progress: Progress, done: Callable[[T], int]) -> list[T]:
        with cluster() as resources:
            count = max(1, resources.gpus or resources.cpus)
            size = max(1, min(_LARGEST_BLOCK, items // (count * _BLOCKS_PER_ACTOR)))
            blocks = [range(start, min(start + size, items)) for start in range(0, items, size)]
            results: list[T] = []
            with (
                remote_functions(_Carried(worker), count, gpus=resources.gpus > 0) as functions,
                Lanes.open(functions, "actor") as lanes,
            ):
                for future in [lanes.submit(block) for block in blocks]:
                    outcome = future.result()
                    if isinstance(outcome, HalfstepError):
                        raise outcome
                    results.append(outcome)
                    progress.advance(done(outcome))
            return results


class _Carried(Generic[T]):
    """A worker whose errors arrive as values: raised, they would come wrapped in a traceback."""

    def __init__(self, worker: Worker[T]) -> None:
        self._worker = worker

    def __call__(self, block: Sequence[int]) -> T | HalfstepError:
        try:
            return self._worker(block, SILENT)
        except HalfstepError as error:
            return error
