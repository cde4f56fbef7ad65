"""Factors that several experts, or several layers, have in common.

share_a, share_b   experts of one group have one lora_A (HydraLoRA, arXiv 2404.19245) or one lora_B at each site
tie_layers         an expert has one lora_A and one lora_B for all sites of a shape that an expression names
                   (MoLoRA and SMoA's pool over layers)

Such a factor is one Parameter under all of its names: it has one gradient, and one row in the optimiser.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moa.experts.lora import FACTORS, ExpertLinear
from moa.files.targets import select

Place = tuple[str, str, str]  # expert, site, factor


@dataclass(frozen=True, kw_only=True)
class Ties:
    """What one expert has in common with others, by the name of a group, and over its own layers."""

    share_a: str | None = None
    share_b: str | None = None
    layers: tuple[str, ...] = ()

    def group(self, factor: str) -> str | None:
        return self.share_a if factor == "A" else self.share_b


def tied_places(sites: Mapping[str, ExpertLinear], ties: Mapping[str, Ties]) -> list[list[Place]]:
    """The places that have one factor in common, at least two each; ValueError for a setting that ties nothing."""
    found: dict[tuple[object, ...], list[Place]] = {}
    for name, own in ties.items():
        present = {site: layer for site, layer in sites.items() if name in layer.scalings}
        row = dict[str, tuple[object, ...]]()  # site -> what its factors are one of
        for pattern in own.layers:
            for site in select([pattern], present, f"experts.{name}.tie_layers"):
                row.setdefault(site, (pattern, present[site].kind, *present[site].shape))
        for site in present:
            for factor in FACTORS:
                group = own.group(factor)
                key = (factor, group, None if group is not None else name, row.get(site, (site,)))
                found.setdefault(key, []).append((name, site, factor))
    shared = [places for places in found.values() if len(places) > 1]
    for name, own in ties.items():
        mine = [places for places in shared if any(expert == name for expert, _, _ in places)]
        for factor in FACTORS:
            others = {e for places in mine for e, _, f in places if f == factor} - {name}
            if own.group(factor) is not None and not others:
                setting, group = f"share_{factor.lower()}", own.group(factor)
                raise ValueError(f"experts.{name}.{setting}: no other expert of {group!r} has one of its sites")
        if own.layers and not any(len({s for e, s, _ in places if e == name}) > 1 for places in mine):
            raise ValueError(f"experts.{name}.tie_layers: {list(own.layers)} name no two layers of one shape")
    return shared
