"""How a run goes, for whoever watches: Prometheus."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from halfstep.errors import InputError

_COUNTERS = {
    "came": "Events that came, and messages that could not be read",
    "out": "Events on disk or with all consumers",
    "skipped": "Events that were there already",
    "refused": "Events and messages that could not be used",
    "dropped": "Events that made room for newer ones",
    "retried": "Events computed again in fp32",
    "peaks": "Peaks found",
}
_GAUGES = {
    "leased": "Events under way",
    "events_per_second": "Over the last ten seconds",
    "queue_bytes": "Bytes of events that wait to be computed",
    "latency_ms": "From receiving to the commit, median",
}


@contextmanager
def metrics_server(port: int, snapshot: Callable[[], Mapping[str, float]]) -> Iterator[None]:
    """Serve `snapshot` to Prometheus at 127.0.0.1:`port`/metrics within the block. Raises InputError when the port is
    taken."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(snapshot))
    try:
        server, thread = start_http_server(port, "127.0.0.1", registry)
    except OSError as error:
        taken = "is taken by another process" if error.errno == errno.EADDRINUSE else f"cannot be used ({error})"
        raise InputError(f"--metrics-port: {port} {taken}; name another one") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Snapshot(Collector):
    def __init__(self, snapshot: Callable[[], Mapping[str, float]]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Any]:
        values = self._snapshot()
        for name, told in _COUNTERS.items():
            yield CounterMetricFamily(f"halfstep_stream_{name}", told, value=values[name])
        for name, told in _GAUGES.items():
            yield GaugeMetricFamily(f"halfstep_stream_{name}", told, value=values[name])
