"""The Redis Streams wire, on real servers."""
