"""Two views on the tensors of a computation: shapes without data, and the bytes that are alive.

A fake tensor has shape, dtype and device and no storage, so that a 70B model takes one forward and
backward in seconds. Ids, labels and masks stay real: the model's own code reads their values.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def fake_mode() -> FakeTensorMode:
    """Inside, every new tensor is fake; afterwards, what a fake tensor meets becomes fake."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class RealMasks(TorchDispatchMode):
    """Lets a real mask choose from a fake tensor: how many it chooses is known from the mask."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.index.Tensor and isinstance(args[0], FakeTensor):
            tensor, (mask, *others) = args
            if not others and mask.dtype == torch.bool:
                return tensor.new_empty(int(mask.sum()), *tensor.shape[mask.dim() :])
        if func is aten.masked_scatter_backward.default and isinstance(args[0], FakeTensor):
            return args[0].new_empty(args[2])
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages, each once, and operations by torch's own formulas.

    Not what is inside an operator, nor the allocator's gaps. torch's FlopCounterMode would keep the tensors of
    recomputed layers alive.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        """`tensors` are there from the beginning."""
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known: set[int] = set()
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._drop, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value)
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result
