"""Every way to learn from a little data how experts should be merged; read without torch.

A learner takes a Session and options, and finds weights for `merge`, or experts whose plain sum is the merge.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moa.merging.functions import import_function, read_function


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A row of `LEARNERS`; its options are the keyword arguments of its function."""

    name: str  # of a function in learn.session
    paper: str
    makes_experts: bool = False
    searches: bool = False  # merges again by any method
    # how often it calls `tick`, of its options and the number of experts
    ticks: Callable[[dict[str, Any], int], int | None] = lambda options, experts: options.get(
        "steps"
    )

    @property
    def function(self) -> Callable[..., Any]:
        return import_function(f"learn.session.{self.name}")

    @property
    def options(self) -> dict[str, Any]:
        return read_function(f"learn.session.{self.name}")[1]


LEARNERS = {
    "lora_soups": Learner(name="lora_soups", paper="LoRA Soups / CAT (Prabhakar et al., 2025)"),
    "adamerging": Learner(
        name="adamerging", paper="AdaMerging (Yang et al., 2024), entropy of answer tokens"
    ),
    "lorahub": Learner(
        name="lorahub",
        searches=True,
        ticks=lambda options, experts: options["budget"],
        paper="LoraHub (Huang et al., 2024); merge=lorahub_factors as released",
    ),
    "grid": Learner(
        name="grid",
        searches=True,
        ticks=lambda options, experts: len(options["values"]),
        paper="one weight for all experts, as task arithmetic's scale (Ilharco et al., 2023)",
    ),
    "greedy_soup": Learner(
        name="greedy_soup",
        searches=True,
        ticks=lambda options, experts: 2 * experts - 1,
        paper="Model Soups, recipe 1 (Wortsman et al., 2022)",
    ),
    "uq_merge": Learner(
        name="uq_merge",
        searches=True,
        ticks=lambda options, experts: experts,
        paper="UQ-Merge (Qu et al., 2025): the surest experts first, as many as score best",
    ),
    "regmean": Learner(name="regmean", makes_experts=True, paper="RegMean (Jin et al., 2023)"),
    "ziplora": Learner(
        name="ziplora",
        makes_experts=True,
        paper="ZipLoRA (Shah et al., 2023), for any number of experts",
    ),
}
