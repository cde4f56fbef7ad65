"""Settings of a federation: those of the run that comes out of it, and `federated`. Nothing here imports torch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import cos, pi
from typing import Any, Literal

from moa.cli.ranges import Count, CountOrZero, NotNegative, Positive, Share, ShareAboveZero, ShareBelowOne, Size
from moa.cli.settings import check
from moa.config import RunConfig
from moa.federated.partition import PartitionConfig
from moa.federated.role import Role
from moa.sections import StageConfig

RATES = ("experts", "router", "projector")
EACH = "{expert}"  # in a role's name and match: a role for each expert that no other role names


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    steps: ShareAboveZero = 1.0  # share of each stage's steps that the client does
    rank: Size | None = None  # ranks of every expert that it trains and sees; null: all
    experts: list[str] | None = None  # that it has, at least one that is routed; null: all
    group: str | None = None  # of roles with scope per_group, where `groups` computes none


@dataclass(frozen=True, kw_only=True)
class GroupsConfig:
    """Of clients, computed from their first round; the routed experts that learn become the groups' own."""

    # what clients are compared by: lora_B of an expert that each trains alone, or the mean evidence of its samples;
    # null: no groups are computed
    by: Literal["lora_B", "evidence"] | None = None
    # linkage: as many groups as have the best silhouette; kmeans: one for each expert; leader: a client joins the
    # likest group, or begins one where none is like enough
    how: Literal["linkage", "kmeans", "leader"] = "linkage"
    likeness: Share | None = None  # of leader: the least cosine with a group's mean
    warmup: Count = 1  # times the steps of the stages, in a client's first round

    def __post_init__(self) -> None:
        rule = "is of how=leader, which needs it"
        check((self.likeness is not None) == (self.how == "leader"), "likeness", f"{rule}; got {self.likeness}")
        for key, default in (("how", "linkage"), ("warmup", 1)):
            unset = getattr(self, key) == default
            check(self.by is not None or unset, key, "has no effect without federated.groups.by")


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Of clients, against who has the model (docs/federated.md)."""

    clip: Positive | None = None  # the largest norm of a client's change of all roles together; null: no privacy
    noise: Positive | None = None  # its standard deviation in the sum over clients, over `clip`
    delta: ShareAboveZero = 1.0e-5  # chance that epsilon does not hold, below 1 / clients

    def __post_init__(self) -> None:
        check(
            (self.clip is None) == (self.noise is None), "noise", f"needs clip, and clip needs noise; got {self.noise}"
        )


@dataclass(frozen=True, kw_only=True)
class FederatedConfig:
    rounds: Count = 3
    participation: ShareAboveZero = 1.0  # share of the clients that are drawn for each round
    dropout: ShareBelowOne = 0.0  # chance that a client which was drawn sends nothing
    lr_end: Share = 0.1  # cosine over rounds, down to this share of the stages' learning rates
    # of LoRA that all clients train in a round: both; freeze_a: B; alternate: B in odd rounds, A in even ones
    factors: Literal["both", "freeze_a", "alternate"] = "both"
    # stages that clients do from this round on, and up to this one; the others in all rounds
    first_round: dict[str, Count] = field(default_factory=dict)
    last_round: dict[str, Count] = field(default_factory=dict)
    # data sources that clients have from this round on, and up to this one; the others in all rounds
    arrives: dict[str, Count] = field(default_factory=dict)
    leaves: dict[str, Count] = field(default_factory=dict)
    # added to each client's loss, with a weight: {prox: 0.01} is FedProx
    losses: dict[str, NotNegative] = field(default_factory=dict)
    # refuse updates whose change of a role has a norm so many deviations above the median of the round; null: none
    screen: Positive | None = None
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)  # clipping and noise of what clients send
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    # the table of roles: name, match, clients, weight, rule, server, scope, keep, elsewhere, ... (docs/federated.md);
    # empty: the mean of everything over all clients (FedAvg)
    roles: list[Role] = field(default_factory=list)
    clients: dict[str, ClientConfig] = field(default_factory=dict)  # what is special about one, by name
    groups: GroupsConfig = field(default_factory=GroupsConfig)  # of clients that are alike, an expert for each
    # of each data set in the table of clients and tasks at the end; 0: no table
    num_questions: CountOrZero = 32

    def __post_init__(self) -> None:
        number = self.partition.clients - self.partition.held_out
        rule = f"{self.participation:g} of {number} clients is none; it must leave one or more"
        check(self.drawn >= 1, "participation", rule)
        for role in (role for role in self.roles if role.server == "scaffold"):
            rule = "scaffold reads single clients, and no groups of them"
            check(
                self.groups.by is None and self.privacy.clip is None, f"roles.{role.name}.server", f"{rule} or privacy"
            )
        per_group = [role.name for role in self.roles if role.scope == "per_group"]
        given = [name for name, client in self.clients.items() if client.group is not None]
        for name in given:
            check(self.groups.by is None, f"clients.{name}.group", "has no effect with groups.by, which computes it")
            check(bool(per_group), f"clients.{name}.group", "has no effect without a role of scope per_group")
        fits = not per_group or self.groups.by is not None or len(given) >= number
        rule = f"scope per_group of {', '.join(per_group)} needs groups.by, or clients.NAME.group of all that train"
        check(fits, "roles", rule)

        if self.privacy.clip is not None:
            self.check_private(number)

    def check_private(self, clients: int) -> None:
        """What would let a client's data move the model by more than `clip`."""
        rule = f"must be below 1 / {clients} clients, got {self.privacy.delta:g}"
        check(self.privacy.delta < 1 / clients, "privacy.delta", rule)
        check(
            self.screen is None, "screen", "compares clients, so one moves what of others is added; no privacy with it"
        )
        check(self.groups.by is None, "groups.by", "reads single clients; no privacy with it")
        come_and_go = bool(self.arrives or self.leaves)
        rule = "a client without data would show in the fixed number that sums are divided by; no privacy with it"
        check(not come_and_go, "arrives" if self.arrives else "leaves", rule)
        check(bool(self.roles), "roles", "privacy needs a table, with weight: uniform")
        for role in (role for role in self.roles if not role.keep):
            for key, choices in (("rule", ("mean", "sum")), ("weight", ("uniform",)), ("scope", ("global",))):
                value = getattr(role, key)
                check(value in choices, f"roles.{role.name}.{key}", f"privacy needs one of {choices}, got {value!r}")

    @property
    def drawn(self) -> int:
        return round(self.participation * (self.partition.clients - self.partition.held_out))

    def present(self, source: str, round_: int) -> bool:
        return self.arrives.get(source, 1) <= round_ <= self.leaves.get(source, self.rounds)

    def has(self, stage: str, round_: int) -> bool:
        return self.first_round.get(stage, 1) <= round_ <= self.last_round.get(stage, self.rounds)

    def rate_factor(self, round_: int) -> float:
        """Share of the learning rates in round 1, 2, ...: all of them in the first, `lr_end` in the last."""
        return 1 - (1 - self.lr_end) * 0.5 * (1 - cos(pi * (round_ - 1) / max(self.rounds - 1, 1)))


