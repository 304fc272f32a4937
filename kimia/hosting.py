"""What a stage and the server that hosts its networks must agree on: names, tensors, and which weights.

`kimia.triton_export` writes a model repository of these; `kimia.runtime.triton` checks that a server has them. A row of
a batch is one clip or one chunk; -1 in `dims` is a length that differs from row to row.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOATING = ("FP32", "BF16", "FP16")  # Triton's names of the types that continuous features may have
FINGERPRINT = "fingerprint"  # parameter of a model: `kimia.model.fingerprint` of its weights


@dataclass(frozen=True)
class HostedTensor:
    """A tensor of one row, without the dimension of the batch."""

    name: str
    datatypes: tuple[str, ...]  # any of these
    dims: tuple[int, ...]


@dataclass(frozen=True)
class HostedModel:
    """One network behind a server."""

    name: str
    takes: tuple[HostedTensor, ...]
    gives: HostedTensor


WAVE = HostedTensor("WAVE", ("FP32",), (-1,))  # samples, mono, at the rate of the network; at most a segment of 30 s
WHOLE = HostedTensor("WHOLE", ("UINT8",), (1,))  # 1: a whole recording; 0: one of its segments, padded like the others
VQ = HostedModel("kimia_vq", (WAVE, WHOLE), HostedTensor("CODES", ("INT64",), (-1,)))


def whisper_model(width: int) -> HostedModel:
    """The encoder of continuous features: WAVE (S,) to FEATURES (N, width)."""
    return HostedModel("kimia_whisper", (WAVE,), HostedTensor("FEATURES", FLOATING, (-1, width)))


def vocoder_model(mel_bins: int) -> HostedModel:
    """The vocoder: MEL (M, F), de-normalised, to WAVE (hop * F,)."""
    return HostedModel("kimia_vocoder", (HostedTensor("MEL", ("FP32",), (mel_bins, -1)),), WAVE)
