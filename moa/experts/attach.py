"""Which layers of a model get experts, and the layers put around them."""

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from moa.experts.adapter import AdapterSite
from moa.experts.context import GateContext
from moa.experts.kinds import KINDS
from moa.experts.lora import ExpertLinear
from moa.files.targets import ALL_LINEAR, is_target, select


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Those that can carry LoRA; ValueError where the model carries experts already."""
    if any(isinstance(module, ExpertLinear) for module in model.modules()):
        raise ValueError("the model has a bank already: detach it, or add experts to it")
    return {name: module for name, module in model.named_modules() if is_target(module)}


def choose_layers(
    model: nn.Module, targets: Sequence[str], exclude: Sequence[str], unused: Collection[str]
) -> dict[str, nn.Linear]:
    """The linear layers that the targets name, in the order of the model.

    Raises ValueError for a target or an exclusion that matches nothing, for layers whose output is `unused`, and for
    those whose weight is another layer's too.
    """
    linear = linear_layers(model)
    tied, find = tied_layers(model, linear), getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None  # writes logits over the vocabulary
    able = {n: m for n, m in linear.items() if n not in {*unused, *tied} and m is not head}
    named = select([target for target in targets if target != ALL_LINEAR], linear, "targets")
    named |= able if ALL_LINEAR in targets else {}
    chosen = {name: layer for name, layer in linear.items() if name in named}
    for name in select(exclude, chosen, "exclude"):
        chosen.pop(name)
    if idle := [name for name in chosen if name in set(unused)]:
        raise ValueError(
            f"targets: {len(idle)} layers never reach the output and would not learn (vision "
            f"layers past vision_feature_layer); exclude them, or use targets: [{ALL_LINEAR}]: {', '.join(idle)}"
        )
    if shared := [name for name in chosen if name in tied]:
        raise ValueError(
            f"targets: the weight of {shared[0]} is also that of {tied[shared[0]]}, so that no merge could hold "
            f"an expert there; exclude it, or use targets: [{ALL_LINEAR}]"
        )
    return chosen


def wrap_layers(
    model: nn.Module, layers: Mapping[str, nn.Linear], context: GateContext, kinds: Mapping[str, Sequence[str]]
) -> dict[str, ExpertLinear]:
    """Put sites of LoRA experts around linear layers, and of another kind where `kinds` has expressions for it."""
    of = {site: kind for kind, own in kinds.items() for site in select(own, layers, f"targets of {kind}")}
    found = {name: KINDS[of.get(name, "lora")].layer(layer, name, context) for name, layer in layers.items()}
    for name, site in found.items():
        model.set_submodule(name, site)
    return found


def wrap_modules(
    model: nn.Module, around: Mapping[str, tuple[str, str]], unused: Collection[str], context: GateContext
) -> dict[str, ExpertLinear]:
    """Put adapter sites around modules, the inner ones first; ValueError for one that the model never reads."""
    found = dict[str, ExpertLinear]()
    for name in sorted(around, key=lambda path: -path.count(".")):
        module, (kind, activation) = model.get_submodule(name), around[name]
        if isinstance(module, ExpertLinear):
            raise ValueError(f"targets: {name} has adapters and is one of model.targets; leave it out by model.exclude")
        if any(layer == name or layer.startswith(f"{name}.") for layer in unused):
            raise ValueError(f"targets: the output of {name} is never read, so that an adapter there would not learn")
        found[name] = AdapterSite(module, name, context, kind=kind, activation=activation)
        model.set_submodule(name, found[name])
    return found


def tied_layers(model: nn.Module, linear: Mapping[str, nn.Module]) -> dict[str, str]:
    """Linear layer -> the other parameter that its weight is too."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    others = {
        layer: [n for n in names.get(id(module.weight), []) if n != f"{layer}.weight"]
        for layer, module in linear.items()
    }
    return {layer: found[0] for layer, found in others.items() if found}
