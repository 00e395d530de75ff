"""A service under load gives no wrong answer and loses no request, while its processes are killed."""

import pytest

from benchmarks.serve_killed import load
from tests.support.broker import Broker


@pytest.mark.timeout(600)
def test_no_answer_is_wrong_and_no_request_is_lost_while_both_workers_are_killed(private_broker: Broker) -> None:
    found = load(private_broker, 15, ("bank", "insurer"), clients=4)  # type: ignore[arg-type]
    private_broker.delete_vhost("load")
    assert found.killed == {"bank": 1, "insurer": 1}
    assert found.answered > 10 and found.retried > 0
    assert found.wrong == 0
    assert not found.lost
