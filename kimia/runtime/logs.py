"""Logs: one line per event, JSON or text, on stderr; what other libraries log goes the same way.

    configure(settings, "llm")
    log = get_logger()
    with bound_turn(turn.id):
        log.info("claimed", queued_seconds=0.012)

Events are short lower-case words and carry fields. Sound and text never get into a log: bytes are shown by their
length, messages of the contract by their name, and long strings are cut. Tracebacks carry no local variables.
"""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import structlog
from google.protobuf.message import Message
from structlog.types import EventDict, Processor

if TYPE_CHECKING:
    from kimia.runtime.settings import Settings

__all__ = ["bound_stage", "bound_turn", "configure", "get_logger"]

LONGEST_VALUE = 500  # characters of a field; tracebacks are whole
_FIELDS_KEPT = frozenset({"exception", "stack", "event"})


def get_logger(**fields: Any) -> structlog.stdlib.BoundLogger:
    """A logger whose lines carry these fields."""
    return cast("structlog.stdlib.BoundLogger", structlog.get_logger(**fields))


def bound_turn(turn_id: str, **fields: Any) -> AbstractContextManager[None]:
    """While it is open, every line of this task and of those it starts carries the turn's id and these fields."""
    return structlog.contextvars.bound_contextvars(turn=turn_id, **fields)


def bound_stage(name: str) -> AbstractContextManager[None]:
    """While it is open, lines of this task name the stage: where a process has several."""
    return structlog.contextvars.bound_contextvars(stage=name)


def configure(settings: Settings, service: str) -> None:
    """Set the whole process's logging up. `service` stands on every line."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _service_field(service),
    ]
    level = logging.getLevelName(settings.log_level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    target = logging.StreamHandler(sys.stderr)
    target.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=_last(settings)))
    root = logging.getLogger()
    root.handlers[:] = [target]
    root.setLevel(level)
    logging.captureWarnings(True)


def _last(settings: Settings) -> list[Processor]:
    """From the fields of an event to its line."""
    render: list[Processor] = [
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
    ]
    if settings.log_format == "json":
        render = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False, default=_named),
        ]
    return [structlog.stdlib.ProcessorFormatter.remove_processors_meta, _without_content, *render]


def _service_field(service: str) -> Processor:
    def add(_logger: Any, _method: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        return event

    return add


def _without_content(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Take out what may be somebody's words or voice."""
    for name, value in event.items():
        if name not in _FIELDS_KEPT:
            event[name] = _shown(value)
    return event


def _shown(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if isinstance(value, Message):
        return _named(value)
    if isinstance(value, str) and len(value) > LONGEST_VALUE:
        return f"{value[:LONGEST_VALUE]}... ({len(value)} characters)"
    if isinstance(value, list | tuple | set | frozenset):
        return [_shown(item) for item in value]
    if isinstance(value, dict):
        return {name: _shown(item) for name, item in value.items()}
    return value


def _named(value: Any) -> str:
    return f"<{type(value).__name__}>"
