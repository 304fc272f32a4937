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

Foreign exceptions are wrapped once, where they arise, with `raise ... from error`.
"""

from __future__ import annotations

__all__ = [
    "AudioError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "ConversationError",
    "GoldenSetError",
    "KimiaError",
    "NumericsError",
    "ParameterError",
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
    """An audio input is empty, too long, not finite or not decodable."""


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
