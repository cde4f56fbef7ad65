"""What a federation cannot do, by name, before any client trains: tables, experts and clients that do not fit.

`moa.federated.aggregate.check_roles` reads a table of roles and pieces alone; here are the experts' settings too.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from moa.config import RunConfig
from moa.experts.starts import STARTS
from moa.federated import rules
from moa.federated.aggregate import FOLDING, MERGE, carrying, is_paired
from moa.federated.config import ClientConfig, GroupsConfig
from moa.federated.pieces import Names, Piece, Role, Shape, in_rest, is_rest, select
from moa.sections import ExpertConfig

Experts = Mapping[str, ExpertConfig]
Clients = Mapping[str, ClientConfig]


def experts_of(role: Role, pieces: Sequence[Piece]) -> list[str]:
    """The experts that a role has pieces of; of a factor that several have in common, the first."""
    own = (piece.key.split(".") for piece in pieces if piece.role == role.name)
    return list(dict.fromkeys(name for part, name, *_ in own if part == "experts"))


def check_products(roles: Sequence[Role], pieces: Sequence[Piece], experts: Experts) -> None:
    """ValueError for a rule that multiplies the factors of an expert which is not their product."""
    for role in filter(is_paired, roles):
        for name in experts_of(role, pieces):
            where, expert = f"roles.{role.name}.rule: {role.rule} is of updates B A", experts[name]
            if expert.kind != "lora":
                raise ValueError(f"{where}, and {name} is none (kind={expert.kind})")
            if expert.rank_gates != "none":
                raise ValueError(f"{where}, and {name} has a gate for each rank (rank_gates={expert.rank_gates})")


def with_ratios(roles: Sequence[Role], pieces: Sequence[Piece], scalings: Sequence[Mapping[str, float]]) -> list[Role]:
    """The roles with the `ratio` of carry and stack, where none is given: the scaling of theirs over that of `into`."""
    found = []
    for role in roles:
        pairs = (
            (own, name) for own in scalings for name in experts_of(role, pieces) if {name, role.into} <= own.keys()
        )
        if role.into and "ratio" not in role.options:
            own, name = next(pairs, ({role.into: 1.0}, role.into))
            role = replace(role, options={**role.options, "ratio": own[name] / own[role.into]})
        found.append(role)
    return found


def with_numbers(roles: Sequence[Role], clients: int) -> list[Role]:
    """The roles with the `clients` of scaffold, where none are given: all that train."""

    def own(role: Role) -> dict[str, float]:
        return {"clients": float(clients), **role.server_options}

    return [replace(r, server_options=own(r)) if r.server == rules.SCAFFOLD else r for r in roles]


def check_carry(
    roles: Sequence[Role],
    pieces: Sequence[Piece],
    experts: Experts,
    keys: Collection[str],
    scalings: Sequence[Mapping[str, float]],
) -> None:
    """ValueError where `into` does not get what a mean of factors leaves out; `scalings` are those at each site."""
    for role in (role for role in roles if role.rule in FOLDING):
        where, sources, ratio = f"roles.{role.name}", experts_of(role, pieces), role.options["ratio"]
        if role.into not in experts:
            raise ValueError(f"{where}.into: no expert {role.into!r}; choices: {', '.join(experts)}")
        for name in (*sources, role.into):
            if experts[name].gate != "always":
                rule = f"{role.rule} adds updates up, so both experts need gate: always"
                raise ValueError(f"{where}.rule: {rule}, and {name} has {experts[name].gate}")
        if role.rule == "stack" and (held := [name for name in sources if STARTS[experts[name].init].held]):
            rule = (
                f"begins each round with B of 0, and experts.{held[0]}.init={experts[held[0]].init} subtracts a start"
            )
            raise ValueError(f"{where}.rule: stack {rule}")
        if lost := [key for key in (carrying(role, p) for p in pieces if p.role == role.name) if key not in keys]:
            raise ValueError(f"{where}.into: {role.into} has no {lost[0]}")
        for own in scalings:
            for name in sources:
                found = own[name] / own[role.into] if {name, role.into} <= own.keys() else ratio
                if not math.isclose(found, ratio, rel_tol=1e-6):
                    rule = f"must be {found:.7g}, the scaling of {name} over that of {role.into}"
                    raise ValueError(f"{where}.options.ratio: {rule}, got {ratio}")


def common_factors(own: Mapping[str, Iterable[tuple[str, Tensor]]]) -> list[list[str]]:
    """The keys of each parameter of several experts, its piece's first; `own` are the experts' named parameters."""
    found: dict[int, dict[str, str]] = {}
    for name, parameters in own.items():
        for key, parameter in parameters:
            long = f"experts.{name}.{key.replace('base_model.model.', '', 1)}"
            found.setdefault(id(parameter), {}).setdefault(name, long)
    return [[*keys.values()] for keys in found.values() if len(keys) > 1]


def check_common(
    roles: Sequence[Role], pieces: Sequence[Piece], shapes: Mapping[str, Shape], common: Sequence[Sequence[str]]
) -> None:
    """ValueError for a factor of several experts in a role of some of them: owners of the others would not train it."""
    table = {role.name: role for role in roles}
    for keys in common:
        for piece in (piece for piece in pieces if piece.key == keys[0]):
            for key in keys:
                if not any(covers(match, key, shapes[piece.key]) for match in table[piece.role].match):
                    (_, first, *_), (_, other, *_) = piece.key.split("."), key.split(".")
                    factor = "A" if ".lora_A." in key else "B"
                    rule = f"{first} and {other} have one lora_{factor}, which this role takes of {first} alone"
                    way = f"give experts:*.{factor} a role before the experts' own, and these the other factor"
                    raise ValueError(f"roles.{piece.role}.match: {rule}; {way}")


def covers(match: str, key: str, shape: Shape) -> bool:
    if is_rest(match):
        return in_rest(match, key)
    return select(match, key, tuple(shape), Names()) is not None


def check_group_experts(settings: GroupsConfig, config: RunConfig, names: Sequence[str], special: Clients) -> None:
    """ValueError where experts cannot be those of groups: values of one become another's."""
    if len(names) < 2:
        raise ValueError(f"groups.by: needs two routed experts that learn, got {list(names)}")
    first = config.experts[names[0]]
    for name in names:
        own = config.experts[name]
        if own.shape != first.shape:
            raise ValueError(f"groups.by: experts {names[0]} and {name} must be alike in rank, alpha, targets and init")
        if own.kind == "sparse":
            raise ValueError(f"groups.by: {name} is of kind=sparse, and each such expert has places of its own")
        if own.init_from is not None:
            raise ValueError(f"groups.by: all experts of groups start alike, and {name} has init_from={own.init_from}")
    if settings.by == "lora_B" and (STARTS[first.init].held or first.kind != "lora"):
        raise ValueError(f"groups.by: lora_B compares what begins at 0, got init={first.init}, kind={first.kind}")
    if settings.by == "evidence" and (config.router.row.router is None or config.router.granularity == "token"):
        raise ValueError(f"groups.by: evidence is what a router reads, got router.kind={config.router.kind}")
    if config.router.granularity != "sample":
        raise ValueError("groups.by: a client lacks experts of groups, which needs router.granularity=sample")
    if config.data.expert is not None:
        raise ValueError(f"groups.by: decides the experts of samples, and data.expert={config.data.expert} does")
    for client, given in special.items():
        if given.experts is not None:
            raise ValueError(f"clients.{client}.experts: has no effect with groups.by, which decides them")


