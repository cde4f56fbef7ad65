"""torch for the tables of this room, imported at its first use: the config reads them, and must not wait for it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


class Late:
    """A module by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self.name), attribute)


if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch, F, Tensor = Late("torch"), Late("torch.nn.functional"), Any

__all__ = ["F", "Late", "Tensor", "torch"]
