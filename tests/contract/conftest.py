"""Fixtures of tests of channels."""

from collections.abc import Iterator

import pytest

from tests.support.post import Post


@pytest.fixture
def post() -> Iterator[Post]:
    post = Post()
    yield post
    for channel in post.channels:
        channel.close()
    assert post.failures == []