def check_weights(roles: Sequence[Role], *, compares: bool) -> None:
    """ValueError for a weight that is 0 at every client."""
    for role in roles:
        if compares and role.weight == "answer_tokens":
            rule = "a CLIP compares and has no answer tokens; choices: samples_of_role, samples, gate_mass, uniform"
            raise ValueError(f"roles.{role.name}.weight: {rule}")


def check_ranks(special: Clients, experts: Experts, roles: Sequence[Role] = ()) -> None:
    """ValueError for a client of a lower rank, where an expert subtracts a frozen start that has all ranks, or a merge
    would take the ranks that the client lacks for a change to 0."""
    merging = [role for role in roles if role.rule.startswith(MERGE)]
    held = [name for name, expert in experts.items() if STARTS[expert.init].held and not expert.frozen]
    for client, own in special.items():
        if own.rank is not None and merging:
            rule = f"roles.{merging[0].name}.rule={merging[0].rule} merges changes of all ranks; choose rule=svd"
            raise ValueError(f"clients.{client}.rank: {rule}")
        if own.rank is not None and held:
            rule = f"experts.{held[0]}.init={experts[held[0]].init} subtracts a start of all ranks"
            raise ValueError(f"clients.{client}.rank: {rule}; choices: lora, gaussian, orthogonal, null_space")


def check_senders(roles: Sequence[Role], senders: Mapping[str, Mapping[str, Sequence[str]]], drawn: int) -> None:
    """ValueError for a rule or a scope that the clients cannot have.

    `senders` are of each role the clients that send it in some round, with their tasks; `drawn` is how many of all
    clients are in a round.
    """
    for role in roles:
        own = senders.get(role.name, {})
        if several := [client for client, tasks in own.items() if role.scope == "per_task" and len(tasks) != 1]:
            rule = f"per_task, and {several[0]} has the tasks {', '.join(own[several[0]])}"
            raise ValueError(f"roles.{role.name}.scope: {rule}; deal by_task, or choose global or per_client")
        together = Counter(
            {"per_client": client, "per_task": tasks[0]}.get(role.scope, "") for client, tasks in own.items()
        )
        least, most = rules.least_clients(role.rule, role.options), min(max(together.values(), default=0), drawn)
        if not role.keep and least > 1 and most < least:
            rule = f"{role.rule} needs {least} clients with the options {dict(role.options)}"
            raise ValueError(f"roles.{role.name}.rule: {rule}, and a round has at most {most}")
