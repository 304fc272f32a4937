"""Clients of one Redis server or of a cluster, however its URL finds it, and what their failures mean."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import redis.asyncio as redis
from redis.asyncio import cluster, sentinel
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.commands import AsyncCoreCommands
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    ClusterError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from kimia.errors import SettingsError, UnavailableError
from kimia.streams.addresses import Nodes, Sentinels, nodes, sentinels

CONNECTIONS = 64  # of one process at once, besides those that are blocked; more calls wait for one

_RETRY_AFTER = 1.0  # seconds
_ONCE = Retry(NoBackoff(), 0)
_DROPPED = Retry(ExponentialBackoff(cap=0.1, base=0.01), 3, (RedisConnectionError,))  # seconds: no outage, no silence
_SILENCE = 5.0  # seconds without an answer, also of a blocked read, after which a connection is given up
_CONNECT = 2.0  # seconds
_OPTIONS: dict[str, Any] = {"protocol": 2, "socket_connect_timeout": _CONNECT, "socket_timeout": _SILENCE}

# ---- what a failure means ---------------------------------------------------------------------------------------

# What to do, by the class of the error or by the first word of the server's answer.
_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (OutOfMemoryError, "its memory is full: try again when turns have ended, or raise its maxmemory"),
    (ReadOnlyError, "it is a replica and takes no writes: name its master, or its Sentinels"),
    (BusyLoadingError, "it is reading its data: it answers when that is done"),
    (ClusterDownError, "it has lost its master: it answers when there is one"),  # MASTERDOWN too
    (ClusterError, "its slots move: it answers when that is done"),
    (AskError, "its slots move: it answers when that is done"),  # MOVED too
    (TryAgainError, "its slots move: it answers when that is done"),
    (NoPermissionError, "its user may not do that: give it all commands and keys"),
    (InvalidResponse, "what answers there is no Redis: check its URL"),
    (RedisConnectionError, "check its URL, and that it runs"),
    (RedisTimeoutError, "check its URL, and that it runs"),
    (OSError, "check its URL, and that it runs"),
)
_WORDS = {
    "NOREPLICAS": "it has fewer replicas than its min-replicas-to-write asks for: start them",
    "MISCONF": "it cannot write to its disk: its log says why",
    "DB": "it has fewer databases than that: name another one in its URL",  # index is out of range
    "BUSY": "a script keeps it busy: it answers when that has ended",
    "UNBLOCKED": "its role has changed: it answers when that is done",
}


@contextmanager
def reached(what: str) -> Iterator[None]:
    """Turn failures of a server into UnavailableError; `what` names it, e.g. "journal". Wrong commands pass."""
    try:
        yield
    except (RedisError, OSError) as error:
        advice = _advice(error)
        if not advice:
            raise
        raise UnavailableError(
            f"the {what} cannot be reached or refuses ({error}); {advice}", retry_after=_RETRY_AFTER
        ) from error


def _advice(error: Exception) -> str:
    """What to do about a failure of the server; "" for an error that is not one."""
    found = (advice for kind, advice in _ADVICE if isinstance(error, kind))
    return next(found, _WORDS.get(str(error).partition(" ")[0], ""))


# ---- clients ----------------------------------------------------------------------------------------------------


def connected(url: str) -> redis.Redis:
    """A client that connects on first use; its callers share a bounded number of connections. Raises SettingsError.

    That of a cluster has the same commands, each to the node that has its key.
    """
    if of_cluster := nodes(url):
        return cast(redis.Redis, _cluster(of_cluster))
    named = sentinels(url)
    return redis.Redis.from_pool(_sentinel_pool(named) if named else _pool(url))


def blocking(client: redis.Redis) -> redis.Redis:
    """A client of the same server for one blocked read at a time.

    It does not repeat a read whose connection was lost: the reader must hear of it, since it may have missed
    something.
    """
    ours: Any = client
    if isinstance(ours, _Cluster):
        return cast(redis.Redis, _Blocked(ours))  # type: ignore[abstract]
    pool: Any = client.connection_pool
    options = {**pool.connection_kwargs, "connection_class": pool.connection_class, "retry": _ONCE}
    if isinstance(pool, sentinel.SentinelConnectionPool):
        del options["connection_pool"]  # the old one, which puts itself there
        kind: Any = sentinel.SentinelConnectionPool
        return redis.Redis.from_pool(kind(pool.service_name, pool.sentinel_manager, **options))
    return redis.Redis.from_pool(redis.ConnectionPool(**options))


async def history_of(client: redis.Redis) -> str:
    """Names the line of writes that a server's data come from; of a cluster, those of all its primaries."""
    ours: Any = client
    if isinstance(ours, _Cluster | _Blocked):
        return ",".join(sorted(await ours.histories()))
    return str((await ours.info("replication"))["master_replid"])


