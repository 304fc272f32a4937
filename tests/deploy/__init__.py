"""The files under deploy/ and the Dockerfiles, as text; tests/e2e runs them."""
