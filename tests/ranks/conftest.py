"""What the tests of ranks share."""

import pytest

from tests.helpers.world import World


@pytest.fixture
def own_world():
    """Two ranks for a test after which they serve no other one. A rank that hears nothing waits until the timeout of its
    group, which is longer than the world's: the test then fails at the world's."""
    own = World(2)
    own.timeout = 30.0
    yield own
    own.close()
