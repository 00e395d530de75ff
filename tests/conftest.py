"""Fixtures of every test: a broker of its own."""

import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.broker import GIVEN, Broker, own_broker
from tests.support.containers import missing

ROOMS = Path(__file__).parent
SLOWEST_FIRST = ("containers", "gpu", "system", "broker", "compute", "contract", "repository", "pure")

# How long an example takes says more of the machine than of the code; each run of the suite draws others.
settings.register_profile("ours", deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=1000)  # pytest --hypothesis-profile=thorough
settings.load_profile("ours")


def pytest_report_header() -> str | None:
    """Say why there are no tests in containers here."""
    reason = missing()
    return None if reason is None else f"tests/containers: not here, {reason}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with the name of its folder; where files are shared out, those of the slowest folders come first.

    So the last to end is a short one, and no worker waits for another's long file.
    """
    items_here = [item for item in items if item.path.is_relative_to(ROOMS)]
    for item in items_here:
        item.add_marker(room_of(item))
    if items_here == items and hasattr(config, "workerinput"):
        items.sort(key=lambda item: SLOWEST_FIRST.index(room_of(item)))  # stable: files stay together


def room_of(item: pytest.Item) -> str:
    """Return the folder of tests/ that a test is in."""
    return item.path.relative_to(ROOMS).parts[0]


@pytest.fixture(scope="session")
def private_broker() -> Iterator[Broker]:
    """Yield a RabbitMQ that tests may kill and start again; it is running at the end of each test."""
    broker = own_broker()
    if broker is None and os.environ.get(GIVEN):
        pytest.skip(f"a broker that may be killed is needed, and {GIVEN} is not ours")
    if broker is None:
        pytest.fail("no RabbitMQ for the tests: tests/obtain_broker.sh says four ways to have one")
    with broker:
        yield broker


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    """Give what all tests of a process share back as it was: the environment, the working folder, levels of the log."""
    loggers = [logging.getLogger(name) for name in (None, "sl_queue", "pika")]
    levels, environ, folder = [each.level for each in loggers], dict(os.environ), Path.cwd()
    yield
    for each, level in zip(loggers, levels, strict=True):
        each.setLevel(level)
    for name in {*os.environ, *environ} - {"PYTEST_CURRENT_TEST"}:
        if name not in environ:
            del os.environ[name]
        elif os.environ.get(name) != environ[name]:
            os.environ[name] = environ[name]
    os.chdir(folder)


@pytest.fixture
def unique() -> str:
    """Return a name that no other test uses: a prefix of queue names, or the name of a job."""
    return f"t{secrets.token_hex(4)}"


@pytest.fixture
def broker_url(request: pytest.FixtureRequest, unique: str) -> Iterator[str]:
    """Yield a virtual host for this test alone; with SL_QUEUE_TEST_BROKER that broker's, with names of `unique`."""
    given = os.environ.get(GIVEN)
    if given:
        yield given
        return
    broker: Broker = request.getfixturevalue("private_broker")
    yield broker.url(unique)
    broker.delete_vhost(unique)
