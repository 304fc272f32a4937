"""Where a Redis server is, as one URL. Needs no Redis client: settings are checked by it.

    redis://[user:password@]host:port[/db], rediss://..., unix://path        one server
    redis+sentinel://[user:password@]host[:port][,host[:port]...]/service[/db]    the master that Sentinels name
    redis+cluster://[user:password@]host[:port][,host[:port]...], rediss+cluster://...    a cluster; some of its nodes

User and password are those of the servers; Sentinels are asked without.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from kimia.errors import SettingsError

DIRECT = ("redis", "rediss", "unix")
SENTINEL = "redis+sentinel"
CLUSTER = ("redis+cluster", "rediss+cluster")
SENTINEL_PORT, PORT = 26379, 6379
FORMS = (
    "redis://host:port/db, rediss://..., unix://path, redis+sentinel://host:port,host:port/service/db "
    "or redis+cluster://host:port,host:port"
)


@dataclass(frozen=True)
class Sentinels:
    """Who knows which server is the master of a service."""

    addresses: tuple[tuple[str, int], ...]  # host, port
    service: str
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Nodes:
    """Nodes of a cluster that know the others: one with all that its URL says, and further ones."""

    first: str = field(repr=False)  # redis:// or rediss://; may hold a password
    others: tuple[tuple[str, int], ...]  # host, port


def check_url(url: str) -> None:
    """Raise SettingsError for a URL that names no server; its text, which may hold a password, is not shown."""
    nodes(url) or sentinels(url)


def nodes(url: str) -> Nodes | None:
    """The nodes of a cluster's URL; None for another. Raises SettingsError."""
    parts = _split(url)
    if parts.scheme not in CLUSTER:
        return None
    credentials, at, hosts = parts.netloc.rpartition("@")
    first, *others = hosts.split(",")
    if not first:
        raise SettingsError("this is no URL of a cluster; use redis+cluster://host:port,host:port")
    if parts.path.strip("/") not in ("", "0"):
        raise SettingsError("a cluster has one database, 0: leave the database out of its URL")
    host, port = _address(first, PORT)
    place = f"{credentials}{at}{f'[{host}]' if ':' in host else host}:{port}"
    scheme = parts.scheme.removesuffix("+cluster")
    return Nodes(urlunsplit((scheme, place, "", parts.query, "")), tuple(_address(other, PORT) for other in others))


def sentinels(url: str) -> Sentinels | None:
    """The Sentinels of a URL; None for one that names a server itself. Raises SettingsError."""
    parts = _split(url)
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
        addresses=tuple(_address(host, SENTINEL_PORT) for host in hosts.split(",")),
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


def _address(text: str, default: int) -> tuple[str, int]:
    rule = "a Sentinel or a node of a cluster is named by host:port, several by commas between them"
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise SettingsError(rule) from error
    if not host:
        raise SettingsError(rule)
    return host, port or default
