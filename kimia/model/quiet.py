"""Imports without what libraries then tell their own programmers: no user can do anything about it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# torchao looks for kernels of every kind of GPU; transformers imports it wherever it is installed.
LOGGERS = ("torchao", "torch.utils._pytree")


@contextmanager
def quiet() -> Iterator[None]:
    """Only errors of these libraries are logged meanwhile."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
