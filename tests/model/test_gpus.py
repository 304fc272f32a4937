"""The table of GPUs."""

import pytest

from kimia.errors import ParameterError
from kimia.model.gpus import GPUS, find_gpu

pytestmark = pytest.mark.unit


def test_found_by_name_however_it_is_written() -> None:
    assert find_gpu("H200") is GPUS["h200"]
    assert find_gpu("h200").bytes_per_second == 4.8e12


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ParameterError, match=r"one of h200, .*4090.* got 'tpu'"):
        find_gpu("tpu")


def test_tensor_cores_are_faster_than_plain_rates() -> None:
    assert all(gpu.bf16_flop_per_second > 1.9 * gpu.fp32_flop_per_second for gpu in GPUS.values())
