"""The co-located host: tokenizer, llm and detokenizer in one process, for a machine with one GPU.

Each stage is what it is in a process of its own: a worker with its own consumer name, rows, leases and place in the
ledger, and its own gRPC service. So hosts and single stages may serve the same journal, and the turns of a host that
dies are taken over stage by stage, by whoever is there. They share

* the process: one event loop, one address, one health, one start and one end. A stage that does not start, or whose
  worker fails, ends the host, by its name;
* the device. Every compute thread has a stream of its own (`kimia.compute.own_stream`): the language model's is the
  most urgent, so that the kernels of a step go before those of a flow solve that wait. Kernels that run are not
  stopped. Processes that share a GPU take turns in slices of time instead (without MPS), and priorities do not count
  between them. On a CPU there are no streams: the threads share the cores as processes do;
* memory: one CUDA context and one allocator. What the stages may take together is compared with what is free before
  a weight is read (`kimia.model.capacity.check_host`);
* the interpreter. Threads compute without its lock, but take turns for the Python between two operations.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial

import grpc.aio
import torch

from kimia.compute import open_model
from kimia.errors import KimiaError, UnavailableError
from kimia.model.capacity import check_host, host_bytes
from kimia.runtime.logs import bound_stage
from kimia.runtime.service import Service, StageService, in_thread
from kimia.runtime.settings import Settings
from kimia.stage import DETOKENIZER, LLM, TOKENIZER, Stage, StageKind
from kimia.streams.patience import end
from services.detokenizer.stage import DetokenizerStage
from services.llm.stage import LanguageModelStage
from services.tokenizer.stage import TokenizerStage

NAME = "colocated"
STAGES: Mapping[StageKind, Callable[[Settings], Stage]] = {
    TOKENIZER: partial(TokenizerStage.load, shared=True),
    LLM: partial(LanguageModelStage.load, shared=True),
    DETOKENIZER: partial(DetokenizerStage.load, shared=True),
}


class Host:
    """The services of several stages as one."""

    name = NAME

    def __init__(self, parts: Sequence[StageService], check: Callable[[], None] = lambda: None) -> None:
        """`check` is done before anything is loaded; it raises KimiaError where the parts cannot be together."""
        self._parts = parts
        self._check = check

    @classmethod
    def of(cls, settings: Settings) -> Host:
        """The three stages of a checkpoint."""
        parts = [StageService(build, kind, settings_of(kind, settings)) for kind, build in STAGES.items()]
        return cls(parts, partial(check_memory, settings))

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """The services of all stages."""
        return [name for part in self._parts for name in part.register(server)]

    async def start(self) -> None:
        """Load one stage after the other. Raises UnavailableError that names the one that cannot start."""
        await in_thread(self._check)
        for part in self._parts:
            await _named(part, part.start())

    async def run(self) -> None:
        """Work until all are drained. Raises UnavailableError that names the first that fails."""
        working = [asyncio.create_task(_named(part, part.run())) for part in self._parts]
        try:
            done, _ = await asyncio.wait(working, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            await end(working)

    async def watch(self, tell: Callable[[bool], None]) -> None:
        """Of the servers that compute for stages: all must answer."""
        answers = {part.name: True for part in self._parts}

        def told(name: str, answering: bool) -> None:
            answers[name] = answering
            tell(all(answers.values()))

        await asyncio.gather(*(part.watch(partial(told, part.name)) for part in self._parts))

    async def drain(self, seconds: float) -> None:
        """All at once: what a stage still makes is claimed by those that stay."""
        await asyncio.gather(*(part.drain(seconds) for part in self._parts))

    async def aclose(self) -> None:
        """Give back what the stages have taken, also where one of them fails to."""
        async with AsyncExitStack() as stack:
            for part in self._parts:
                stack.push_async_callback(part.aclose)


async def _named(part: Service, work: Awaitable[None]) -> None:
    """The work of one stage, by its name in the log and in what goes wrong."""
    with bound_stage(part.name):
        try:
            await work
        except KimiaError as error:
            raise UnavailableError(f"{part.name}: {error}") from error


def settings_of(kind: StageKind, settings: Settings) -> Settings:
    """A stage's own settings: `KIMIA_LLM_ROWS` and the like in the place of `KIMIA_ROWS`."""
    own = {TOKENIZER: settings.tokenizer_rows, LLM: settings.llm_rows, DETOKENIZER: settings.detokenizer_rows}
    return settings.model_copy(update={"rows": own[kind] or settings.rows})


def check_memory(settings: Settings) -> None:
    """Raise ParameterError where the GPU has not the room that all stages may take together."""
    place = open_model(settings, detokenizer=True)
    if place.device.type != "cuda" or settings.engine:  # a host of encoders and vocoder has memory of its own
        return
    free, _ = torch.cuda.mem_get_info(place.device)
    rows = {kind.name: settings_of(kind, settings).rows for kind in STAGES}
    kept = settings.prefix_bytes if settings.prefix_bytes >= 0 else None
    check_host(host_bytes(place.configs, rows, kept, quantized=bool(settings.quantize)), free)
