"""The exception tree: what catches what, and what a message says."""

import pytest

from kimia import errors
from kimia.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    ConversationError,
    KimiaError,
    WeightsError,
)

pytestmark = pytest.mark.unit


def test_every_error_is_exported_and_a_kimia_error():
    defined = {name for name, item in vars(errors).items() if isinstance(item, type) and issubclass(item, Exception)}
    assert defined == set(errors.__all__)
    assert all(issubclass(getattr(errors, name), KimiaError) for name in defined)


@pytest.mark.parametrize("kind", [ConfigError, WeightsError])
def test_kinds_of_checkpoint_errors(kind):
    assert issubclass(kind, CheckpointError)


def test_conversation_error_names_the_message():
    error = ConversationError("an audio message needs audio", 2)
    assert (error.index, error.rule) == (2, "an audio message needs audio")
    assert str(error) == "message 2: an audio message needs audio"


def test_conversation_error_of_the_whole():
    error = ContextLengthError("the prompt is too long")
    assert error.index is None
    assert str(error) == "the prompt is too long"
    assert issubclass(ContextLengthError, ConversationError)
