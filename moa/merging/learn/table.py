"""Every way to learn how a run's experts should be merged, from a little data of that run.

weights   lora_soups, adamerging by gradient; lorahub, grid, greedy_soup, uq_merge by merging and scoring again
experts   regmean, ziplora: experts whose plain sum is the merge
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moa.config import RunConfig
from moa.merging.core import Expert
from moa.merging.inputs import experts_of_bank
from moa.merging.learn import weights as learned
from moa.merging.learn.cached import CachedMerge
from moa.merging.learn.calibration import (
    FewShot,
    answers_loss,
    benchmark_score,
    installed,
    own_answers,
    perturbed_answers,
)
from moa.merging.learn.regmean import gather_grams, regmean
from moa.merging.learn.ziplora import apply_mergers, learn_mergers
from moa.merging.merge import MergedSite, merge
from moa.merging.plan import Weights
from moa.model import MixtureModel

Tick = Callable[[int, float], None]  # number of the step or trial, its loss or score


@dataclass(frozen=True, kw_only=True)
class Session:
    """A model with its experts, a little data, and how merges are made and scored."""

    model: MixtureModel  # without a router of tokens, which gates of its own would bring
    config: RunConfig
    few: FewShot
    merge: Mapping[str, Any] = field(default_factory=dict)  # method, options, rank of `merge`
    metric: str = "loss"  # loss: of the answers; scores: mean primary metric of generated answers
    batch_size: int = 16
    seed: int = 0
    tick: Tick = lambda number, value: None

    @cached_property
    def experts(self) -> list[Expert]:
        return experts_of_bank(self.model.bank)

    @cached_property
    def remerge(self) -> CachedMerge:
        return CachedMerge(self.experts, **self.merge)

    @cached_property
    def scored_batches(self) -> dict[str, Any]:
        return self.few.by_source(self.batch_size)

    def value(self, merged: Mapping[str, MergedSite]) -> float:
        """The metric of a merge."""
        with installed(self.model, merged, self.experts):
            if self.metric == "loss":
                return answers_loss(self.model, self.scored_batches)
            return benchmark_score(self.model, self.few, self.config)

    def scorer(self) -> learned.Score:
        """Weights -> the higher the better; counts its trials."""
        trials: list[float] = []

        def score(weights: Mapping[str, float]) -> float:
            trials.append(self.value(self.remerge(weights)))
            self.tick(len(trials) - 1, trials[-1])
            return -trials[-1] if self.metric == "loss" else trials[-1]

        return score


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a learner found: weights for `merge`, or experts whose plain sum it is."""

    merged: dict[str, MergedSite]
    weights: Weights | None = None
    experts: Sequence[Expert] = ()
    about: dict[str, Any] = field(default_factory=dict)


def _by_weights(session: Session, weights: Weights, **about: Any) -> Learned:
    return Learned(merged=session.remerge(weights), weights=weights, about=about)


def lora_soups(session: Session, *, steps: int, lr: float, per_site: bool) -> Learned:
    batches = session.few.batches(session.batch_size)
    weights = learned.learn_weights(
        session.model, batches, steps=steps, lr=lr, per_site=per_site, on_step=session.tick
    )
    return _by_weights(session, weights)


def adamerging(session: Session, *, steps: int, lr: float, per_site: bool) -> Learned:
    length = session.config.eval.max_new_tokens
    batches = own_answers(session.model, session.few, session.batch_size, 0.3, length)
    weights = learned.learn_weights(
        session.model,
        batches,
        objective="entropy",
        steps=steps,
        lr=lr,
        per_site=per_site,
        on_step=session.tick,
    )
    return _by_weights(session, weights)


def lorahub(
    session: Session, *, budget: int, optimizer: str, bound: float, penalty: float
) -> Learned:
    weights = learned.search(
        session.scorer(),
        session.model.bank.names,
        budget=budget,
        optimizer=optimizer,
        bound=bound,
        penalty=penalty,
        seed=session.seed,
    )
    return _by_weights(session, weights)


