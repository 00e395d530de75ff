"""A running worker as Prometheus and a health check see it: `/metrics` and `/health`, read when somebody asks.

Nothing is counted in here, and nothing is shown of rows, tensors or secrets.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from sl_queue.errors import JobError
from sl_queue.observe.http_server import Answer, HttpServer, Page
from sl_queue.protocol.measures import Connectivity, HandCounts, Measures
from sl_queue.protocol.scheduler.status import RunStatus

PULSE_S = 60.0  # a pulse beats several times a second; without one for so long a worker is not alive
UNHEALTHY = "503 Service Unavailable"
LOST_S = 30.0  # a connection that is lost is made again within that, unless something is wrong


@dataclass(frozen=True, slots=True)
class Training:
    """Position of a party in its training."""

    run: str | None
    generation: int
    step: int
    committed: int
    samples: int


@dataclass(frozen=True, slots=True)
class Vitals:
    """The signs of life of a worker."""

    pulse_age_s: float
    broker: Connectivity

    def complaint(self) -> str | None:
        """Say why the worker is not healthy; None if it is."""
        if self.pulse_age_s > PULSE_S:
            return f"its pulse has stopped for {self.pulse_age_s:.0f} s"
        if self.broker.lost_s == float("inf"):
            return "it has not reached its broker yet"
        if self.broker.lost_s > LOST_S:
            return f"it has had no connection to its broker for {self.broker.lost_s:.0f} s"
        return None


def serve(address: str, collector: Collector, vitals: Callable[[], Vitals]) -> HttpServer:
    """Answer at `[HOST:]PORT` (this machine only, unless a host is given), in a thread of its own."""

    def health(_: Mapping[str, str]) -> Answer:
        complaint = vitals().complaint()
        return Answer(b"healthy\n") if complaint is None else Answer(f"{complaint}\n".encode(), UNHEALTHY)

    return _serve(address, collector, health)


def _serve(address: str, collector: Collector, health: Page) -> HttpServer:
    host, _, port = address.rpartition(":")
    registry = CollectorRegistry()
    registry.register(collector)

    def metrics(headers: Mapping[str, str]) -> Answer:
        encode, content_type = choose_encoder(headers.get("accept", ""))
        return Answer(encode(registry), content_type=content_type)

    pages = {"/": metrics, "/metrics": metrics, "/health": health}
    try:
        return HttpServer(host.strip("[]") or "127.0.0.1", int(port), pages)
    except (ValueError, OSError, OverflowError) as error:
        raise JobError(f"--metrics-port {address}: {error}; give a free port, or HOST:PORT") from None


def serve_standby(address: str, job: str, party: str) -> HttpServer:
    """Answer as `serve` does, for a party's worker that waits for another one to be gone."""

    def health(_: Mapping[str, str]) -> Answer:
        return Answer(b"standby\n")

    return _serve(address, StandbyCollector(job, party), health)


class StandbyCollector(Collector):
    """A standby of a data party."""

    def __init__(self, job: str, party: str) -> None:
        self._about = {"job": job, "run": "", "role": party}

    def collect(self) -> Iterable[Metric]:
        """Collect all there is: it has neither a step nor a connection."""
        yield InfoMetricFamily("sl_queue_worker", "Who this is", value=self._about)
        yield GaugeMetricFamily("sl_queue_standby", "1 of a worker that waits for another one to be gone", value=1)


class PartyCollector(Collector):
    """A data party."""

    def __init__(
        self,
        job: str,
        party: str,
        measures: Callable[[], Measures],
        training: Callable[[], Training],
        hands: Callable[[], HandCounts] | None = None,
    ) -> None:
        self._job, self._party, self._measures, self._training = job, party, measures, training
        self._hands = hands

    def collect(self) -> Iterable[Metric]:
        """Collect everything there is, now."""
        yield from _of_training(self._job, self._party, self._training())
        yield from _of_channel(self._measures())
        if self._hands is not None:
            yield from _of_hands(self._hands())


