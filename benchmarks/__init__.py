"""Measurements of the model, each with the command that repeats it."""
