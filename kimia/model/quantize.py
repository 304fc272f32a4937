"""Weight-only quantisation of the language model by torchao: one byte a weight, one scale a row of each matrix.

Quantised are the projections of all layers and both heads, which is nearly all that a decode step reads. Embeddings,
norms, biases and the adaptor stay as they are, and so do activations, keys and values: a product widens its weights to
their type. What it costs in precision is measured by `kimia.verify.quantized` (`kimia verify MODEL --quantize int8`).

Rows have scales of their own, so matrices that the decode step puts on top of one another (`kimia.model.fused.fuse`)
hold the same numbers whether they were quantised together or one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from kimia.errors import ParameterError
from kimia.model.fused import fuse
from kimia.model.lm import DecoderLayer, DualTrackLM
from kimia.model.quiet import quiet

Scheme = Literal["int8", "fp8"]
SCHEMES: tuple[str, ...] = get_args(Scheme)
FP8_SINCE = (8, 9)  # compute capability of the first GPUs with float8 arithmetic: Ada; Hopper is 9.0
INSTALL = "pip install 'kimia[quantize]'"


def check_scheme(scheme: str | None, device: torch.device | str) -> Scheme | None:
    """The scheme, if it can be had on this device; None and "" are no quantisation.

    Raises ParameterError for an unknown one, for fp8 on a GPU without it, and where torchao is missing.
    """
    if not scheme:
        return None
    if scheme not in SCHEMES:
        raise ParameterError(f"quantize must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    place = torch.device(device)
    if scheme == "fp8" and place.type == "cuda" and torch.cuda.get_device_capability(place) < FP8_SINCE:
        raise ParameterError(
            f"fp8 needs an Ada, Hopper or newer GPU, and {torch.cuda.get_device_name(place)} is older; use int8"
        )
    _library()
    return cast(Scheme, scheme)


@torch.no_grad()
def quantize(lm: DualTrackLM, scheme: Scheme) -> None:
    """Replace the weights of a loaded model, one layer after the other: the float ones are given back on the way."""
    for layer in (*lm.model.layers, *(() if lm.text_only else lm.model.mimo_layers)):
        _quantize_layer(layer, scheme)
    _replace(scheme, lm.lm_head)
    if not lm.text_only:
        _replace(scheme, lm.mimo_output)


def weight_bytes(lm: DualTrackLM) -> int:
    """Memory of all parameters; of what is quantised, of its numbers and scales."""
    storages: dict[int, int] = {}
    for tensor in (inner for parameter in lm.parameters() for inner in _inner(parameter)):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()  # parts of one matrix share it
    return sum(storages.values())


def _quantize_layer(layer: DecoderLayer, scheme: Scheme) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    _replace(scheme, attention.q_proj, attention.k_proj, attention.v_proj)
    _replace(scheme, attention.o_proj)
    _replace(scheme, mlp.gate_proj, mlp.up_proj)
    _replace(scheme, mlp.down_proj)


def _replace(scheme: Scheme, *parts: nn.Linear) -> None:
    """Quantise projections that read the same input as the one matrix that `fuse` makes of them."""
    whole = _quantized(fuse(*parts) if len(parts) > 1 else parts[0].weight, scheme)
    begin = 0
    for part in parts:
        rows = whole[begin : begin + part.out_features] if len(parts) > 1 else whole
        part.weight = nn.Parameter(rows, requires_grad=False)
        begin += part.out_features
    if len(parts) > 1:
        parts[0]._fused_with = whole


def _quantized(weight: Tensor, scheme: Scheme) -> Tensor:
    """A matrix (N, K) as the library's tensor of the same shape and type."""
    library = _library()
    config = library.Int8WeightOnlyConfig if scheme == "int8" else library.Float8WeightOnlyConfig
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    with quiet():
        # Else the library sets switches of the whole process, the precision of float32 products among them.
        library.quantize_(linear, config(set_inductor_config=False))
    return linear.weight.detach()


def _inner(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _inner(getattr(tensor, name))


def _library() -> Any:
    """torchao's quantisation. Raises ParameterError where it is not installed."""
    try:
        with quiet():
            import torchao.quantization
    except ImportError as error:
        raise ParameterError(f"quantisation needs torchao ({error}): {INSTALL}") from error
    return torchao.quantization
