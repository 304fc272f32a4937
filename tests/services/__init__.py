"""Tests of the three model stages."""
