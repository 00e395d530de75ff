"""A screen leaves the log as it was."""

import logging

import pytest

from sl_queue.observe.console import Screen


@pytest.mark.parametrize("before", [logging.NOTSET, logging.ERROR])
def test_the_level_of_the_log_is_that_of_before_once_a_screen_has_closed(before: int) -> None:
    log = logging.getLogger("sl_queue")
    kept = log.level
    log.setLevel(before)
    try:
        with Screen(logging.DEBUG):
            assert log.level == logging.DEBUG
        assert log.level == before
    finally:
        log.setLevel(kept)
