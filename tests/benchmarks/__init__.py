"""Tests of the benchmarks: that they run and count what they say, on tiny loads."""
