"""A second device where there is none: what its tensors hold lies on the CPU, what they say is `meta`.

torch checks devices deep inside its kernels, so a tensor left on the CPU is found on a GPU only. Here every operation
comes by on its way to the kernels: one that mixes devices is refused, as a GPU would, and any other is computed on the
CPU. So losses are numbers, and the same as the CPU's. (Nothing else of a CPU-only torch can pretend: it builds no
gradients for tensors that say `cuda`, and torch's own meta tensors have no numbers to index by.)
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

ELSEWHERE = torch.device("meta")
CROSSING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
INDEXING = {  # take indices from the CPU
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}
COUNTING = {torch.ops.aten._ctc_loss.Tensor, torch.ops.aten._ctc_loss_backward.Tensor}  # lengths, from anywhere


class Far(torch.Tensor):
    """A tensor elsewhere."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=ELSEWHERE
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"Far({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def computed(func, args, kwargs):
    """One operation, on the CPU, with its tensors where they say they are."""
    found = []
    tree_map_only(torch.Tensor, found.append, (args, kwargs))
    far = any(isinstance(one, Far) for one in found)
    near = [one for one in found if not isinstance(one, Far) and one.dim()]
    if far and near and func not in CROSSING | INDEXING | COUNTING:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} got both")
    wanted = kwargs.get("device")
    goes_far = far if wanted is None else torch.device(wanted) == ELSEWHERE
    if func is torch.ops.aten.copy_.default:
        goes_far = isinstance(args[0], Far)
    inner_args, inner_kwargs = tree_map_only(Far, lambda one: one.held, (args, dict(kwargs)))
    if wanted is not None:
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    if func is torch.ops.aten._to_copy.default and far != goes_far:
        out = out.clone() if out is inner_args[0] else out
    if not goes_far:
        return out
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, Far, out))


class _Dispatch(TorchDispatchMode):
    """Catches what makes tensors from nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


@contextmanager
def elsewhere():
    """While it lasts there is a second device."""
    plain = torch.tensor

    def tensor(data, *, dtype=None, device=None):  # torch.tensor itself asks nobody before it makes a meta tensor
        return plain(data, dtype=dtype).to(device)

    def new_tensor(self, data):
        return plain(data, dtype=self.dtype).to(self.device)

    with mock.patch("torch.tensor", tensor), mock.patch("torch.Tensor.new_tensor", new_tensor), _Dispatch():
        yield ELSEWHERE
