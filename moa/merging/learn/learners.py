"""Every way to learn from a little data how experts should be merged; read without torch.

A learner takes a Session and options, and finds weights for `merge`, or a merge that no weights make.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, Literal

from moa.merging.methods.method import import_function, read_function


@dataclass(frozen=True)
class Learner:
    """A row of `LEARNERS`; its options are the keyword arguments of its function."""

    paper: str
    _: KW_ONLY
    name: str = ""  # of the row, and of its function in learn.session, or, where it weighs parts, in learn.guided
    weighs: Literal["", "triplets", "sites"] = ""
    data: Literal["answers", "inputs"] = "answers"  # what it reads of the samples
    writes_adapter: bool = False  # the merge itself, not weights
    searches: bool = False  # merges again by any method
    # how often it calls `tick`, of its options and the number of experts
    ticks: Callable[[dict[str, Any], int], int | None] = lambda options, _: options.get("steps")

    @property
    def path(self) -> str:
        return f"learn.{'guided' if self.weighs else 'session'}.{self.name}"

    @property
    def function(self) -> Callable[..., Any]:
        own = import_function(self.path)
        return partial(import_function(f"learn.session.by_{self.weighs}"), own) if self.weighs else own

    @property
    def options(self) -> dict[str, Any]:
        return read_function(self.path)[1]


SEARCHES: dict[str, Any] = {"searches": True}
INPUTS: dict[str, Any] = {"data": "inputs"}
SITES: dict[str, Any] = {**INPUTS, "weighs": "sites"}
TRIPLETS: dict[str, Any] = {**INPUTS, "weighs": "triplets", "writes_adapter": True}
ROWS = {
    "lora_soups": Learner("LoRA Soups / CAT (Prabhakar et al., 2025)"),
    "adamerging": Learner("AdaMerging (Yang et al., 2024), entropy of answer tokens", **INPUTS),
    "lorahub": Learner("LoraHub (Huang et al., 2024); merge=lorahub_factors as released",
                       ticks=lambda options, experts: options["budget"], **SEARCHES),
    "grid": Learner("one weight for all experts, as task arithmetic's scale (Ilharco et al., 2023)",
                    ticks=lambda options, experts: len(options["values"]), **SEARCHES),
    "greedy_soup": Learner("Model Soups, recipe 1 (Wortsman et al., 2022)",
                           ticks=lambda options, experts: 2 * experts - 1, **SEARCHES),
    "uq_merge": Learner("UQ-Merge (Qu et al., 2025): the surest experts first, as many as score best",
                        ticks=lambda options, experts: experts, **SEARCHES),
    "nsc": Learner("NSC (2026): inputs stay where the experts read", **SITES),
    "expert_merging": Learner("Expert Merging (2026), a weight of each site and expert", **SITES),
    "enmp": Learner("ENMP (2026): without which modules of which experts",
                    ticks=lambda options, experts: options["budget"] + 1, **SEARCHES),
    "regmean": Learner("RegMean (Jin et al., 2023); tune=true: the best of a grid",
                       ticks=lambda options, experts: 6 if options["tune"] else None, writes_adapter=True),
    "regmean_pp": Learner("RegMean++ (2025), block by block on the merge's own inputs", writes_adapter=True),
    "iteris": Learner("IterIS (Chen et al., 2025), iterated on the merge's own inputs",
                      ticks=lambda options, experts: options["iterations"], writes_adapter=True),
    "ziplora": Learner("ZipLoRA (Shah et al., 2023), for any number of experts", writes_adapter=True),
    "tara": Learner("TARA-A (2026), on singular triplets", **TRIPLETS),
    "adarank": Learner("AdaRank (2026): which singular triplets stay", **TRIPLETS),
    "prodistill": Learner("ProDistill (2025), on singular triplets, block by block",
                          ticks=lambda options, experts: None, **TRIPLETS),
    "fresh_lora": Learner("control: no merge, but a new LoRA trained on the same samples", writes_adapter=True),
}  # fmt: skip
LEARNERS = {key: replace(row, name=key) for key, row in ROWS.items()}
