"""Semantic tokens: the GLM-4-Voice tokenizer, a block-causal Whisper encoder with pooling and a codebook.

Convolutions see the past only, attention sees the own block and everything before, so the codes do not depend on how
much padding follows. That makes batching exact: each segment's mel is computed with its own padding and then extended
to the batch. Segments are independent of each other; the codes of a waveform are those of its segments in order.

Shapes: B segments, M mel bins, T mel frames, J = T/2 encoder frames (50 Hz), K = J / kernel pooled frames, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kimia.model.audio import BATCH_SEGMENTS, LogMel, Segment, cut
from kimia.model.checkpoint import Source, load_strict, without
from kimia.model.config import ENCODER_STRIDE, FeatureConfig, VQConfig, check_features
from kimia.model.quiet import quiet
from kimia.model.whisper import encoder_source, whisper_config

DISTANCE_ROWS = 2048  # hidden states compared with the codebook at once (bounds the distance matrix)
TRAINING_ONLY = (r"^ema_(count|weight)$", r"^embed_positions2\.")  # the second table follows quantisation


class CausalConv1d(nn.Conv1d):
    """A convolution whose output t reads nothing after input t * stride."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, T) to (B, d, ceil(T / stride)), zeros before the first input."""
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class VQTokenizer(nn.Module):
    """Waveforms to semantic codes. Parameters are empty (meta device) until loaded."""

    def __init__(self, config: VQConfig, features: FeatureConfig) -> None:
        super().__init__()
        encoder = config.encoder
        check_features(encoder, features)
        self.config = config
        self.features = features
        self.samples_per_frame = ENCODER_STRIDE * features.hop
        self.samples_per_token = self.samples_per_frame * config.pooling_kernel
        self.log_mel = LogMel(features)
        with torch.device("meta"):
            self.conv1 = _convolution(config, encoder.mel_bins, stride=1)
            self.conv2 = _convolution(config, encoder.d_model, stride=ENCODER_STRIDE)
            self.embed_positions = nn.Embedding(encoder.max_positions, encoder.d_model)
            self.layers = _layers(config)
            self.codebook = nn.Embedding(config.codebook_size, encoder.d_model)

    # ---- the network ----

    def states(self, mel: Tensor, samples: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The forward pass, one named state at a time: `in0` (B, J, d), `out<i>` of layer i, last `hidden` (B, K, d).

        mel: (B, M, T), zero beyond each segment's own spectrogram. samples: (B,), unpadded lengths. A layer's output
        is given before pooling; after it, later layers work on (B, K, d).
        """
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)  # (B, J, d)
        frames = x.shape[1]
        x = x + self.embed_positions.weight[:frames]
        starts = torch.arange(frames, device=x.device) * self.samples_per_frame  # first sample of a frame
        valid = starts < samples[:, None]  # (B, J)
        block = self.config.block_size
        mask = visible(valid, block, self.config.causal_attention)
        yield "in0", x
        for index, layer in enumerate(self.layers):
            x = layer(x, mask)
            yield f"out{index}", x
            if index + 1 == self.config.pooling_position:
                kernel = self.config.pooling_kernel
                x, valid = pool(x, kernel, self.config.pooling_type), valid[:, ::kernel]
                if index + 1 < len(self.layers):  # a block shorter than the kernel is legal where no layer follows
                    mask = visible(valid, block and block // kernel, self.config.causal_attention)
        yield "hidden", x

    def quantize(self, hidden: Tensor) -> Tensor:
        """Index of the nearest codebook row, the lowest on ties: (N, d) to int64 (N,)."""
        return torch.cat([self._nearest(rows) for rows in torch.split(hidden.float(), DISTANCE_ROWS)])

    def _nearest(self, hidden: Tensor) -> Tensor:
        codes = self.codebook.weight.float()  # (V, d)
        norms = codes.square().sum(1) + hidden.square().sum(1, keepdim=True)  # (N, V)
        return torch.addmm(norms, hidden, codes.T, alpha=-2.0).argmin(1)

    # ---- waveforms ----

    @torch.no_grad()
    def encode(self, waves: Sequence[np.ndarray]) -> list[Tensor]:
        """Codes (N,) int64 of each waveform (S,), ceil(S / samples_per_token) a segment; the same in any company.

        Raises AudioError for a waveform that is empty or no float32 array.
        """
        return [self.quantize(hidden) for hidden in self.hidden(waves)]

    @torch.no_grad()
    def hidden(self, waves: Sequence[np.ndarray]) -> list[Tensor]:
        """States before quantisation (N, d) of each waveform (S,)."""
        cuts = [cut(wave, self.features.segment_samples) for wave in waves]
        pieces = [piece for of_wave in cuts for piece in of_wave]
        order = sorted(range(len(pieces)), key=lambda index: self._padded(pieces[index]))  # like lengths share a batch
        encoded: dict[int, Tensor] = {}
        for start in range(0, len(order), BATCH_SEGMENTS):
            batch = order[start : start + BATCH_SEGMENTS]
            encoded.update(zip(batch, self._hidden([pieces[index] for index in batch]), strict=True))
        remaining = iter(range(len(pieces)))
        return [torch.cat([encoded[next(remaining)] for _ in of_wave]) for of_wave in cuts]

    @torch.no_grad()
    def encode_segments(self, batch: Sequence[Segment]) -> list[Tensor]:
        """Codes (N,) int64 of each segment, all in one evaluation."""
        return [self.quantize(hidden) for hidden in self._hidden(batch)]

    @torch.no_grad()
    def trace(self, wave: np.ndarray) -> Iterator[dict[str, Tensor]]:
        """Each segment's `mel` (M, T) and every state of the forward pass (J or K, d), padding included."""
        for piece in cut(wave, self.features.segment_samples):
            mel, samples = self._inputs([piece])
            yield {"mel": mel[0]} | {name: state[0] for name, state in self.states(mel, samples)}

    def _padded(self, segment: Segment) -> int:
        """Samples of its mel spectrogram: alike within a waveform, so a long one pads its tail in full."""
        longest = len(segment.samples) if segment.whole else self.features.segment_samples
        longest = max(longest, self.features.n_fft // 2 + 1)  # what the STFT's reflection needs
        capacity = self.config.encoder.max_positions * self.samples_per_frame
        return min(-(-longest // self.samples_per_token) * self.samples_per_token, capacity)

    def _inputs(self, batch: Sequence[Segment]) -> tuple[Tensor, Tensor]:
        frames = max(self._padded(piece) for piece in batch) // self.features.hop
        weight = self.conv1.weight
        mel = torch.zeros(len(batch), self.features.mel_bins, frames)  # (B, M, T)
        for row, piece in zip(mel, batch, strict=True):
            spectrogram = self.log_mel(piece.samples, self._padded(piece))
            row[:, : spectrogram.shape[1]] = torch.from_numpy(spectrogram)
        samples = torch.tensor([len(piece.samples) for piece in batch], device=weight.device)
        return mel.to(weight.device, weight.dtype), samples

    def _hidden(self, batch: Sequence[Segment]) -> list[Tensor]:
        for name, state in self.states(*self._inputs(batch)):  # one state alive at a time
            if name == "hidden":
                hidden = state
        return [
            row[: -(-len(piece.samples) // self.samples_per_token)] for row, piece in zip(hidden, batch, strict=True)
        ]


def visible(valid: Tensor, block: int | None, causal: bool) -> Tensor:
    """Attention mask (B or 1, 1, J, J), true where query i may see key j, from the valid frames (B, J).

    Block-causal: valid keys of the own block and all before it. No block: all valid keys. Causal: j <= i, nothing else.
    """
    frame = torch.arange(valid.shape[1], device=valid.device)
    past = frame <= frame[:, None]  # (J, J)
    if causal:
        return past[None, None]
    keys = valid[:, None, None]  # (B, 1, 1, J)
    if block is None:
        return keys.expand(-1, -1, len(frame), -1)
    return keys & (past | (frame // block == frame[:, None] // block))


def pool(x: Tensor, kernel: int, kind: str) -> Tensor:
    """Average or maximum over groups of `kernel` frames: (B, J, d) to (B, ceil(J / kernel), d); zeros fill the last."""
    filled = F.pad(x.transpose(1, 2), (0, -x.shape[1] % kernel))
    pooled = F.max_pool1d(filled, kernel) if kind == "max" else F.avg_pool1d(filled, kernel)
    return pooled.transpose(1, 2)


def load_vq(folder: Path, device: torch.device | str, dtype: torch.dtype = torch.float32) -> VQTokenizer:
    """Load the tokenizer's folder: the released layout (unprefixed) or a full WhisperVQ checkpoint, one file or shards.

    float32 is the release's precision whatever the stored type; anything narrower flips codes. Raises CheckpointError.
    """
    config = VQConfig.read(folder / "config.json")
    module = VQTokenizer(config, FeatureConfig.read(folder / "preprocessor_config.json"))
    load_strict(module, vq_source(folder, config.quantize_position), str(folder), device=device, dtype=dtype)
    return module


def vq_source(folder: Path, quantize_position: int) -> Source:
    """The tensors that make codes; left out are training buffers and what follows quantisation."""
    source = without(encoder_source(folder), *TRAINING_ONLY, r"^layer_norm\.")
    return {name: item for name, item in source.items() if not _is_later_layer(name, quantize_position)}


def _is_later_layer(name: str, quantize_position: int) -> bool:
    head, _, rest = name.partition(".")
    index = rest.partition(".")[0]
    return head == "layers" and index.isdigit() and int(index) >= quantize_position


def _convolution(config: VQConfig, channels: int, stride: int) -> nn.Conv1d:
    width = config.encoder.d_model
    if config.causal_convolution:
        return CausalConv1d(channels, width, kernel_size=3, stride=stride)
    return nn.Conv1d(channels, width, kernel_size=3, stride=stride, padding=1)


def _layers(config: VQConfig) -> nn.ModuleList:
    with quiet():
        from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

    whisper = whisper_config(config.encoder)
    return nn.ModuleList(WhisperEncoderLayer(whisper) for _ in range(config.quantize_position))
