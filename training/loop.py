"""The one loop that trains every stage.

A stage brings a module that holds all that is trained, and a function that gives the named losses of a step. The loop
brings the rest: optimiser, warm-up and cosine, clipping, averaged weights, resuming, progress, the curve as PNG.

Notes
- A step's data depend on the seed and the step's number alone, so a resumed run sees what an uninterrupted one sees.
- A loss that is not finite stops the run with the step's number; the state before that step is kept on disk.
- `seconds` ends a run early at a resumable state: hours of training as slices of minutes.
- The loop moves the module to the plan's device; a module moves its own batches. What is drawn is drawn on the CPU, so
  that a seed means the same everywhere, and a state that one device has kept is gone on from on any other.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from kimia.errors import CheckpointError, NumericsError
from kimia.model.writing import whole_file
from training.progress import bar

STATE, CURVE, HISTORY = "last.pt", "loss.png", "history.jsonl"
CPU = torch.device("cpu")
NOT_DRAWN = ("step", "seconds", "cpu_seconds", "rate")

Losses = Mapping[str, Tensor]  # scalars; their sum is minimised
LossOf = Callable[[int], Losses]  # of a step's number


@dataclass(frozen=True)
class Plan:
    """How long and how fast."""

    steps: int
    learning_rate: float
    warmup: int = 100  # steps
    floor: float = 0.05  # last learning rate, as a share of the highest
    clip: float = 1.0  # norm of the gradient
    average: float = 0.995  # decay of the averaged weights
    weight_decay: float = 0.01
    seconds: float = math.inf  # after which the run ends, resumable
    save_every: float = 60.0  # seconds
    report_every: int = 20  # steps
    device: torch.device = CPU


@dataclass
class Progress:
    """Where a run stands: all that resuming needs, besides what the module holds."""

    step: int = 0  # steps done
    seconds: float = 0.0  # spent in all runs
    cpu_seconds: float = 0.0  # of this process, in all runs
    history: list[dict[str, float]] = field(default_factory=list)


class Loop:
    """One training run in a folder of its own."""

    def __init__(self, name: str, module: nn.Module, losses: LossOf, plan: Plan, folder: Path) -> None:
        self.name, self.module, self.losses, self.plan, self.folder = name, module, losses, plan, folder
        module.to(plan.device)  # before the optimiser, which holds its parameters
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(
            trained, plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay
        )
        self.trained = trained
        self.averaged = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.progress = Progress()
        self._since: list[dict[str, float]] = []  # losses of the steps since the last report, of this run
        folder.mkdir(parents=True, exist_ok=True)

    # ---- running ----

    def run(self) -> Progress:
        """Train until the plan's steps are done or its seconds are over. Resumes. Raises NumericsError."""
        self.resume()
        began = saved = time.monotonic()
        spent = self.progress.seconds
        cpu_began, cpu_spent = time.process_time(), self.progress.cpu_seconds
        self.module.train()
        with bar(total=self.plan.steps, initial=self.progress.step, desc=self.name) as shown:
            while self.progress.step < self.plan.steps and time.monotonic() - began < self.plan.seconds:
                self._step()
                self.progress.seconds = spent + time.monotonic() - began
                self.progress.cpu_seconds = cpu_spent + time.process_time() - cpu_began
                self._report(shown)
                if time.monotonic() - saved > self.plan.save_every:
                    self.save()
                    saved = time.monotonic()
        self.save()
        self.draw()
        self.module.eval()
        return self.progress

    def _step(self) -> None:
        step = self.progress.step
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(step)
        self.optimiser.zero_grad(set_to_none=True)
        losses = self.losses(step)
        self._check(step, losses)
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
        norm = nn.utils.clip_grad_norm_(self.trained, self.plan.clip)
        self._check(step, {"gradient": norm})
        self.optimiser.step()
        self._average(min(self.plan.average, (step + 1) / (step + 10)))
        self.progress.step += 1
        self._since.append({key: float(value.detach()) for key, value in {**losses, "norm": norm}.items()})

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then cosine down to the floor."""
        if step < self.plan.warmup:
            return self.plan.learning_rate * (step + 1) / self.plan.warmup
        done = (step - self.plan.warmup) / max(1, self.plan.steps - self.plan.warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.plan.learning_rate * (self.plan.floor + (1 - self.plan.floor) * share)

    def _check(self, step: int, losses: Losses) -> None:
        for key, value in losses.items():
            if not torch.isfinite(value):
                self.save()
                raise NumericsError(
                    f"{self.name}: {key} is {float(value.detach())} at step {step}; what was done before is kept in "
                    f"{self.folder / STATE}: look at that step's data, or lower the learning rate, and run again"
                )

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        weights = {name for name, _ in self.module.named_parameters()}
        for name, value in self.module.state_dict().items():
            if name in weights:
                self.averaged[name].lerp_(value, 1 - decay)
            else:  # a buffer keeps its own average, where it has one
                self.averaged[name].copy_(value)

    # ---- reporting ----

    def _report(self, shown: tqdm[Any]) -> None:
        shown.update()
        if self.progress.step % self.plan.report_every:
            return
        keys = dict.fromkeys(key for one in self._since for key in one)  # not every step has every loss
        means = {key: statistics.fmean(one.get(key, 0.0) for one in self._since) for key in keys}
        self._since = []
        self.progress.history.append(
            {
                "step": self.progress.step,
                "seconds": round(self.progress.seconds, 1),
                "cpu_seconds": round(self.progress.cpu_seconds, 1),
                "rate": self.rate(self.progress.step - 1),
                **means,
            }
        )
        with open(self.folder / HISTORY, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.progress.history[-1]) + "\n")
        shown.set_postfix({key: f"{value:.3f}" for key, value in means.items()})

    def draw(self) -> None:
        """The losses so far as a picture; nothing where matplotlib is not installed, or nothing was reported."""
        if not self.progress.history:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(title=self.name, xlabel="step", yscale="log")
        for key in (key for key in self.progress.history[-1] if key not in NOT_DRAWN):
            rows = [(row["step"], row[key]) for row in self.progress.history if row.get(key, 0.0) > 0]
            axes.plot([step for step, _ in rows], [value for _, value in rows], label=key)
        axes.legend()
        with whole_file(self.folder / CURVE) as partial:
            figure.savefig(partial, format="png")

    # ---- keeping ----

    def save(self) -> None:
        """Keep the state of the last good step, whole or not at all."""
        state = {
            "module": self.module.state_dict(),
            "averaged": self.averaged,
            "optimiser": self.optimiser.state_dict(),
            "step": self.progress.step,
            "seconds": self.progress.seconds,
            "cpu_seconds": self.progress.cpu_seconds,
            "history": self.progress.history,
        }
        with whole_file(self.folder / STATE) as partial, open(partial, "wb") as file:
            torch.save(state, file)

    def resume(self) -> bool:
        """Go on from the folder's state, if there is one. Raises CheckpointError when it is of another module."""
        path = self.folder / STATE
        if not path.exists():
            return False
        # On the CPU whatever wrote it; what holds the state copies it to its own device
        state = torch.load(path, map_location="cpu", weights_only=True)
        try:
            self.module.load_state_dict(state["module"])
            self.optimiser.load_state_dict(state["optimiser"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: is of another model ({error}); delete it to begin anew") from error
        for name, value in state["averaged"].items():
            self.averaged[name].copy_(value)
        self.progress = Progress(state["step"], state["seconds"], state["cpu_seconds"], state["history"])
        return True


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights lie: all on one device."""
    return next(module.parameters()).device


def multiplies_bfloat16() -> bool:
    """Has the processor products of bfloat16? A step takes a third of the time with AMX, two thirds with AVX-512."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """bfloat16 products on CUDA and where the processor multiplies them itself, float32 elsewhere."""
    if device.type == "cuda":
        with torch.autocast("cuda", torch.bfloat16):
            yield
    elif device.type == "cpu" and multiplies_bfloat16():
        with torch.autocast("cpu", torch.bfloat16), _ExactAttention():
            yield
    else:
        yield


class _ExactAttention(TorchFunctionMode):
    """Attention in float32: its gradient in bfloat16 takes eight times as long on a processor as that in float32."""

    def __torch_function__(
        self, func: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            q, k, v, *rest = args
            return func(q.float(), k.float(), v.float(), *rest, **(kwargs or {}))


def averaged_weights(folder: Path, module: nn.Module) -> nn.Module:
    """Fill a module with the averaged weights of a run's folder, on the CPU. Raises CheckpointError."""
    path = folder / STATE
    if not path.exists():
        raise CheckpointError(f"{path}: no such run; train this stage first")
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["averaged"])
    return module.cpu().eval()