def _pool(url: str) -> Any:
    try:
        pool = _Pool.from_url(url, **_OPTIONS, retry=_DROPPED)
    except ValueError as error:
        raise SettingsError(f"this is no Redis URL ({error}); use redis://host:port/db") from error
    pool.connection_class = type("_Connection", (_LeavesReplicas, pool.connection_class), {})
    return pool


def _sentinel_pool(named: Sentinels) -> Any:
    asked = sentinel.Sentinel(
        named.addresses,
        sentinel_kwargs={"socket_connect_timeout": _CONNECT, "socket_timeout": _CONNECT, "retry": _ONCE},
    )  # type: ignore[no-untyped-call]
    place = {"db": named.database, "username": named.username, "password": named.password}
    return _SentinelPool(named.service, asked, **place, **_OPTIONS, retry=_DROPPED)


class _LeavesReplicas:
    """A connection that is made anew after its server has said that it takes no writes: its name may lead to the new
    master by now. Connections of Sentinels do so by themselves.
    """

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """As it is."""
        try:
            return await super().read_response(*args, **options)  # type: ignore[misc]
        except ReadOnlyError:
            self.mark_for_reconnect()  # type: ignore[attr-defined]
            raise


class _Bounded:
    """Connections that callers wait for when all are in use, where redis-py would refuse them.

    Its BlockingConnectionPool does that too, but loses a connection for good when a caller is cancelled while it gives
    one back.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        options["max_connections"] = 10 * CONNECTIONS
        super().__init__(*args, **options)
        self._free = asyncio.Semaphore(CONNECTIONS)
        self._given: set[Any] = set()

    async def get_connection(self, *_: Any, **__: Any) -> Any:
        """A connection, as soon as one is free."""
        await self._free.acquire()
        try:
            connection = await super().get_connection()  # type: ignore[misc]
        except BaseException:
            self._free.release()
            raise
        self._given.add(connection)
        return connection

    async def release(self, connection: Any) -> None:
        """Give a connection back; also one that could not be made, which is nobody's yet."""
        try:
            await super().release(connection)  # type: ignore[misc]
        finally:
            if connection in self._given:
                self._given.remove(connection)
                self._free.release()


class _Pool(_Bounded, redis.ConnectionPool):
    """Connections to one address."""