class SchedulerCollector(Collector):
    """The scheduler: what it says to the operator, as numbers."""

    def __init__(self, status: Callable[[], RunStatus | None], vitals: Callable[[], Vitals]) -> None:
        self._status, self._vitals = status, vitals

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics as they are now; before the first status only signs of life."""
        yield from _of_vitals(self._vitals())
        status = self._status()
        if status is None:
            return
        about = {"job": status.job, "run": status.run or "", "phase": status.phase, "role": "scheduler"}
        yield InfoMetricFamily("sl_queue_worker", "Who this is", value=about)
        yield GaugeMetricFamily("sl_queue_generation", "Restarts from a common checkpoint", value=status.generation)
        yield GaugeMetricFamily("sl_queue_epochs_done", "Epochs in the history", value=status.epoch)
        silent = GaugeMetricFamily("sl_queue_silent_seconds", "Since the peer was last heard from", labels=["peer"])
        committed = GaugeMetricFamily("sl_queue_party_committed_step", "Newest step on disk", labels=["party"])
        for name, party in status.parties.items():
            if party.silent_s is not None and party.phase not in ("finished", "stopped"):
                silent.add_metric([name], party.silent_s)
            committed.add_metric([name], party.committed)
        yield from (silent, committed)


def _of_training(job: str, party: str, training: Training) -> Iterable[Metric]:
    about = {"job": job, "run": training.run or "", "role": party}
    yield InfoMetricFamily("sl_queue_worker", "Who this is", value=about)
    if training.run is not None:  # not a 0 of a worker that has not heard yet: it would look like a new generation
        yield GaugeMetricFamily("sl_queue_generation", "Restarts from a common checkpoint", value=training.generation)
    yield GaugeMetricFamily("sl_queue_step", "Newest step trained, from 0", value=training.step)
    yield GaugeMetricFamily("sl_queue_committed_step", "Newest step on disk, from 0", value=training.committed)
    yield CounterMetricFamily("sl_queue_samples", "Rows trained on by this process", value=training.samples)


def _of_hands(counts: HandCounts) -> Iterable[Metric]:
    yield GaugeMetricFamily("sl_queue_hands", "Hands that compute for this party now", value=counts.hands)
    yield GaugeMetricFamily("sl_queue_hands_waiting_tasks", "Micro-batches that no hand has yet", value=counts.waiting)
    yield GaugeMetricFamily("sl_queue_hands_lacking", "1 while the run waits for a hand to come", value=counts.lacks)
    yield CounterMetricFamily("sl_queue_hands_calls", "Calls that hands have done", value=counts.calls)
    yield CounterMetricFamily(
        "sl_queue_hands_repeated", "Micro-batches dealt again after a loss", value=counts.repeated
    )
    yield CounterMetricFamily("sl_queue_hands_busy_seconds", "Computed by all hands together", value=counts.busy_s)


def _of_channel(measures: Measures) -> Iterable[Metric]:
    waited = CounterMetricFamily("sl_queue_waiting_seconds", "Waited for", labels=["peer", "cause"])
    for (peer, cause), seconds in measures.waited_s.items():
        waited.add_metric([peer, cause], seconds)
    messages = CounterMetricFamily("sl_queue_messages", "Data messages received, by outcome", labels=["fate"])
    for fate, count in measures.messages.items():
        messages.add_metric([fate], count)
    silent = GaugeMetricFamily("sl_queue_silent_seconds", "Since the peer was last heard from", labels=["peer"])
    for peer, seconds in measures.silent_s.items():
        silent.add_metric([peer], seconds)
    yield from (waited, messages, silent)
    yield CounterMetricFamily("sl_queue_busy_seconds", "Not waiting for anybody", value=measures.busy_s)
    yield CounterMetricFamily("sl_queue_sent_bytes", "Published", value=measures.sent_bytes)
    yield CounterMetricFamily("sl_queue_received_bytes", "Delivered", value=measures.received_bytes)
    yield CounterMetricFamily("sl_queue_checkpoints", "Commits of this process", value=measures.commits)
    yield CounterMetricFamily("sl_queue_reconnects", "Connections lost and re-established", value=measures.reconnects)
    yield from _of_vitals(Vitals(measures.pulse_age_s, measures.broker))


def _of_vitals(vitals: Vitals) -> Iterable[Metric]:
    broker = vitals.broker
    yield GaugeMetricFamily(
        "sl_queue_pulse_age_seconds", "Since the worker's pulse last beat", value=vitals.pulse_age_s
    )
    yield GaugeMetricFamily("sl_queue_connected", "1 with a connection to the broker, else 0", value=broker.connected)
    ends = GaugeMetricFamily(
        "sl_queue_certificate_expiry_seconds",
        "Unix time at which a certificate expires, read when the connection was made",
        labels=["whose"],
    )
    for whose, at in broker.certificates.items():
        ends.add_metric([whose], at)
    yield ends
