"""Metrics: named with units, labelled without ids, served, and listed in the documents."""

import re
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.metrics import MetricWrapperBase

from kimia.errors import SettingsError
from kimia.runtime import metrics

pytestmark = pytest.mark.unit

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
ALL = {name: item for name, item in vars(metrics).items() if isinstance(item, MetricWrapperBase)}


def full_name(metric):
    return metric._name + ("_total" if metric._type == "counter" else "")


@pytest.mark.parametrize("name", ALL)
def test_metrics_are_named_explained_and_never_labelled_by_ids(name):
    metric = ALL[name]
    assert metric._name.startswith("kimia_")
    assert set(metric._labelnames) <= {"stage", "outcome"}
    assert len(metric._documentation) > 10
    if metric._type == "histogram":
        assert metric._name.endswith(("_seconds", "_factor"))
        assert metric._documentation.startswith(("Seconds", "Ratio"))


def test_the_page_lists_every_metric():
    rows = dict(re.findall(r"^\| `(kimia_[a-z_]+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert rows == {full_name(m): f"{', '.join(m._labelnames)} | {m._documentation}" for m in ALL.values()}


def test_metrics_are_served():
    server = metrics.start_metrics(0)
    metrics.CLAIMS.labels(stage="llm").inc()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
            text = answer.read().decode()
    finally:
        server.close()
    assert re.search(r'^kimia_claims_total\{stage="llm"\} [1-9]', text, re.MULTILINE)
    assert "_created" not in text


def test_a_port_in_use_is_said():
    first = metrics.start_metrics(0)
    try:
        with pytest.raises(SettingsError, match="KIMIA_METRICS_PORT"):
            metrics.start_metrics(first.port)
    finally:
        first.close()
