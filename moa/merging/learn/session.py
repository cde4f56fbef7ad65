"""The learners of `learners.LEARNERS`, and what they learn with: a live model, a little data, and scores of merges.

weights   lora_soups, adamerging by gradient; lorahub, grid, greedy_soup, uq_merge by merging and scoring again
experts   regmean, ziplora: experts whose plain sum is the merge
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from data.batch import Batch
from moa.config import RunConfig
from moa.merging.adapters import Expert, experts_of_bank
from moa.merging.learn import calibration, gradient, search
from moa.merging.learn import regmean as regression
from moa.merging.learn.cached import cached_merge
from moa.merging.learn.ziplora import apply_mergers, learn_mergers
from moa.merging.merge import Merged, MergedSite, merge
from moa.merging.weights import Weights
from moa.model import MixtureModel

Tick = Callable[[int, float], None]  # number of the step or trial, its loss or score


@dataclass(frozen=True, kw_only=True)
class Session:
    """A model with its experts, a little data, and how merges are made and scored."""

    model: MixtureModel  # without a router of tokens, which would have gates of its own
    config: RunConfig
    data: calibration.CalibrationData
    merge: Mapping[str, Any] = field(default_factory=dict)  # method, options, rank of `merge`
    metric: str = "loss"  # loss: of the answers; scores: mean primary metric of generated answers
    batch_size: int = 16
    seed: int = 0
    tick: Tick = lambda number, value: None

    @cached_property
    def experts(self) -> list[Expert]:
        return experts_of_bank(self.model.bank)

    @cached_property
    def remerge(self) -> Callable[[Weights | None], dict[str, MergedSite]]:
        return cached_merge(self.experts, **self.merge)

    @cached_property
    def scored_batches(self) -> dict[str, list[Batch]]:
        return self.data.by_source(self.batch_size)

    @property
    def names(self) -> list[str]:
        return self.model.bank.names

    def value(self, merged: Merged) -> float:
        """The metric of a merge."""
        with calibration.with_merged(self.model, merged, self.experts):
            if self.metric == "loss":
                return calibration.answers_loss(self.model, self.scored_batches)
            return calibration.benchmark_score(self.model, self.data, self.config)

    def scorer(self) -> search.Score:
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


def _descended(session: Session, batches: Sequence[Batch], **options: Any) -> Learned:
    found = gradient.learn_weights(session.model, batches, on_step=session.tick, **options)
    return _by_weights(session, found)


def lora_soups(session: Session, *, steps: int = 100, lr: float = 0.05, per_site: bool = True) -> Learned:
    batches = session.data.batches(session.batch_size)
    return _descended(session, batches, steps=steps, lr=lr, per_site=per_site)


def adamerging(session: Session, *, steps: int = 100, lr: float = 0.05, per_site: bool = True) -> Learned:
    length, size = session.config.eval.max_new_tokens, session.batch_size
    batches = calibration.own_answers(session.model, session.data, size, 0.3, length)
    options: dict[str, Any] = {"objective": "entropy", "steps": steps, "lr": lr}
    return _descended(session, batches, per_site=per_site, **options)


def lorahub(
    session: Session,
    *,
    budget: int = 40,
    optimizer: str = "NGOpt",
    bound: float = 1.5,
    penalty: float = 0.05,
) -> Learned:
    options: dict[str, Any] = {"budget": budget, "optimizer": optimizer, "bound": bound}
    options |= {"penalty": penalty, "seed": session.seed}
    return _by_weights(session, search.search(session.scorer(), session.names, **options))


def grid(session: Session, *, values: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)) -> Learned:
    return _by_weights(session, search.grid(session.scorer(), session.names, values))


def greedy_soup(session: Session) -> Learned:
    return _by_weights(session, search.greedy_soup(session.scorer(), session.names))


def uq_merge(session: Session, *, runs: int = 4, noise: float = 0.2) -> Learned:
    batches = session.data.batches(session.batch_size)
    options: dict[str, Any] = {"runs": runs, "noise": noise, "seed": session.seed}
    answers = calibration.perturbed_answers(session.model, batches, **options)
    order = search.order_by_uncertainty(answers)
    return _by_weights(session, search.prefix_soup(session.scorer(), order), order=order)


def _by_experts(session: Session, experts: Sequence[Expert]) -> Learned:
    rank = session.merge.get("rank", "sum")
    return Learned(merged=merge(experts, method="task_arithmetic", rank=rank), experts=experts)


def regmean(session: Session, *, nondiagonal: float = 0.9) -> Learned:
    grams = regression.gather_grams(session.model, session.data.by_expert(session.batch_size))
    found = regression.regmean(session.experts, grams, nondiagonal=nondiagonal)
    return _by_experts(session, found)


def ziplora(session: Session, *, steps: int = 100, lr: float = 0.01, similarity: float = 0.01) -> Learned:
    batches = session.data.by_expert(session.batch_size)
    options: dict[str, Any] = {"steps": steps, "lr": lr, "similarity": similarity}
    mergers = learn_mergers(session.model, batches, on_step=session.tick, **options)
    return _by_experts(session, apply_mergers(session.experts, mergers))
