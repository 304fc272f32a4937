"""Tests of the training room: trainers on synthetic tones, the voices only where they are installed."""
