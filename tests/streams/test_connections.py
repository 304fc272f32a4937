"""What failures of a server mean, and how its connections behave."""

import asyncio

import pytest
import redis
from redis.exceptions import NoScriptError, ResponseError

from kimia.errors import SettingsError, UnavailableError
from kimia.stage import LLM
from kimia.streams import connections
from kimia.streams.connections import blocking, connected, reached
from kimia.streams.jobs import Jobs
from kimia.streams.wire import Wire
from tests.client.proxy import Proxy

pytestmark = pytest.mark.unit


async def refused(store, *words):
    """What a server's answer becomes."""
    async with connected(store.url) as client:
        with pytest.raises(UnavailableError) as caught, reached("journal"):
            await client.execute_command(*words)
        return caught.value


async def test_every_refusal_of_a_server_says_what_to_do(stores):
    store = stores.new().start()
    store.say("CONFIG", "SET", "min-replicas-to-write", 1)
    assert "min-replicas-to-write" in (await refused(store, "SET", "a", 1)).rule
    assert "min-replicas-to-write" in (await refused(store, "EVAL", "redis.call('SET', KEYS[1], 1)", 1, "a")).rule
    store.say("CONFIG", "SET", "min-replicas-to-write", 0)
    store.say("CONFIG", "SET", "maxmemory", 1)
    assert "memory is full" in (await refused(store, "EVAL", "redis.call('SET', KEYS[1], 1)", 1, "a")).rule
    store.say("CONFIG", "SET", "maxmemory", 0)
    store.say("CONFIG", "SET", "replica-serve-stale-data", "no")
    store.say("REPLICAOF", "127.0.0.1", 1)
    assert "lost its master" in (await refused(store, "GET", "a")).rule
    store.say("CONFIG", "SET", "replica-serve-stale-data", "yes")
    error = await refused(store, "SET", "a", 1)
    assert "takes no writes" in error.rule
    assert error.retry_after


@pytest.mark.parametrize("answer", ["MISCONF Errors writing to the AOF file", "BUSY Redis is busy", "UNBLOCKED force"])
def test_words_that_redis_py_has_no_class_for(answer):
    with pytest.raises(UnavailableError, match=answer.split()[0]), reached("journal"):
        raise ResponseError(answer)


def test_failures_of_the_connection_are_wrapped_and_mistakes_are_not():
    with pytest.raises(UnavailableError, match="the journal cannot be reached"), reached("journal"):
        raise redis.ConnectionError("refused")
    with pytest.raises(NoScriptError), reached("journal"):
        raise NoScriptError("not a failure of the connection")


async def test_scripts_hide_nothing_of_what_the_server_refuses(stores):
    store = stores.new().start()
    wire = await Wire.connect(store.url)
    store.say("REPLICAOF", "127.0.0.1", 1)
    jobs = Jobs(wire, LLM, "w")
    for call in (jobs.prepare, lambda: jobs.sweep(1), lambda: jobs.recover(1)):
        with pytest.raises(UnavailableError, match="takes no writes"):
            await call()
    await wire.aclose()


async def test_a_name_that_leads_to_another_server_is_followed_when_the_old_one_takes_no_writes(stores):
    old, new = stores.new().start(), stores.new().start()
    async with Proxy(old.address) as line:
        client = connected(f"redis://{line.address}/0")
        await client.set("a", 1)
        line.target = new.address
        old.say("REPLICAOF", "127.0.0.1", new.port)
        with pytest.raises(redis.ReadOnlyError):
            await client.set("a", 2)
        await client.set("a", 3)
        assert new.say("GET", "a") == "3"
        await client.aclose()


@pytest.mark.parametrize("kind", ["client", "blocking"])
async def test_a_server_that_falls_silent_is_given_up(stores, monkeypatch, kind):
    monkeypatch.setitem(connections._OPTIONS, "socket_timeout", 0.2)
    store = stores.new().start()
    shared = connected(store.url)
    client = blocking(shared) if kind == "blocking" else shared
    await client.ping()
    store.pause()
    async with asyncio.timeout(10):
        with pytest.raises(UnavailableError), reached("journal"):
            await client.xread({"nothing": "0"}, block=60_000)
    store.go_on()
    assert await client.ping()
    for one in (client, shared):
        await one.aclose()


async def test_an_address_of_something_else_says_so(stores):
    """A database that the server lacks, a user without rights, a server that speaks HTTP."""
    store = stores.new().start()
    with pytest.raises(UnavailableError, match="fewer databases"):
        await Wire.connect(f"redis://{store.address}/99")
    store.say("ACL", "SETUSER", "guest", "on", ">word", "+@connection")
    with pytest.raises(UnavailableError, match="may not do that"):
        await Wire.connect(f"redis://guest:word@{store.address}/0")

    async def answer(reader, writer):
        while await reader.read(4096):
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(UnavailableError, match="is no Redis"):
            await Wire.connect(f"redis://127.0.0.1:{port}/0")


async def test_a_wrong_url_is_a_wrong_setting():
    with pytest.raises(SettingsError, match="URL"):
        await Wire.connect("redis://host:port/0")
