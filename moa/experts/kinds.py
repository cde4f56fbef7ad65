"""The kinds of expert, a row each: the bank holds names, sites and gates, and the row does the rest.

A new kind is a file like lora.py with its state, and a row. Its layer gets gates as [batch, 1, expert], or
[batch, seq, expert] by token, from `context`, and adds its experts to what the layer of the base computes:

    layer(base_layer, name, context)   experts, own(expert) -> parameters, add(expert, *parts), remove(expert) -> parts

    lora             at a linear layer: moa/experts/lora.py
    sparse           at a linear layer, some numbers of its weight: moa/experts/sparse.py
    adapter          parallel to a module, with an activation: moa/experts/adapter.py
    serial_adapter   behind a module, with an activation
    prompt           parallel to a module, such as an attention: keys and values that each token attends to
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from moa.experts import lora_state, sparse
from moa.experts.adapter import AdapterSite
from moa.experts.lora import ExpertLinear
from moa.experts.sparse import SparseLinear
from moa.files.peft_config import ADAPTER, SPARSE


@dataclass(frozen=True, kw_only=True)
class ExpertKind:
    """What a kind of expert is. `sites` are its layers by name, `settings` what an expert was made with."""

    layer: type[ExpertLinear]  # around a layer of the base
    peft_type: str = "LORA"  # in its file
    about: str  # its file, on the card beside it
    made_of: tuple[str, ...] = ("rank", "alpha", "use_rslora")  # settings of a fresh one
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
        about="A LoRA expert of rank {r} from a mixture, as an adapter that plain PEFT loads.",
        fresh=lora_state.fresh,
        load=lora_state.load,
        state=lora_state.state,
        overwrite=lora_state.overwrite,
        config=lora_state.peft_config,
    )
}
KINDS |= {
    name: replace(
        KINDS["lora"],
        layer=AdapterSite,
        peft_type=ADAPTER,
        about="A bottleneck adapter of width {r} from a mixture, which its run loads and PEFT does not.",
        config=lora_state.adapter_config,
    )
    for name in ("adapter", "serial_adapter")
}
KINDS["prompt"] = replace(
    KINDS["adapter"], about="{r} prompts for each of its layers, from a mixture, which its run loads and PEFT does not."
)
KINDS["sparse"] = replace(
    KINDS["lora"],
    layer=SparseLinear,
    peft_type=SPARSE,
    about="A sparse expert (SHiRA) of as many numbers as a LoRA of rank {r}, as an adapter that plain PEFT loads.",
    made_of=("rank",),
    fresh=sparse.fresh,
    load=sparse.load,
    overwrite=sparse.overwrite,
    config=sparse.peft_config,
)


def kind_of(config: Mapping[str, Any]) -> str:
    found: str = config.get("kind", "sparse" if config["peft_type"] == SPARSE else "lora")
    return found