@dataclass(frozen=True, kw_only=True)
class FederateConfig(RunConfig):
    federated: FederatedConfig = field(default_factory=FederatedConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.stages), "stages", "names none: they are what a client does in a round")
        rule = "is not measured in a federation; python -m scripts.statistics measures it of the run that comes out"
        check(self.train.statistics == 0, "train.statistics", rule)
        federated, rounds = self.federated, range(1, self.federated.rounds + 1)
        kinds: tuple[tuple[str, str, str, Any, Any], ...] = (
            ("stage", "first_round", "last_round", self.stages, federated.has),
            ("data source", "arrives", "leaves", self.data.sources, federated.present),
        )
        for what, first, last, known, here in kinds:
            for key in (first, last):
                for name, round_ in getattr(federated, key).items():
                    where, choices = f"federated.{key}.{name}", ", ".join(known)
                    check(name in known, where, f"no such {what}; choices: {choices}")
                    rule = f"must be in 1..{len(rounds)}, the rounds, and leave the {what} one; got {round_}"
                    check(any(here(name, number) for number in rounds) and round_ in rounds, where, rule)
            idle = [number for number in rounds if known and not any(here(name, number) for name in known)]
            check(not idle, f"federated.{first}", f"round {idle[:1]} has no {what}")
        for name, stage in self.stages.items():
            for key in ("init_from", "sources", "kept_b"):
                rule = "has no effect in a federation: every round begins with what the server sends"
                check(getattr(stage, key) is None, f"stages.{name}.{key}", rule)
            once = sum(federated.has(name, number) for number in rounds) == 1
            rule = "is of a stage in one round (federated.first_round, last_round): others begin with what there is"
            check(stage.copy_of is None or once, f"stages.{name}.copy_of", rule)

    def run(self) -> RunConfig:
        """The settings of the run that comes out, as train.py has them."""
        return RunConfig(**{item.name: getattr(self, item.name) for item in fields(RunConfig)})


def make_roles(roles: Sequence[Role], experts: Collection[str]) -> list[Role]:
    """The table with a role for each expert, of those that train, in the place of one with {expert}."""
    roles = roles or [Role(name="all", match=["rest"])]
    named = {match.partition(":")[2].partition(".")[0] for role in roles for match in role.match}
    found = []
    for role in roles:
        if not any(EACH in match for match in role.match):
            found.append(role)
            continue
        check(EACH in role.name, "federated.roles", f"{role.name} matches {EACH}, so its name must have it too")
        left = [name for name in experts if name not in named]
        check(bool(left), "federated.roles", f"{role.name} is for each expert that no other role names: there is none")
        for name in left:
            match = [match.replace(EACH, name) for match in role.match]
            found.append(replace(role, name=role.name.replace(EACH, name), match=match))
    return found


def stages_of(
    config: FederateConfig, round_: int, client: ClientConfig, *, first: bool = False
) -> dict[str, StageConfig]:
    """What a client does in a round, `first` without a group: the stages with its steps and the round's rates."""
    factor, groups = config.federated.rate_factor(round_), config.federated.groups
    share = client.steps * (groups.warmup if first else 1)
    stages = {name: stage for name, stage in config.stages.items() if config.federated.has(name, round_)}
    return {name: _stage(stage, factor, share) for name, stage in stages.items()}


def _stage(stage: StageConfig, factor: float, share: float) -> StageConfig:
    steps = max(1, round(share * stage.steps))
    lr = replace(stage.lr, **{name: getattr(stage.lr, name) * factor for name in RATES})
    return replace(stage, steps=steps, warmup_steps=min(stage.warmup_steps, steps), lr=lr)


def special(config: FederatedConfig, clients: Sequence[str]) -> Mapping[str, ClientConfig]:
    """The settings of every client; ValueError for those of a client that there is not."""
    for name in config.clients:
        check(name in clients, f"federated.clients.{name}", f"no such client; choices: {', '.join(clients)}")
    return {name: config.clients.get(name, ClientConfig()) for name in clients}
