"""The kinds of expert, a row each: the bank holds names, sites and gates, and the row does the rest.

A new kind is a file like lora.py with its state, and a row. Its layer gets gates as [batch, 1, expert], or
[batch, seq, expert] by token, from `context`, and adds its experts to what the layer of the base computes:

    layer(base_layer, name, context)   experts, own(expert) -> parameters, add(expert, *parts), remove(expert) -> parts

    lora             at a linear layer: moa/experts/lora.py
    adapter          parallel to a module, with an activation: moa/experts/adapter.py
    serial_adapter   behind a module, with an activation
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from moa.experts import lora_state
from moa.experts.adapter import AdapterSite
from moa.experts.lora import ExpertLinear
from moa.files.peft_config import ADAPTER


@dataclass(frozen=True, kw_only=True)
class ExpertKind:
    """What a kind of expert is. `sites` are its layers by name, `settings` what an expert was made with."""

    layer: type[ExpertLinear]  # around a layer of the base
    peft_type: str = "LORA"  # in its file
    # (sites, name, **settings) -> settings: an expert that changes no output yet
    fresh: Callable[..., dict[str, Any]]
    # (sites, name, tensors, config) -> settings: an expert from its file
    load: Callable[..., dict[str, Any]]
    state: Callable[..., dict[str, Tensor]]  # (sites, name): what its file holds
    overwrite: Callable[..., None]  # (sites, name, tensors): a state by another
    config: Callable[..., dict[str, Any]]  # (sites, name, **settings): the settings in its file


KINDS = {
    "lora": ExpertKind(
        layer=ExpertLinear,
        fresh=lora_state.fresh,
        load=lora_state.load,
        state=lora_state.state,
        overwrite=lora_state.overwrite,
        config=lora_state.peft_config,
    )
}
KINDS |= {
    name: replace(KINDS["lora"], layer=AdapterSite, peft_type=ADAPTER, config=lora_state.adapter_config)
    for name in ("adapter", "serial_adapter")
}
