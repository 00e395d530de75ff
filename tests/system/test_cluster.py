"""Three nodes, and the one that does all the work is lost: the workers find another, and not one bit differs.

`pytest -s tests/system/test_cluster.py` prints how long the run stood still.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sl_queue.testing.private_broker import HOST, PrivateBroker, find_server
from tests.support.crew import ROLES, STEPS, WAIT_S, Crew, quiet_weights, with_heartbeat, write_job

pytestmark = [
    pytest.mark.skipif(find_server() is None, reason="needs a rabbitmq-server on this machine"),
]

HEARTBEAT_S, TICK_S = 2, 5  # when a worker and the other nodes notice that a node says nothing; by default 15 and 60


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[PrivateBroker, ...]]:
    with ExitStack() as running:
        settings = (f"net_ticktime = {TICK_S}",)
        first = running.enter_context(PrivateBroker(settings=settings))
        yield (first, *(running.enter_context(PrivateBroker(settings=settings, joins=first)) for _ in range(2)))


def url_of(nodes: tuple[PrivateBroker, ...], vhost: str) -> str:
    """One URL for all of them, the first to be tried first."""
    login, _, path = nodes[0].url(vhost).replace("amqp://", "").replace("@", "/").split("/")
    return f"amqp://{login}@{','.join(f'{HOST}:{node.port}' for node in nodes)}/{path}"


def leaders(node: PrivateBroker, vhost: str) -> str:
    """Return the leaders of the quorum queues, as Erlang prints them."""
    return node.evaluate(f'[amqqueue:get_pid(Q) || Q <- rabbit_amqqueue:list(<<"{vhost}">>)]')


def longest_pause_s(crew: Crew, until: int) -> float:
    """Between two steps of the label holder that follow each other, from now until that step is done."""
    longest, at, done = 0.0, time.monotonic(), max(crew.steps("insurer")[-1])
    while done < until:
        assert time.monotonic() - at < WAIT_S, crew.tail("insurer")
        time.sleep(0.005)
        newest, now = max(crew.steps("insurer")[-1]), time.monotonic()
        if newest > done:
            longest, at, done = max(longest, now - at), now, newest
    return longest


LOSSES: dict[str, Callable[[PrivateBroker], None]] = {"killed": PrivateBroker.kill, "silent": PrivateBroker.freeze}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_node_that_leads_all_queues_and_serves_all_workers_is_lost_and_no_bit_differs(
    tmp_path: Path, nodes: tuple[PrivateBroker, ...], unique: str, loss: str
) -> None:
    first, second, _ = nodes
    job = write_job(tmp_path, patience=10.0)
    job.write_text(job.read_text().replace('queues = "classic"', 'queues = "quorum"'))
    with Crew(tmp_path, with_heartbeat(url_of(nodes, unique), HEARTBEAT_S)) as crew:
        crew.start()
        crew.await_step("insurer", STEPS // 4)
        assert second.node not in leaders(first, unique) and first.node in leaders(first, unique)
        LOSSES[loss](first)
        pause_s = longest_pause_s(crew, STEPS - 1)
        crew.finish()
        assert crew.weights() == quiet_weights()
        assert crew.generation() == 0
        assert first.node not in leaders(second, unique)
        assert all("lost the broker" in crew.log(role) for role in ROLES)
    first.restart()
    print(f"\n{loss}: the run stood still for {pause_s:.1f} s")
