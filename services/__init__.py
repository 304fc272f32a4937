"""The three GPU stages, each a process of its own."""
