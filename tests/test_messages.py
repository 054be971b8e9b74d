"""Messages go to one logger, from rank 0."""

import logging
from unittest import mock

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lightning_overlap.messages import log_on_rank_zero


@pytest.mark.parametrize(("rank", "messages"), [(0, ["the plan"]), (1, [])])
def test_rank_zero_logs(rank: int, messages: list[str]) -> None:
    records: list[logging.LogRecord] = []
    handler = mock.Mock(level=logging.INFO, handle=records.append)
    logger = logging.getLogger("lightning_overlap")
    logger.addHandler(handler)
    try:
        with mock.patch.object(rank_zero_only, "rank", rank):
            log_on_rank_zero("the plan")
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == messages