def grid(session: Session, *, values: list[float]) -> Learned:
    return _by_weights(session, learned.grid(session.scorer(), session.model.bank.names, values))


def greedy_soup(session: Session) -> Learned:
    return _by_weights(session, learned.greedy_soup(session.scorer(), session.model.bank.names))


def uq_merge(session: Session, *, runs: int, noise: float) -> Learned:
    answers = perturbed_answers(
        session.model, session.few, session.batch_size, runs=runs, noise=noise, seed=session.seed
    )
    order = learned.order_by_uncertainty(answers)
    return _by_weights(session, learned.prefix_soup(session.scorer(), order), order=order)


def _by_experts(session: Session, experts: Sequence[Expert]) -> Learned:
    rank = session.merge.get("rank", "sum")
    merged = merge(experts, method="task_arithmetic", rank=rank)
    return Learned(merged=merged, experts=experts)


def regression_mean(session: Session, *, nondiagonal: float) -> Learned:
    grams = gather_grams(session.model, session.few.by_expert(session.batch_size))
    return _by_experts(session, regmean(session.experts, grams, nondiagonal=nondiagonal))


def ziplora(session: Session, *, steps: int, lr: float, similarity: float) -> Learned:
    mergers = learn_mergers(
        session.model,
        session.few.by_expert(session.batch_size),
        steps=steps,
        lr=lr,
        similarity=similarity,
        on_step=session.tick,
    )
    return _by_experts(session, apply_mergers(session.experts, mergers))


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A row of `LEARNERS`; `options` are the function's, with their defaults."""

    function: Callable[..., Learned]
    paper: str
    options: dict[str, Any] = field(default_factory=dict)
    makes_experts: bool = False
    searches: bool = False  # merges again by any method


_DESCENT = {"steps": 100, "lr": 0.05, "per_site": True}
LEARNERS = {
    "lora_soups": Learner(
        function=lora_soups, options=_DESCENT, paper="LoRA Soups / CAT (Prabhakar et al., 2025)"
    ),
    "adamerging": Learner(
        function=adamerging,
        options=_DESCENT,
        paper="AdaMerging (Yang et al., 2024), entropy of answer tokens",
    ),
    "lorahub": Learner(
        function=lorahub,
        options={"budget": 40, "optimizer": "NGOpt", "bound": 1.5, "penalty": 0.05},
        searches=True,
        paper="LoraHub (Huang et al., 2024); merge=lorahub_factors as released",
    ),
    "grid": Learner(
        function=grid,
        options={"values": [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0]},
        searches=True,
        paper="one weight for all experts, as task arithmetic's scale (Ilharco et al., 2023)",
    ),
    "greedy_soup": Learner(
        function=greedy_soup, searches=True, paper="Model Soups, recipe 1 (Wortsman et al., 2022)"
    ),
    "uq_merge": Learner(
        function=uq_merge,
        options={"runs": 4, "noise": 0.2},
        searches=True,
        paper="UQ-Merge (Qu et al., 2025): the surest experts first, as many as score best",
    ),
    "regmean": Learner(
        function=regression_mean,
        options={"nondiagonal": 0.9},
        makes_experts=True,
        paper="RegMean (Jin et al., 2023)",
    ),
    "ziplora": Learner(
        function=ziplora,
        options={"steps": 100, "lr": 0.01, "similarity": 0.01},
        makes_experts=True,
        paper="ZipLoRA (Shah et al., 2023), for any number of experts",
    ),
}


def num_ticks(method: str, options: Mapping[str, Any], num_experts: int) -> int | None:
    """How often a learner calls `tick`; None where it does not."""
    counts = {
        "lorahub": options.get("budget"),
        "grid": len(options.get("values", ())),
        "greedy_soup": 2 * num_experts - 1,
        "uq_merge": num_experts,
    }
    return counts.get(method, options.get("steps"))
