"""A peer with a valid key that sends thousands of messages of any kind changes no weight and costs next to nothing."""

import threading

import pytest

from sl_queue.protocol.messages import SCHEDULER, Kind, MicroBatch, Payload
from sl_queue.protocol.party.bounds import Bounds
from sl_queue.transport.scheduler_channel import PREFETCH
from tests.support.fuzzing_peer import Fuzzer
from tests.support.toy import ToyStage
from tests.support.toy_run import ToyRun
from tests.support.waiting import await_that
from tests.system.test_sealed_run import seal_of

MESSAGES = 5000


@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "sealed"])
def test_a_fuzzing_peer_changes_no_weight_fills_no_queue_and_writes_few_lines(
    sealed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = ToyRun(epochs=3).run()
    run = ToyRun(epochs=3, **({"seal_of": seal_of} if sealed else {}))  # type: ignore[arg-type]
    last_step, published, most = run.pipeline.batches.steps - 1, [0], {"label": 0, SCHEDULER: 0}

    class Attacked(ToyStage):
        """A stage that is no faster than the fuzzer."""

        def forward(self, micro_batch: MicroBatch) -> Payload:
            share = MESSAGES * micro_batch.step // last_step
            await_that(lambda: published[0] >= share if micro_batch.step < last_step else not fuzzer.is_alive())
            return ToyStage.forward(self, micro_batch)

    def fuzz() -> None:
        await_that(lambda: run.ledger.state is not None and run.ledger.state.run is not None)
        assert run.ledger.state is not None
        seal = seal_of("a") if sealed else None
        peer = Fuzzer("a", "label", run.ledger.state.run or "", last_step + 1, (8,), seed=7)
        for receiver, body in peer.messages(MESSAGES):
            opaque = body if seal is None else seal.seal(receiver, body)
            run.broker.publish(receiver, "a", opaque, persistent=False, expires=False)
            published[0] += 1
            most[receiver] = max(most[receiver], len(run.broker.queue(receiver, "a").unacknowledged))

    run.stage = Attacked
    fuzzer = threading.Thread(target=fuzz)
    fuzzer.start()
    try:
        run.run()
    finally:
        fuzzer.join()
    assert run.weights() == quiet.weights()
    assert run.state is not None and run.state.generation == 0
    assert len(caplog.records) < 100
    assert len(run.broker.dead_letters) < 100
    assert run.counts["label"]["rejected"] > MESSAGES // 10
    assert most["label"] <= Bounds(run.pipeline, frozenset(Kind)).prefetch
    assert most[SCHEDULER] <= PREFETCH
