"""The law of a channel's counters: time is attributed once, and nothing that Prometheus counts ever falls."""

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import CounterMetricFamily

from sl_queue.observe.meter import Meter
from sl_queue.observe.prometheus import PartyCollector, Training
from sl_queue.protocol.events import Committed
from sl_queue.protocol.measures import IN_PROCESS, Measures
from sl_queue.transport.waiting import waiting as transport_waiting

SOURCES = ("insurer", "disk", "broker")

Steps = st.lists(
    st.tuples(st.sampled_from(["enter", "leave", "read"]), st.sampled_from(SOURCES), st.integers(0, 10**15)),
    max_size=60,
)


class Clock:  # mutable: tests move it
    def __init__(self) -> None:
        self.now = 123_456_789_012_345

    def __call__(self) -> int:
        return self.now


def read(meter: Meter) -> Measures:
    return meter.read({}, {}, 0.0, IN_PROCESS)


def waiting(meter: Meter, source: str, cause: str) -> AbstractContextManager[None]:
    return transport_waiting(meter, "bank", source, cause)


def counters(meter: Meter) -> dict[tuple[str, ...], float]:
    """Every counter that Prometheus gets, by name and labels."""
    collector = PartyCollector("job", "bank", lambda: read(meter), lambda: Training(None, 0, -1, -1, 0))
    families = [family for family in collector.collect() if isinstance(family, CounterMetricFamily)]
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
        if sample.name.endswith("_total")
    }


def assert_grew(before: dict[tuple[str, ...], float], after: dict[tuple[str, ...], float]) -> None:
    assert {name: (value, after.get(name)) for name, value in before.items() if after.get(name, -1.0) < value} == {}


@given(Steps)
def test_waiting_and_busy_add_up_to_the_age_at_every_reading_and_never_fall(steps: list[tuple[str, str, int]]) -> None:
    clock = Clock()
    meter, waits = Meter(clock), list[ExitStack]()
    before = counters(meter)
    for what, source, passed_ns in steps:
        clock.now += passed_ns
        if what == "enter":
            waits.append(ExitStack())
            waits[-1].enter_context(waiting(meter, source, "cause"))
        elif what == "leave" and waits:
            waits.pop().close()
        now = counters(meter)
        assert_grew(before, now)
        before, measures = now, read(meter)
        total_s = measures.busy_s + sum(measures.waited_s.values())
        assert abs(total_s - measures.age_s) <= 1e-9 * max(1.0, measures.age_s)


def test_a_wait_within_a_wait_is_counted_once_and_the_outer_one_goes_on() -> None:
    clock = Clock()
    meter = Meter(clock)
    with waiting(meter, "insurer", "gradient"):
        clock.now += 5 * 10**9
        with waiting(meter, "disk", "commit"):
            clock.now += 2 * 10**9
        clock.now += 4 * 10**9
        during = read(meter)
    clock.now += 10**9
    for measures in (during, read(meter)):
        assert measures.waited_s == {("insurer", "gradient"): 9.0, ("disk", "commit"): 2.0}
    assert (during.busy_s, read(meter).busy_s) == (0.0, 1.0)


def test_a_reader_in_another_thread_sees_no_counter_fall() -> None:
    meter, done, fell = Meter(), threading.Event(), list[str]()

    def watch() -> None:
        before = counters(meter)
        while not done.is_set():
            now = counters(meter)
            fell.extend(str(name) for name, value in before.items() if now.get(name, -1.0) < value)
            before = now

    watcher = threading.Thread(target=watch)
    with switching_often():
        watcher.start()
        for _ in range(2_000):
            with waiting(meter, "insurer", "gradient"), waiting(meter, "disk", "commit"):
                meter(Committed("bank", 0, 1, 0.1))
        done.set()
        watcher.join()
    assert fell == []


@contextmanager
def switching_often() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
