"""The whole system in containers, driven from outside. Needs a Docker engine: `make e2e`."""
