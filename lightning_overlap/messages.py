"""The package's messages: one logger, ``lightning_overlap``, whose level and handlers users set as they do Lightning's.

Warnings do not pass it. They stay Python warnings, which users filter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_only

LOGGER = logging.getLogger("lightning_overlap")
LOGGER.setLevel(logging.INFO)
if not logging.getLogger().hasHandlers():  # the program has not configured logging: show messages on stderr, as Lightning does
    LOGGER.addHandler(logging.StreamHandler())
    LOGGER.propagate = False


@rank_zero_only
def log_on_rank_zero(message: str) -> None:
    """Logs a message at level INFO, on rank 0 only."""
    LOGGER.info(message)


@contextmanager
def only_warnings() -> Iterator[None]:
    """Inside, this package and Lightning log nothing below warnings."""
    loggers = [LOGGER, logging.getLogger("lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
