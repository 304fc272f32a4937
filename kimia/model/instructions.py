"""Instructions that the release's own examples put before a recording; imports nothing, so that clients may use it."""

TRANSCRIBE = "Please transcribe the following audio:"
