"""What a client does in a round: from what it received to what it sends, by the steps of train.py.

    received tensors -> stages, each with a fresh optimiser -> pieces of the roles that it trains, and counts

What a client may not train (moa/federated/assignment.py) gets no gradient there.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch
from data.collate import IGNORED
from data.config import SourceConfig
from data.mixture import Mixture, Source
from data.sample import PLACE, Sample
from data.sources import draws_of
from moa.config import RunConfig
from moa.federated.assignment import Assignment, concerns, evidence_of
from moa.federated.partition import Client, Row
from moa.federated.pieces import Piece, Role
from moa.federated.rules import SCAFFOLD, next_variate
from moa.model import MixtureModel
from moa.parts import trained_parts
from moa.routing.router import AnchorRouter
from moa.training.batches import TrainingError
from moa.training.random_state import seed_stage
from moa.training.run import Run
from moa.training.stages import parameter_groups, stage_groups
from moa.training.step import train_step

LEAST = 1e-3  # of a client's draws, of each of its sources
Tensors = Mapping[str, Tensor]
Counts = dict[str, dict[str, float]]  # role -> samples_of_role, samples, answer_tokens, gate_mass
Log = Callable[[dict[str, Any]], None]


# The samples of a client ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClientSource:
    """Some rows of a source, without what their client does not see, and of the experts that the rows name."""

    source: Source
    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        sample = hide(self.source[row.tag.index], row.hidden)
        return sample if sample.expert == row.tag.expert else replace(sample, expert=row.tag.expert)

    def lengths(self, index: int) -> tuple[int, int]:
        source: Any = self.source
        return source.lengths(self.rows[index].tag.index)


def hide(sample: Sample, hidden: Collection[str]) -> Sample:
    if "ocr" in hidden:
        sample = replace(sample, ocr=None)
    if "image" in hidden:
        turns = tuple(replace(turn, question=turn.question.replace(PLACE, "")) for turn in sample.turns)
        sample = replace(sample.with_images([]), question=sample.question.replace(PLACE, ""), turns=turns)
    return sample


class ClientMixture(Mixture):
    """A client's sources; every round goes on where the one before ended."""

    start = 0

    def locate(self, position: int) -> tuple[str, int]:
        return super().locate(self.start + position)


def client_mixture(
    client: Client, sources: Mapping[str, Source], configs: Mapping[str, SourceConfig], seed: int
) -> ClientMixture:
    """Draws by a source's weight times the client's share of its samples: with all of them as plain training does."""
    rows = defaultdict[str, list[Row]](list)
    for row in client.train:
        rows[row.tag.source].append(row)
    own: dict[str, Source] = {
        name: ClientSource(source=sources[name], rows=rows[name]) for name in sources if name in rows
    }
    shares = {name: len(source) / len(sources[name]) for name, source in own.items()}
    if any(config.counts_draws for config in configs.values()):
        draws = {n: max(1, round(draws_of(configs[n], len(sources[n])) * share)) for n, share in shares.items()}
        return ClientMixture(own, draws=draws, seed=seed)
    weights = {n: (1.0 if configs[n].weight is None else configs[n].weight or 0.0) * s for n, s in shares.items()}
    total = sum(weights.values())
    return ClientMixture(own, {n: max(w, LEAST * total) for n, w in weights.items()}, seed=seed)


# Its tensors ------------------------------------------------------------------------------------------


def tensors_of(model: MixtureModel, config: RunConfig) -> dict[str, Tensor]:
    """What a federation sends and receives, by PART.KEY; it shares the model's memory."""
    parts = trained_parts(config)
    found = {f"{part}.{key}": p.detach() for part, row in parts.items() for key, p in row.parameters(model).items()}
    return found | means_of(model, config)


def means_of(model: MixtureModel, config: RunConfig) -> dict[str, Tensor]:
    """The sums of a router that learns means, and no parameters; none of another."""
    learns = config.router.row.learns == "means"
    return {f"router.{key}": buffer for key, buffer in model.router.named_buffers()} if learns else {}