class _SentinelPool(_Bounded, sentinel.SentinelConnectionPool):
    """Connections to the master that Sentinels name. Who closes all of them closes those to the Sentinels too."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        """All connections, or the idle ones."""
        await super().disconnect(inuse_connections)
        if inuse_connections:
            await self.sentinel_manager.aclose()


# ---- a cluster --------------------------------------------------------------------------------------------------

_LOST = (RedisConnectionError, RedisTimeoutError, ClusterDownError, OSError)


def _cluster(named: Nodes) -> _Cluster:
    others = [cluster.ClusterNode(host, port) for host, port in named.others]
    try:
        return cast(_Cluster, _Cluster.from_url(named.first, startup_nodes=others))
    except (ValueError, TypeError, RedisClusterException) as error:
        raise SettingsError(f"this is no URL of a cluster ({error}); use redis+cluster://host:port") from error


class _Cluster(cluster.RedisCluster):
    """A client of a cluster with the manners of the others: so many commands at once, each repeated only where its
    connection was dropped. After a failure the next command asks anew which node has what; connections stay.
    """

    def __init__(self, **options: Any) -> None:
        ours = {"max_connections": 100 * CONNECTIONS, "retry": _ONCE, "reinitialize_steps": 0}
        super().__init__(**{**_OPTIONS, **options, **ours})
        self.commands_parser: Any = _Keys()
        self.rounds = asyncio.Semaphore(CONNECTIONS)  # pipelines; what they are sent on with are commands
        self._free = asyncio.Semaphore(CONNECTIONS)

    async def initialize(self, *args: Any, **options: Any) -> Any:
        """Ask which node has which slots, unless that is known. Raises SettingsError for a server alone."""
        try:
            return await super().initialize(*args, **options)
        except RedisClusterException as error:
            raise _unknown(error) from error

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """One command, where its key is; those without a key where redis-py says."""
        say = super().execute_command

        async def once() -> Any:
            await self.initialize()  # first: redis-py would choose a node by chance
            return await say(*args, **options)

        async with self._free:
            return await _DROPPED.call_with_retry(once, _again)

    def pipeline(self, *_: Any, **__: Any) -> Any:
        """Commands of one round trip to each node; a cluster has no transactions."""
        return _Pipeline(self)  # type: ignore[abstract]

    async def histories(self) -> list[str]:
        """Of all primaries."""
        found: Any = await self.info("replication", target_nodes=self.PRIMARIES)
        answers = [found] if "master_replid" in found else found.values()
        return [str(answer["master_replid"]) for answer in answers]

    def forget(self) -> None:
        """Who has which slots may have changed."""
        self._initialize = True

    async def aclose(self) -> None:
        """Close all connections, also those that a failure has left."""
        self._initialize = False
        await super().aclose()


class _Keys:
    """Where the key stands in a command: redis-py's own parser asks a server for it."""

    async def initialize(self, node: Any = None) -> None:
        """There is nothing to ask for."""

    async def get_keys(self, *args: Any) -> Any:
        """The key of a command that is no script."""
        at = args.index(b"STREAMS") + 1 if args[0] == "XREAD" else 1
        return args[at : at + 1]


class _Pipeline(cluster.ClusterPipeline):
    """Commands of one round trip to each node, in order for each key; where one fails, others may have done theirs."""

    async def execute(self, raise_on_error: bool = True, allow_redirections: bool = True) -> list[Any]:
        """The answers."""
        client: Any = self.cluster_client
        async with client.rounds:
            try:
                answers = await super().execute(raise_on_error, allow_redirections)
            except _LOST:
                client.forget()
                raise
        if any(isinstance(answer, _LOST) for answer in answers):
            client.forget()
        return answers


class _Blocked(AsyncCoreCommands):
    """Blocked reads through a client of a cluster, beside its other commands. Closing it closes nothing.

    A read is not sent on to the node that has the slot now: the reader must hear of the change, since the new one may
    lack something.
    """

    def __init__(self, client: _Cluster) -> None:
        self.histories = client.histories
        self._client = client

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """One command with a key."""
        try:
            await self._client.initialize()
            [key] = await self._client.commands_parser.get_keys(*args)
            node: Any = self._client.get_node_from_key(key)
            return await node.execute_command(*args, **options)
        except (RedisError, OSError):
            self._client.forget()
            raise

    async def aclose(self) -> None:
        """The client that it belongs to is closed by itself."""


def _unknown(error: RedisClusterException) -> Exception:
    """Why it is not known which node has which slots."""
    refusal = error.__cause__ and error.__cause__.__context__
    if "cluster support disabled" in str(refusal):
        return SettingsError("the server is no node of a cluster: use redis://host:port/db")
    return RedisConnectionError(str(error)) if error.__cause__ else ClusterDownError(str(error))


async def _again(_: Exception) -> None:
    """Nothing stands between two attempts but the pause."""
