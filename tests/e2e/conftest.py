"""One deployment for all end-to-end tests; a failed test shows the end of its logs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.deployment import Deployment, deployed


@pytest.fixture(scope="session")
def deployment() -> Iterator[Deployment]:
    """The default deployment, on the CPU with the tiny checkpoint."""
    with deployed() as running:
        yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add what the containers said to the report of a failed test."""
    report = yield
    running = getattr(item, "funcargs", {}).get("deployment")
    if report.failed and running is not None:
        report.sections.append(("docker compose logs", running.compose("logs", "--no-color", "--tail=60")))
    return report
