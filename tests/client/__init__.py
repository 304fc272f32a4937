"""Tests of the SDK, against a service that follows a script."""
