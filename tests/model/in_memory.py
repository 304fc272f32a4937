"""Stored tensors that lie in memory instead of a file."""

from kimia.model.checkpoint import Stored


def in_memory(tensor):
    """A tensor as a file would offer it."""
    return Stored(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), lambda: tensor)
