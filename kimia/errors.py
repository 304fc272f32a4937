"""Every error that kimia raises on purpose; the message is a sentence that tells the user what to do.

KimiaError
  CheckpointError          the model folder cannot be used
    ConfigError            a config file lacks, mistypes or contradicts a field
    WeightsError           tensors are missing, unknown or of another shape
  AudioError               an audio input cannot be used
  ConversationError        a conversation breaks a rule; carries the index of the message
    ContextLengthError     the prompt does not fit the model's positions or the budget
  ParameterError           an option or sampling parameter lies outside its domain
  NumericsError            a network produced NaN or infinity
  GoldenSetError           a golden set cannot be read
  SettingsError            an environment variable or option of a process is wrong
  ServiceError             a request to the running service failed; carries a stable reason
    RequestError           a request breaks the contract; names the field
    StateError             not possible now: wrong order, turn or session in another state
    NotFoundError          no such session or turn, or it has expired or been deleted
    CapacityError          no row is free; says when to try again
    DeadlineError          the turn's deadline has passed
    TurnCancelledError     the turn was cancelled
    UnsupportedError       in the contract but not offered by this version
    UnavailableError       a part of the service cannot be reached
    InternalError          a stage failed, or gave up after repeated attempts

Foreign exceptions are wrapped once, where they arise, with `raise ... from error`.
"""

from __future__ import annotations

__all__ = [
    "AudioError",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "ConversationError",
    "DeadlineError",
    "GoldenSetError",
    "InternalError",
    "KimiaError",
    "NotFoundError",
    "NumericsError",
    "ParameterError",
    "RequestError",
    "ServiceError",
    "SettingsError",
    "StateError",
    "TurnCancelledError",
    "UnavailableError",
    "UnsupportedError",
    "WeightsError",
]


class KimiaError(Exception):
    """Base of all errors raised on purpose. `str(error)` is meant for the user."""


class CheckpointError(KimiaError):
    """The model folder cannot be used: a file is missing, unreadable or unsafe."""


class ConfigError(CheckpointError):
    """A config file lacks, mistypes or contradicts a field."""


class WeightsError(CheckpointError):
    """Stored tensors do not match the module: lists the missing, unknown and mis-shaped keys."""


class AudioError(KimiaError):
    """An audio input is empty, too long, not finite or not decodable. `index` is that of its message, if it has one."""

    def __init__(self, rule: str, index: int | None = None) -> None:
        self.rule = rule
        self.index = index
        super().__init__(rule if index is None else f"message {index}: {rule}")


class ConversationError(KimiaError):
    """A conversation breaks a rule. `index` is the message's position, None for the conversation itself."""

    def __init__(self, rule: str, index: int | None = None) -> None:
        self.rule = rule
        self.index = index
        super().__init__(rule if index is None else f"message {index}: {rule}")


class ContextLengthError(ConversationError):
    """The prompt does not fit the model's positions or leaves no room for an answer."""


class ParameterError(KimiaError):
    """An option or sampling parameter lies outside its domain."""


class NumericsError(KimiaError):
    """A network produced NaN or infinity: broken weights, or a dtype too narrow for them."""


class GoldenSetError(KimiaError):
    """A golden set is missing, incomplete or unreadable."""


class SettingsError(KimiaError):
    """An environment variable or option of a process is missing or wrong."""


class ServiceError(KimiaError):
    """A request to the running service failed. `reason` is a stable name, `field` what is wrong in the request."""

    reason = "INTERNAL"

    def __init__(
        self, rule: str, *, reason: str | None = None, field: str = "", retry_after: float | None = None
    ) -> None:
        self.rule = rule
        self.reason = reason or type(self).reason
        self.field = field
        self.retry_after = retry_after  # seconds; None: trying again does not help
        super().__init__(f"{field}: {rule}" if field else rule)


class RequestError(ServiceError):
    """A request breaks the contract."""

    reason = "INVALID_REQUEST"


class StateError(ServiceError):
    """Not possible now: the order of messages, or the state of a turn or session, forbids it."""

    reason = "WRONG_STATE"


class NotFoundError(ServiceError):
    """No such session or turn; it may have expired or been deleted."""

    reason = "NOT_FOUND"


class CapacityError(ServiceError):
    """No row is free; `retry_after` says when to try again."""

    reason = "AT_CAPACITY"
    stage = ""  # that lacks a row, where it is one stage


class DeadlineError(ServiceError):
    """The deadline of the turn has passed."""

    reason = "DEADLINE_EXCEEDED"


class TurnCancelledError(ServiceError):
    """The turn was cancelled."""

    reason = "CANCELLED"


class UnsupportedError(ServiceError):
    """In the contract, but not offered by this version."""

    reason = "UNSUPPORTED"


class UnavailableError(ServiceError):
    """A part of the service cannot be reached."""

    reason = "UNAVAILABLE"


class InternalError(ServiceError):
    """A stage failed, or a turn was given up after repeated attempts."""

    reason = "INTERNAL"
