"""What runs inside Triton: its Python backend's interface over the networks of `kimia.model`.

Triton makes one object per instance, calls `initialize` once and `execute` with the requests of one batch. The rows of
all requests are computed together; a row that cannot be computed fails its own request only.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from kimia.errors import AudioError, CheckpointError, KimiaError
from kimia.hosting import FINGERPRINT
from kimia.model.audio import Segment
from kimia.model.bigvgan import BigVGAN, load_vocoder
from kimia.model.checkpoint import Checkpoint, open_checkpoint
from kimia.model.config import EncoderConfig, LMConfig, exact_div
from kimia.model.encode import SEGMENTS_AT_ONCE
from kimia.model.vq import load_vq
from kimia.model.whisper import load_whisper
from kimia.triton_export import DATATYPES, Exported, exported_models

Row: TypeAlias = tuple[np.ndarray, ...]  # its tensors in the order of `HostedModel.takes`
Network: TypeAlias = Callable[[Sequence[Row]], Sequence[Tensor]]

DTYPES = {name: dtype for dtype, name in DATATYPES.items()}


class HostedNetwork(ABC):
    """One model of the repository."""

    index: int  # among `exported_models`

    @staticmethod
    @abstractmethod
    def load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Network:
        """The network as a function of rows."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the weights. Raises CheckpointError where they are not those of the export."""
        config = json.loads(args["model_config"])
        told = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        checkpoint = open_checkpoint(told["model"], told["vq_tokenizer"])
        exported = exported_models(checkpoint)[self.index]
        _check_weights(exported, told[FINGERPRINT], checkpoint)
        gpu = args["model_instance_kind"] == "GPU"
        device = torch.device(f"cuda:{args['model_instance_device_id']}" if gpu else "cpu")
        dtype = DTYPES.get(config["output"][0]["data_type"].removeprefix("TYPE_"), torch.float32)
        self._takes = [tensor.name for tensor in exported.hosted.takes]
        self._gives = exported.hosted.gives.name
        self._network = self.load(checkpoint, device, dtype)

    @torch.inference_mode()
    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request, in order."""
        import triton_python_backend_utils as pb

        batches = [self._rows(pb, request) for request in requests]
        rows = iter(computed(self._network, [row for batch in batches for row in batch]))
        return [self._response(pb, [next(rows) for _ in batch]) for batch in batches]

    def _rows(self, pb: Any, request: Any) -> list[Row]:
        """By way of torch: the backend of Triton 2.51 gives arrays of other numbers where numpy is version 2."""
        given = [pb.get_input_tensor_by_name(request, name) for name in self._takes]
        arrays = [from_dlpack(tensor.to_dlpack()).cpu().numpy() for tensor in given]
        return list(zip(*arrays, strict=True))

    def _response(self, pb: Any, rows: Sequence[Tensor | KimiaError]) -> Any:
        for row in rows:
            if isinstance(row, KimiaError):
                error = pb.TritonError(str(row), pb.TritonError.INVALID_ARG)
                return pb.InferenceResponse(output_tensors=[], error=error)
        stacked = torch.stack([row for row in rows if isinstance(row, Tensor)]).contiguous()
        return pb.InferenceResponse([pb.Tensor.from_dlpack(self._gives, stacked)])


class VQTokenizer(HostedNetwork):
    """WAVE and WHOLE to CODES, in float32 as in the release."""

    index = 0

    @staticmethod
    def load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Network:  # noqa: ARG004
        """Segments may share a batch: it is exact."""
        return partial(_by_segments, load_vq(checkpoint.vq_tokenizer, device).encode_segments, device)


class Whisper(HostedNetwork):
    """WAVE to FEATURES."""

    index = 1

    @staticmethod
    def load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Network:
        """As `kimia.model.encode.AudioEncoder` loads it."""
        width = LMConfig.read(checkpoint.root / "config.json").adaptor_input_dim
        one = EncoderConfig.read(checkpoint.whisper / "config.json").d_model
        whisper = load_whisper(checkpoint.whisper, exact_div(width, one, "features / frames"), device, dtype)
        return partial(_by_segments, whisper.encode_segments, device)


class Vocoder(HostedNetwork):
    """MEL to WAVE, in float32."""

    index = 2

    @staticmethod
    def load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Network:  # noqa: ARG004
        """Rows of a batch have equal lengths: Triton sees to it."""
        return Vocoding(load_vocoder(checkpoint.vocoder, device, torch.float32))


class Vocoding:
    """A vocoder as a function of rows (M, F)."""

    def __init__(self, vocoder: BigVGAN) -> None:
        self._vocoder = vocoder
        self._device = next(vocoder.parameters()).device

    def __call__(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """Together on a GPU. One by one on a CPU, where a batch gains nothing: whoever is beside it changes no bit."""
        mels = [torch.tensor(mel, device=self._device)[None] for (mel,) in rows]
        if self._device.type == "cuda":
            return list(self._vocoder(torch.cat(mels)))
        return [self._vocoder(mel)[0] for mel in mels]


def computed(network: Network, rows: Sequence[Row]) -> Sequence[Tensor | KimiaError]:
    """What the network gives for each row, or why it cannot."""
    try:
        return network(rows)
    except KimiaError as error:
        if len(rows) == 1:
            return [error]
        return [computed(network, [row])[0] for row in rows]


def _by_segments(
    encode: Callable[[Sequence[Segment]], list[Tensor]], device: torch.device, rows: Sequence[Row]
) -> list[Tensor]:
    """As many together as the device gains from, like `AudioEncoder`."""
    segments = [_segment(*row) for row in rows]
    most = SEGMENTS_AT_ONCE[device.type]
    return [one for at in range(0, len(segments), most) for one in encode(segments[at : at + most])]


def _segment(wave: np.ndarray, whole: np.ndarray | None = None) -> Segment:
    if not len(wave):
        raise AudioError("the waveform holds no samples")
    return Segment(wave, whole=whole is None or bool(whole[0]))


def _check_weights(exported: Exported, expected: str, checkpoint: Checkpoint) -> None:
    found = exported.fingerprint
    if found != expected:
        raise CheckpointError(
            f"{checkpoint.root}: the weights of {exported.hosted.name} have the fingerprint {found}, exported were "
            f"{expected}; export the repository anew"
        )
