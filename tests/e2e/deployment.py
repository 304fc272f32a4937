"""One deployment of deploy/compose.yaml under a project name of its own; it touches no other container."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import docker
import pytest
from docker.models.containers import Container

ROOT = Path(__file__).parents[2]
STAGES = ("tokenizer", "llm", "detokenizer")
SETUP = "KIMIA_DOCKER_SETUP"  # path of a script that brings up an engine with the base images
PORT = "50051/tcp"
# Turns that a stage's workers have begun and not ended: the turn's id, and whose it is.
HELD = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '{*}:turn:*')) do
  local head = redis.call('TYPE', key).ok == 'hash'
  local h = head and redis.call('HMGET', key, 'state', ARGV[1] .. ':consumer', ARGV[1] .. ':done')
  if h and h[1] == 'running' and h[2] and not h[3] then
    found[#found + 1] = string.match(key, ':turn:(.*)$') .. ' ' .. h[2]
  end
end
return found
"""
KEPT = ("KIMIA_TORCH", "KIMIA_TORCH_INDEX")  # settings of the builder's machine; all others have to be the defaults
SETTINGS = {
    "KIMIA_TAG": "e2e",
    "KIMIA_PUBLISH": "127.0.0.1:0",  # any free port, so that orchestrators can be replaced, and runs do not collide
    "KIMIA_THREADS": "1",
    "KIMIA_LOG_FORMAT": "text",
    "COMPOSE_FILE": str(ROOT / "deploy/compose.yaml"),
    "COMPOSE_ENV_FILES": "/dev/null",  # not the developer's deploy/.env
    "COMPOSE_PROGRESS": "plain",
}


def connect() -> docker.DockerClient:
    """The engine of this machine, brought up by the script of KIMIA_DOCKER_SETUP if need be; skips without either."""
    script = os.environ.get(SETUP)
    if not _answers() and not script:
        pytest.skip(f"no Docker engine answers, and {SETUP} names no script that starts one")
    if not _answers():
        subprocess.run(["bash", str(script)], env=os.environ | {"WITH_WHEELS": "1"}, check=True, timeout=1200)
    return docker.from_env()


def _answers() -> bool:
    """Whether an engine is there; asked through the command, since the library leaves a socket open when none is."""
    try:
        return subprocess.run(["docker", "version"], capture_output=True, timeout=60, check=False).returncode == 0
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Deployment:
    """A project of Docker Compose."""

    project: str
    engine: docker.DockerClient
    settings: Mapping[str, str] = field(default_factory=lambda: SETTINGS)

    @property
    def environment(self) -> dict[str, str]:
        """What `docker compose` and deploy/roll.sh are started with."""
        own = {k: v for k, v in os.environ.items() if k in KEPT or not k.startswith(("KIMIA_", "COMPOSE_"))}
        return own | dict(self.settings) | {"COMPOSE_PROJECT_NAME": self.project}

    def command(self, *command: str, timeout: float = 600) -> str:
        """Run a program against this project; its output. Raises AssertionError with the output when it fails."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout[-4000:]}"
        return done.stdout

    def compose(self, *arguments: str, timeout: float = 600) -> str:
        """Run `docker compose`."""
        return self.command("docker", "compose", *arguments, timeout=timeout)

    def with_settings(self, **settings: str) -> Deployment:
        """The same project as these environment variables change it."""
        return replace(self, settings={**self.settings, **settings})

    def roll(self, service: str) -> str:
        """Replace the containers of a service as docs/deployment.md says."""
        return self.command(str(ROOT / "deploy/roll.sh"), service)

    def scale(self, **replicas: int) -> None:
        """Set how many containers of each service named run, and wait until they are healthy."""
        counts = [f"--scale={service}={count}" for service, count in replicas.items()]
        self.compose("up", "--detach", "--wait", "--no-build", "--no-recreate", *counts)

    def containers(self, service: str | None = None, running: bool = False) -> list[Container]:
        """Containers of the project, or of one service."""
        labels = [f"com.docker.compose.project={self.project}"]
        if service:
            labels.append(f"com.docker.compose.service={service}")
        return self.engine.containers.list(all=not running, filters={"label": labels}, ignore_removed=True)

    def execute(self, service: str, *command: str, user: str = "") -> int:
        """Run a program in a container of a service; its exit code."""
        code: int = self.containers(service, running=True)[0].exec_run(command, user=user).exit_code
        return code

    def held(self, stage: str, container: Container) -> set[str]:
        """Ids of the turns that a container of a stage holds, as the journal says it."""
        [redis] = self.containers("redis", running=True)
        said = redis.exec_run(["redis-cli", "--raw", "EVAL", HELD, "0", stage])
        assert said.exit_code == 0, said.output
        pairs = [line.split() for line in said.output.decode().splitlines() if line]
        return {turn for turn, consumer in pairs if container.id[:12] in consumer}

    @contextmanager
    def cut_off(self, service: str, container: Container) -> Iterator[None]:
        """A container without the network that leads to the others; it runs on."""
        [network] = self.engine.networks.list(names=[f"{self.project}_inside"])
        network.disconnect(container)
        try:
            yield
        finally:
            network.connect(container, aliases=[service])

    def target(self) -> str:
        """Every orchestrator that runs, as one target of gRPC."""
        ports = [port for c in self.containers("orchestrator", running=True) for port in c.ports.get(PORT) or ()]
        return "ipv4:" + ",".join(f"{port['HostIp']}:{port['HostPort']}" for port in ports)

    def leftovers(self) -> list[str]:
        """Names of the project's containers, volumes and networks."""
        label = {"label": f"com.docker.compose.project={self.project}"}
        things = [
            *self.containers(),
            *self.engine.volumes.list(filters=label),
            *self.engine.networks.list(filters=label),
        ]
        return [thing.name for thing in things]


@contextmanager
def deployed(replicas: Mapping[str, int] = MappingProxyType({}), **settings: str) -> Iterator[Deployment]:
    """Build, start and wait; take everything down in the end. Replicas: of services of which not one runs."""
    engine = connect()
    deployment = Deployment(f"kimia-e2e-{secrets.token_hex(4)}", engine).with_settings(**settings)
    try:
        deployment.compose("build", timeout=1800)
        deployment.scale(**replicas)
        yield deployment
    finally:
        deployment.compose("down", "--volumes", "--timeout", "5")
        engine.close()
