"""Tests in containers, for where a Docker engine answers that has the base images or can pull them.

Elsewhere they are not collected. In CI they run with SL_QUEUE_TEST_COMPOSE=1 only, and then a missing engine is a
failure; with 0 they never run. They need some minutes, more when the image must be built. It stays as sl_queue:test,
so that the next time is short; all else goes.
"""

import pytest

from tests.support.containers import Project, missing

collect_ignore_glob = [] if missing() is None else ["test_*.py"]


@pytest.fixture(scope="session")
def image() -> None:
    """Build the image of what lies here now."""
    with Project() as project:
        project.compose("build", "image")
