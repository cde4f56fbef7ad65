"""The learners of `learners.LEARNERS`, and what they learn with: a live model, a little data, and scores of merges."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch
from data.sample import Sample
from moa.config import RunConfig
from moa.merging.adapters import Expert, all_sites, expert_from_tensors, experts_of_bank
from moa.merging.learn import calibration, gradient, guided, least_squares, search
from moa.merging.learn.distill import STUDENT, Lesson, add_student
from moa.merging.learn.ziplora import apply_mergers, learn_mergers
from moa.merging.merge import Merged, MergedSite, cached_merge, merge
from moa.merging.methods.table import find_method
from moa.merging.weights import Weights, weight_table
from moa.model import MixtureModel
from moa.statistics.gather import own_gates


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
    tick: gradient.Step = gradient.quiet  # gets the number of a step or trial, and its loss or score

    @cached_property
    def experts(self) -> list[Expert]:
        return experts_of_bank(self.model.bank)

    @cached_property
    def remerge(self) -> Callable[[Weights | None], dict[str, MergedSite]]:
        return cached_merge(self.experts, added=self.shared, **self.merge)

    @cached_property
    def shared(self) -> list[str]:
        """The experts that are always on: they are not merged, but added at weight 1."""
        return self.model.routing.roles.named("always")

    @property
    def own_batches(self) -> dict[str, list[Batch]]:
        """Of every expert that is merged, its own samples; ValueError for one without."""
        found = self.data.by_expert(self.batch_size)
        if lacking := [name for name in self.names if name not in found]:
            own = f"experts.{lacking[0]}.gate={self.config.experts[lacking[0]].gate}"
            raise ValueError(
                f"{own}: no sample of data.validation is its own (data.validation.NAME.expert), and the method needs "
                "inputs of each expert; method=lora_soups and searches do not"
            )
        return {name: found[name] for name in self.names}

    @cached_property
    def live(self) -> guided.Weighed:
        """The experts with weights on what they do, and their own samples with their own answers."""
        batches, samples = {}, self.data.of_experts()
        for name in self.names:
            own = self.answered(samples.get(name, []), own_gates(self.model, name))
            if not own:
                raise ValueError(f"experts.{name}: answers none of the validation samples; it needs some of its own")
            batches[name] = replace(self.data, samples={name: own}).batches(self.batch_size)
        return guided.Weighed(model=self.model, experts=self.experts, batches=batches, tick=self.tick)

    def answered(self, samples: Sequence[Sample], gates: Callable[[Batch], Tensor]) -> list[Sample]:
        """The samples with what the model generates at these gates, where that is an answer."""
        place = self.model, self.data.prompts, samples, self.batch_size, self.config.eval.max_new_tokens
        texts = calibration.greedy_answers(*place, lambda batch: {"gates": gates(batch)})
        labelled = [calibration.with_answer(s, text) for s, text in zip(samples, texts, strict=True)]
        return [s for s in labelled if s.answers[0] and self.data.collator.error_of(s) is None]

    @cached_property
    def scored_batches(self) -> dict[str, list[Batch]]:
        return self.data.by_source(self.batch_size)

    @property
    def names(self) -> list[str]:
        """The experts that are merged."""
        return [name for name in self.model.bank.names if name not in self.shared]

    @property
    def rank(self) -> int | str:
        return self.merge.get("rank", "sum")

    def add_up(self, experts: Sequence[Expert]) -> dict[str, MergedSite]:
        return merge(experts, method="task_arithmetic", rank=self.rank, added=self.shared)

    def value(self, merged: Merged) -> float:
        with calibration.with_merged(self.model, merged, self.experts):
            if self.metric == "loss":
                return calibration.answers_loss(self.model, self.scored_batches)
            return calibration.benchmark_score(self.model, self.data, self.config)

    def rater(self) -> Callable[[Merged], float]:
        """Merge -> the higher the better; counts its trials."""
        trials: list[float] = []

        def rate(merged: Merged) -> float:
            trials.append(self.value(merged))
            self.tick(len(trials) - 1, trials[-1])
            return -trials[-1] if self.metric == "loss" else trials[-1]

        return rate

    def scorer(self) -> Callable[[Weights], float]:
        """The same of weights."""
        rate = self.rater()
        return lambda weights: rate(self.remerge(self.complete(weights)))

    def complete(self, weights: Weights) -> Weights:
        """With the shared experts' weight, where weights are by expert."""
        by_site = any(isinstance(value, Mapping) for value in weights.values())
        added: Any = {} if by_site else dict.fromkeys(self.shared, 1.0)
        return {**weights, **added}


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a learner found: weights for `merge`, or the merge of these experts itself."""

    merged: dict[str, MergedSite]
    weights: Weights | None = None
    experts: Sequence[Expert] = ()
    about: dict[str, Any] = field(default_factory=dict)


def _by_weights(session: Session, weights: Weights, **about: Any) -> Learned:
    weights = session.complete(weights)
    return Learned(merged=session.remerge(weights), weights=weights, about=about)


def _descended(session: Session, batches: Sequence[Batch], **options: Any) -> Learned:
    found = gradient.learn_weights(session.model, batches, fixed=session.shared, on_step=session.tick, **options)
    return _by_weights(session, found)


def lora_soups(session: Session, *, steps: int = 100, lr: float = 0.05, per_site: bool = True) -> Learned:
    return _descended(session, session.data.batches(session.batch_size), steps=steps, lr=lr, per_site=per_site)


def adamerging(session: Session, *, steps: int = 100, lr: float = 0.05, per_site: bool = True) -> Learned:
    """The answers are those that the model itself generates with 0.3 on every expert."""
    start = torch.full((len(session.model.bank.names),), 0.3)
    gates = lambda batch: start.expand(len(batch), -1)  # noqa: E731
    answered = {name: session.answered(samples, gates) for name, samples in session.data.samples.items()}
    if not any(answered.values()):
        raise ValueError("adamerging: the model answers nothing, so there is no entropy to lower")
    batches = replace(session.data, samples=answered).batches(session.batch_size)
    return _descended(session, batches, objective="entropy", steps=steps, lr=lr, per_site=per_site)


def lorahub(
    session: Session, *, budget: int = 40, optimizer: str = "NGOpt", bound: float = 1.5, penalty: float = 0.05
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
    answers = calibration.perturbed_answers(session.model, session.names, batches, **options)
    order = search.order_by_uncertainty(answers)
    return _by_weights(session, search.prefix_soup(session.scorer(), order), order=order)


def by_sites(learner: Callable[..., guided.Scales], session: Session, **options: Any) -> Learned:
    """By a learner of guided.py whose weights are of a site and an expert."""
    zero = dict.fromkeys(session.names, 0.0) | dict.fromkeys(session.shared, 1.0)
    weights = {site: dict(zero) for site in all_sites(session.experts)}
    for (site, name), scale in learner(session.live, **options).items():
        weights[site][name] = float(scale)
    return _by_weights(session, weights)


def enmp(session: Session, *, budget: int = 60, prune: float = 0.2, optimizer: str = "CMA") -> Learned:
    """Each pair of an expert and a module with sites, such as layers.3.mlp, stays or goes."""
    row = find_method(session.merge.get("method", "linear"))
    table = weight_table(session.experts, None, row.weights, added=session.shared)
    experts = [e for e in session.experts if e.name in session.names]
    pairs = list(dict.fromkeys((site.rpartition(".")[0], e.name) for e in experts for site in e.ranks))
    names = [expert.name for expert in session.experts]

    def weights_of(pruned: frozenset[search.Pair]) -> Weights:
        def kept(site: str) -> dict[str, float]:
            row = zip(names, table[site].tolist(), strict=True)
            return {name: value * ((site.rpartition(".")[0], name) not in pruned) for name, value in row}

        return {site: kept(site) for site in table}

    score = session.scorer()
    options: dict[str, Any] = {"share": prune, "budget": budget, "optimizer": optimizer, "seed": session.seed}
    pruned = search.prune(lambda chosen: score(weights_of(chosen)), pairs, **options)
    return _by_weights(session, weights_of(pruned), pruned=sorted(pruned))


GRID = [{"nondiagonal": n, "ridge": r} for n in (0.9, 0.95, 1.0) for r in (1e-4, 1e-2)]


def _regmean_by(session: Session, **options: Any) -> least_squares.Merge:
    how: dict[str, Any] = {"method": "regmean", "options": options, "rank": session.rank, "added": session.shared}
    return lambda experts: merge(experts, **how)


def regmean(
    session: Session,
    *,
    nondiagonal: float = 0.9,
    ridge: float = 0.0001,
    tune: bool = False,
    answer_share: float | None = None,
) -> Learned:
    """With `tune`, by the best of GRID on the validation samples instead; `answer_share` as in scripts.statistics."""
    experts = least_squares.with_inputs(session.model, session.experts, session.own_batches, answer_share)
    options = {"nondiagonal": nondiagonal, "ridge": ridge}
    if tune:
        rate = session.rater()
        trials = [(rate(_regmean_by(session, **own)(experts)), number) for number, own in enumerate(GRID)]
        options = GRID[max(trials, key=lambda trial: trial[0])[1]]
    return Learned(merged=_regmean_by(session, **options)(experts), experts=experts, about={"chosen": options})


def regmean_pp(session: Session, *, nondiagonal: float = 0.95, ridge: float = 0.0001) -> Learned:
    merge_by = _regmean_by(session, nondiagonal=nondiagonal, ridge=ridge)
    merged = least_squares.regmean_pp(session.model, session.experts, session.own_batches, merge_by)
    return Learned(merged=merged, experts=session.experts)


def iteris(session: Session, *, iterations: int = 5, ridge: float = 0.01, balance: bool = True) -> Learned:
    merge_by = _regmean_by(session, ridge=ridge, balance=balance)
    options: dict[str, Any] = {"iterations": iterations, "ridge": ridge}
    options["tick"] = lambda number: session.tick(number, 0.0)
    merged = least_squares.iteris(session.model, session.experts, session.own_batches, merge_by, **options)
    return Learned(merged=merged, experts=session.experts)


def ziplora(session: Session, *, steps: int = 100, lr: float = 0.01, similarity: float = 0.01) -> Learned:
    batches = session.data.by_expert(session.batch_size)
    options: dict[str, Any] = {"steps": steps, "lr": lr, "similarity": similarity}
    mergers = learn_mergers(session.model, batches, on_step=session.tick, **options)
    experts = apply_mergers(session.experts, mergers)
    return Learned(merged=session.add_up(experts), experts=experts)


def by_triplets(learner: Callable[..., guided.Scales], session: Session, **options: Any) -> Learned:
    """By a learner of guided.py whose weights are of a triplet each: experts whose plain sum is the merge."""
    experts = session.live.apply(learner(session.live, **options))
    return Learned(merged=session.add_up(experts), experts=experts)


def fresh_lora(session: Session, *, size: int = 8, steps: int = 100, lr: float = 0.001) -> Learned:
    """The control of whatever learns from answers: a LoRA of rank `size` that has never seen an expert."""
    model, batches = session.model, session.data.batches(session.batch_size)
    add_student(model, size, size, session.seed, {})
    lesson = Lesson(model=model, gates=lambda batch: {}, by_labels=True)
    try:
        loss = lambda step: lesson.losses(batches[step % len(batches)]).mean()  # noqa: E731
        gradient.descend(model.bank.parameters(STUDENT), loss, steps=steps, lr=lr, on_step=session.tick)
        new = expert_from_tensors(STUDENT, model.bank.state(STUDENT), model.bank.peft_config(STUDENT))
        return Learned(merged=merge([new], rank=session.rank), experts=[new])
    finally:
        model.bank.remove(STUDENT)
