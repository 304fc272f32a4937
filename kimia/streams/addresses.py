"""Where a Redis server is, as one URL. Needs no Redis client: settings are checked by it.

    redis://[user:password@]host:port[/db], rediss://..., unix://path        one server
    redis+sentinel://[user:password@]host[:port][,host[:port]...]/service[/db]    the master that Sentinels name

User and password are those of the server; Sentinels are asked without.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit

from kimia.errors import SettingsError

DIRECT = ("redis", "rediss", "unix")
SENTINEL = "redis+sentinel"
CLUSTER = ("redis+cluster", "rediss+cluster")
SENTINEL_PORT = 26379
FORMS = "redis://host:port/db, rediss://..., unix://path or redis+sentinel://host:port,host:port/service/db"


@dataclass(frozen=True)
class Sentinels:
    """Who knows which server is the master of a service."""

    addresses: tuple[tuple[str, int], ...]  # host, port
    service: str
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)


def check_url(url: str) -> None:
    """Raise SettingsError for a URL that names no server; its text, which may hold a password, is not shown."""
    sentinels(url)


def sentinels(url: str) -> Sentinels | None:
    """The Sentinels of a URL; None for one that names a server itself. Raises SettingsError."""
    parts = _split(url)
    if parts.scheme in CLUSTER:
        raise SettingsError(
            "Redis Cluster is not supported: use one server, or Sentinels (redis+sentinel://) that promote its replica"
        )
    if parts.scheme != SENTINEL:
        if parts.scheme not in DIRECT or not (parts.netloc or parts.path):
            raise SettingsError(f"this is no Redis URL; use {FORMS}")
        return None
    service, _, database = parts.path.strip("/").partition("/")
    credentials, at, hosts = parts.netloc.rpartition("@")
    if not service or not hosts or (database and not database.isdecimal()):
        raise SettingsError("this is no Sentinel URL; use redis+sentinel://host:port,host:port/service/db")
    username, _, password = credentials.partition(":")
    return Sentinels(
        addresses=tuple(_address(host) for host in hosts.split(",")),
        service=unquote(service),
        database=int(database or 0),
        username=unquote(username) or None,
        password=unquote(password) or None if at else None,
    )


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:  # brackets that do not match
        raise SettingsError(f"this is no Redis URL; use {FORMS}") from error


def _address(text: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise SettingsError("a Sentinel is named by host:port, several by commas between them") from error
    if not host:
        raise SettingsError("a Sentinel is named by host:port, several by commas between them")
    return host, port or SENTINEL_PORT
