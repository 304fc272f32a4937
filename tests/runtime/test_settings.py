"""Settings: read from the environment, wrong ones named, the page in the documents true."""

import re
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings, SettingsConfigDict

from kimia.errors import SettingsError
from kimia.runtime.settings import Settings, read_settings

pytestmark = pytest.mark.unit

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    import os

    for name in [name for name in os.environ if name.startswith("KIMIA_")]:
        monkeypatch.delenv(name)


def test_defaults_need_no_environment():
    settings = read_settings()
    assert settings.redis_url == "redis://127.0.0.1:6379/0"
    assert settings.max_message_bytes == 8 * 1024 * 1024
    assert settings.host == "127.0.0.1"


def test_the_environment_is_read(monkeypatch):
    for name, value in {"ROWS": "7", "LISTEN": "[::1]:0", "REFLECTION": "true", "REDIS_URL": ""}.items():
        monkeypatch.setenv(f"KIMIA_{name}", value)
    settings = read_settings()
    assert (settings.rows, settings.listen, settings.host) == (7, "[::1]:0", "::1")
    assert settings.reflection
    assert settings.redis_url == ""


def test_every_mistake_is_named_in_one_line(monkeypatch):
    monkeypatch.setenv("KIMIA_ROWS", "0")
    monkeypatch.setenv("KIMIA_LOG_FORMAT", "xml")
    with pytest.raises(SettingsError) as caught:
        read_settings()
    text = str(caught.value)
    assert "KIMIA_ROWS: input should be greater than or equal to 1" in text
    assert "KIMIA_LOG_FORMAT: input should be 'json' or 'text'" in text
    assert "\n" not in text


@pytest.mark.parametrize("value", ["50051", "localhost", "localhost:port", "http://localhost:1"])
def test_wrong_addresses_are_refused(monkeypatch, value):
    monkeypatch.setenv("KIMIA_LISTEN", value)
    with pytest.raises(SettingsError, match="KIMIA_LISTEN"):
        read_settings()


@pytest.mark.parametrize("value", ["triton", "triton://host", "http://host:1", "triton://host:1/x"])
def test_wrong_engines_are_refused(monkeypatch, value):
    monkeypatch.setenv("KIMIA_ENGINE", value)
    with pytest.raises(SettingsError, match="KIMIA_ENGINE"):
        read_settings()


@pytest.mark.parametrize("name", ["KIMIA_REDIS_URL", "KIMIA_BLOB_URL"])
def test_wrong_urls_are_refused_without_showing_them(monkeypatch, name):
    monkeypatch.setenv(name, "http://user:swordfish@host")
    with pytest.raises(SettingsError, match=name) as caught:
        read_settings()
    assert "swordfish" not in str(caught.value)


def test_secrets_show_nowhere(monkeypatch):
    monkeypatch.setenv("KIMIA_REDIS_URL", "redis://user:swordfish@host/0")
    assert "swordfish" not in repr(read_settings())
    monkeypatch.setenv("KIMIA_PARTITIONS", "swordfish")
    with pytest.raises(SettingsError) as caught:
        read_settings()
    assert "swordfish" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "asked"),
    [({"TLS_CERTIFICATE": "a.pem"}, "KIMIA_TLS_KEY"), ({"TLS_CLIENT_CA": "ca.pem"}, "KIMIA_TLS_CERTIFICATE")],
)
def test_tls_settings_go_together(monkeypatch, given, asked):
    for name, value in given.items():
        monkeypatch.setenv(f"KIMIA_{name}", value)
    with pytest.raises(SettingsError, match=asked):
        read_settings()


def test_settings_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        read_settings().rows = 2


def test_other_settings_pages_are_read_the_same_way(monkeypatch):
    class Other(BaseSettings):
        model_config = SettingsConfigDict(env_prefix="KIMIA_FAKE_", frozen=True)
        delay: float = 0.0

    monkeypatch.setenv("KIMIA_FAKE_DELAY", "soon")
    with pytest.raises(SettingsError, match="KIMIA_FAKE_DELAY"):
        read_settings(Other)


def test_the_wire_gets_its_part():
    options = Settings(partitions=16, lease_seconds=3, blob_ttl_seconds=5, max_deliveries=4).wire_options()
    assert (options.partitions, options.lease, options.blob_ttl, options.max_deliveries) == (16, 3.0, 5.0, 4)


def shown(name):
    """Default as the page shows it."""
    default = Settings.model_fields[name].default
    return "empty" if default == "" else str(default).lower() if isinstance(default, bool) else f"{default}"


def test_the_page_lists_every_setting_with_default_and_meaning():
    rows = dict(re.findall(r"^\| `(KIMIA_[A-Z_]+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    wanted = {f"KIMIA_{name.upper()}": f"{shown(name)} | {f.description}" for name, f in Settings.model_fields.items()}
    assert rows == wanted
