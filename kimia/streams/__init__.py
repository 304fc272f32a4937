"""The Redis Streams wire: sessions, turns, their logs and jobs. The format stands on one page, docs/protocol.md."""
