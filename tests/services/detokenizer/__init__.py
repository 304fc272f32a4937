"""Tests of the detokenizer stage."""