def trainable(model: MixtureModel, config: RunConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of those that some stage may train."""
    groups = parameter_groups(model, config)
    found: Tensors = {f"{part}.{key}": p for part, group in groups.items() for key, p in group.items()}
    return {key: tuple(tensor.shape) for key, tensor in {**found, **means_of(model, config)}.items()}


def learning(model: MixtureModel, config: RunConfig) -> set[str]:
    """Those that the stages of the config train."""
    groups = parameter_groups(model, config)
    chosen = [stage_groups(model, groups, stage) for stage in config.stages.values()]
    found = {f"{part}.{key}" for own in chosen for part, group in own.items() for key in group}
    if any(stage.kind == "router" for stage in config.stages.values()):
        found |= means_of(model, config).keys()
    return found


def routed(model: MixtureModel) -> set[str]:
    return {*model.routing.roles.named("routed")}


@contextmanager
def without(model: MixtureModel, absent: Collection[str]) -> Iterator[None]:
    """Inside, these experts get no gate, and the router chooses among the others."""
    names, device = model.bank.names, next(model.parameters()).device
    model.available = torch.tensor([name not in absent for name in names], device=device) if absent else None
    try:
        yield
    finally:
        model.available = None


@contextmanager
def only_free(parameters: Mapping[str, torch.nn.Parameter], free: Tensors) -> Iterator[None]:
    """Inside, what is not free gets no gradient."""
    hooks = []
    for key, parameter in parameters.items():
        if parameter.requires_grad and key in free and not bool(free[key].all()):
            mask = free[key].to(parameter.device)
            hooks.append(parameter.register_hook(lambda gradient, mask=mask: gradient * mask))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# Its losses -------------------------------------------------------------------------------------------


def proximal(values: Sequence[Tensor], start: Sequence[Tensor]) -> Tensor:
    """Half the squared distance to what was received (FedProx, Li et al. 2020, arXiv 1812.06127, equation 2)."""
    return 0.5 * torch.stack([((now - then) ** 2).sum() for now, then in zip(values, start, strict=True)]).sum()


# Name in `federated.losses` -> a term of (the pieces that the client sends, as they are; as they were received).
TERMS: dict[str, Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]] = {"prox": proximal}


# Its control variates ---------------------------------------------------------------------------------

SERVER_VARIATE, OWN_VARIATE = "c of ", "c_k of "  # before the names of pieces: received, and kept here


def with_variates(roles: Iterable[Role], pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces whose clients step along a control variate."""
    chosen = {role.name for role in roles if role.server == SCAFFOLD}
    return [piece for piece in pieces if piece.role in chosen]


@dataclass(kw_only=True)
class Drift:
    """The control variates of what a client trains and sends: it steps along c - c_k too (SCAFFOLD, equation 3)."""

    variates: Sequence[tuple[Piece, Tensor, Tensor]]  # of a piece c, and c_k
    free: Tensors
    rates: Counter[str] = field(default_factory=Counter)  # the sum of learning rates, by `Piece.rates`

    def step(self, parameters: Tensors, metrics: Mapping[str, float]) -> None:
        """Correct a step of the optimiser, at its rates."""
        now = {f"rates of {key.removeprefix('lr/')}": rate for key, rate in metrics.items() if key.startswith("lr/")}
        self.rates.update(now)
        with torch.no_grad():
            for piece, server, own in self.variates:
                if piece.key in parameters:
                    correction = (server - own) * piece.of(self.free).to(own.device)
                    piece.of(parameters).sub_(now[piece.rates] * correction)

    def next(self, start: Tensors, now: Tensors) -> dict[str, Tensor]:
        """Every c_k after the round; that of a piece which did not move stays."""
        found = {}
        for piece, server, own in self.variates:
            before, after, rates = piece.of(start), piece.of(now), self.rates[piece.rates]
            moved = rates and not torch.equal(before, after)
            own = next_variate(before, after, server, own, rates) if moved else own
            found[f"{OWN_VARIATE}{piece.name}"] = own.cpu().clone()
        return found


def drift_of(received: Tensors, assignment: Assignment, pieces: Sequence[Piece], start: Tensors) -> Drift:
    rows = []
    for piece in with_variates(assignment.sends, pieces):
        like = piece.of(start)
        both = (received.get(f"{whose}{piece.name}") for whose in (SERVER_VARIATE, OWN_VARIATE))
        server, own = (torch.zeros_like(like) if value is None else value.to(like) for value in both)
        rows.append((piece, server, own))
    return Drift(variates=rows, free=assignment.free)


# A round ----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Work:
    """What a client has done in a round; `values` are those of the roles that it sends, `kept` of those it keeps."""

    values: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    counts: Counts = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)  # of each step


@torch.no_grad()
def receive(model: MixtureModel, config: RunConfig, received: Tensors, above: Sequence[Piece] = ()) -> None:
    """Put what was received into the model, with 0 in the ranks that the client does not have."""
    own = tensors_of(model, config)
    for key, tensor in own.items():
        tensor.copy_(received[key])
    for piece in above:
        piece.of(own).zero_()


