"""The pure room: no torch and no broker, so that these tests run in seconds on any machine."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOM = Path(__file__).parent
BROKERS = {"broker_url", "private_broker"}
ALONE = pytest.StashKey[bool]()  # only tests of this room were collected


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse a test of this room that asks for a broker, and torch where nothing but this room can have brought it."""
    here = [item for item in session.items if item.path.is_relative_to(ROOM)]
    for item in here:
        if BROKERS & set(getattr(item, "fixturenames", ())):
            raise pytest.UsageError(f"{item.nodeid} asks for a broker: it belongs into tests/broker")
    session.stash[ALONE] = len(here) == len(session.items)
    if session.stash[ALONE] and "torch" in sys.modules:
        raise pytest.UsageError("a file of tests/pure imports torch: its tests belong into tests/compute")


@pytest.fixture(autouse=True)
def without_torch(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that imports torch, where nothing else in this session does."""
    yield
    if request.session.stash[ALONE] and "torch" in sys.modules:
        pytest.fail("this test imports torch: it belongs into tests/compute")


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Have no garbage collected: a pass over all that other tests have loaded takes longer than much that is timed."""
    gc.disable()
    yield
    gc.enable()