def client_update(
    run: Run,
    assignment: Assignment,
    received: Tensors,
    pieces: Sequence[Piece],
    roles: Sequence[Role],
    *,
    losses: Mapping[str, float],
    place: tuple[int, int],
    log: Log,
    evidence: AnchorRouter | None = None,
) -> Work:
    """Train what a client received by the stages of `run`, which is fresh, and return what it sends.

    `place` seeds the random streams: the number of stages before this round, and the number of the client. `evidence`
    of one expert adds up that of the samples. TrainingError and BadSampleError pass.
    """
    model, config, work = run.model, run.config, Work()
    receive(model, config, received, assignment.above)
    start = {key: tensor.clone() for key, tensor in tensors_of(model, config).items()}
    drift = drift_of(received, assignment, pieces, start)
    counts: Counts = {role.name: defaultdict(float) for role in roles}
    while not run.done:
        trainer = run.begin_stage(None)
        try:
            seed_stage(config.seed, place[0] + run.stage, place[1])
            hold(model, config, start, assignment.free)  # copies of an expert
            parameters = {f"{part}.{key}": p for part, group in trainer.groups.items() for key, p in group.items()}
            with only_free(parameters, assignment.free), without(model, assignment.absent):
                term = extra_loss(parameters, start, assignment, pieces, losses)
                for micro_batches in run.steps():
                    result = train_step(trainer, micro_batches, run.stage_step, extra_loss=term)
                    if result.problem is None:
                        drift.step(parameters, result.metrics)
                    hold(model, config, start, assignment.free)
                    _log(run, result.metrics, result.problem, work, log)
                    for batch, _ in micro_batches:
                        if batch is not None:
                            count(counts, batch, roles, routed(model), result.metrics)
                            if evidence is not None:
                                own = batch.to(run.accelerator.device)
                                evidence.update(model.evidence(own), torch.zeros_like(own.expert_ids))
                    run.end_stage()
        finally:
            trainer.close()
    if not work.losses:
        raise TrainingError("no step was finite")
    now = tensors_of(model, config)
    for names, values in ((assignment.sends, work.values), (assignment.keeps, work.kept)):
        chosen = {role.name for role in names if role.keep or counts[role.name]["samples_of_role"]}
        values |= {p.name: p.of(now).detach().cpu().clone() for p in pieces if p.role in chosen}
    work.kept |= drift.next(start, now)
    for piece, *_ in drift.variates:
        counts[piece.role][piece.rates] = drift.rates[piece.rates]
    sent = {role.name for role in assignment.sends if counts[role.name]["samples_of_role"]}
    work.counts = {name: dict(found) for name, found in counts.items() if name in sent}
    return work


def _log(run: Run, metrics: Mapping[str, float], problem: str | None, work: Work, log: Log) -> None:
    """One line of a step; TrainingError where it was not finite and that stops the client."""
    if problem is not None:
        run.non_finite_steps += 1
        train = run.config.train
        if train.on_non_finite == "stop" or run.non_finite_steps > train.max_non_finite_steps:
            raise TrainingError(problem)
        log(run.header() | {"not_finite": problem})
        return
    work.losses.append(metrics["loss"])
    log(run.header() | dict(metrics))


@torch.no_grad()
def hold(model: MixtureModel, config: RunConfig, start: Tensors, free: Tensors) -> None:
    """Put back what is not free: weight decay, running sums and copies move it without a gradient."""
    copies = any(stage.copy_of is not None for stage in config.stages.values())
    if config.train.weight_decay or config.router.row.learns == "means" or copies:
        for key, tensor in tensors_of(model, config).items():
            if key in free and not bool(free[key].all()):
                tensor.copy_(torch.where(free[key].to(tensor.device), tensor, start[key]))


def extra_loss(
    parameters: Tensors, start: Tensors, assignment: Assignment, pieces: Sequence[Piece], losses: Mapping[str, float]
) -> Callable[[], Tensor] | None:
    """The weighted terms over the pieces that the client trains in this stage and sends; None without any."""
    sent = {role.name for role in assignment.sends}
    chosen = [piece for piece in pieces if piece.role in sent and piece.key in parameters]
    weights = {name: weight for name, weight in losses.items() if weight}
    if not weights or not chosen:
        return None
    before = [piece.of(start) for piece in chosen]

    def term() -> Tensor:
        now = [piece.of(parameters) for piece in chosen]
        return torch.stack([weight * TERMS[name](now, before) for name, weight in weights.items()]).sum()

    return term


def count(
    counts: Counts, batch: Batch, roles: Iterable[Role], routed: Collection[str], metrics: Mapping[str, float]
) -> None:
    tokens = answer_tokens(batch)
    for sample, image, number in zip(batch.samples, batch.image_mask.tolist(), tokens, strict=True):
        has = [*(["image"] if image else []), *(["ocr"] if sample.ocr else [])]
        for role in roles:
            own = counts[role.name]
            own["samples"] += 1
            if concerns(role, sample.expert, evidence_of(has), routed):
                own["samples_of_role"] += 1
                own["answer_tokens"] += number
            own["gate_mass"] += gate_mass(role, sample.task, metrics)


def answer_tokens(batch: Batch) -> list[int]:
    """Supervised tokens of each sample."""
    if batch.labels is None:
        return [0] * len(batch)
    owners = batch.token_samples()[batch.labels != IGNORED]
    return torch.bincount(owners[owners >= 0], minlength=len(batch)).tolist()


def gate_mass(role: Role, task: str, metrics: Mapping[str, float]) -> float:
    """The mean gate of the experts that a role names, over the step's samples of a task; 1 for a role without any."""
    named = {word for match in role.match for word in re.split("[:.=]", match)}
    gates = {key.rpartition("/")[2]: gate for key, gate in metrics.items() if key.startswith(f"gates/{task}/")}
    found = [gates[name] for name in sorted(named & gates.keys())]
    return sum(found) if found else 1.0
