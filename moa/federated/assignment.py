"""What a client trains and sends in a round: by its samples, the table of roles, and what is special about it."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moa.federated.partition import Client
from moa.federated.pieces import Piece, Role, is_rest
from moa.federated.rules import moving_factors


def concerns(role: Role, expert: str | None, evidence: Collection[str], routed: Collection[str]) -> bool:
    """Whether a sample, which is of an expert and has these kinds of evidence, is one of a role.

    A sample of an unknown expert is one of every expert; every sample is one of the experts that are not routed, and of
    a role that counts the mass of gates: there the router decides.
    """
    if role.weight == "gate_mass":
        return True
    for match in role.match:
        part, _, what = match.partition(":")
        by, _, name = what.partition("=")
        if part == "router" and by == "evidence":
            found = name in evidence
        elif part == "router" and by == "missing":
            found = name not in evidence
        else:
            named = name if by == "row" else what.partition(".")[0] if part == "experts" else ""
            found = is_rest(match) or named not in routed or expert in (None, named)
        if found:
            return True
    return False


def evidence_of(modalities: Collection[str]) -> set[str]:
    return {"text", "task", *modalities}


def holdings(client: Client, roles: Sequence[Role], routed: Collection[str]) -> Counter[str]:
    """How many training samples of each role a client has."""
    kinds = Counter((r.tag.expert, frozenset(evidence_of(r.tag.modalities - r.hidden))) for r in client.train)
    found: Counter[str] = Counter()
    for (expert, evidence), number in kinds.items():
        found.update({role.name: number for role in roles if concerns(role, expert, evidence, routed)})
    return found


def tasks_of(client: Client) -> tuple[str, ...]:
    return tuple(sorted({row.tag.task for row in client.train}))


def modalities_of(client: Client) -> tuple[str, ...]:
    return tuple(sorted({m for row in client.train for m in row.tag.modalities - row.hidden}))


@dataclass(frozen=True, kw_only=True)
class Assignment:
    sends: tuple[Role, ...]
    keeps: tuple[Role, ...]
    free: Mapping[str, Tensor]  # by PART.KEY: 1 where the client trains, 0 where a value stays as it was received
    above: tuple[Piece, ...] = ()  # ranks that the client does not have: 0 there
    absent: frozenset[str] = frozenset()  # experts that the client does not have: their gates are 0 there


def assign(
    client: Client,
    roles: Sequence[Role],
    pieces: Sequence[Piece],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    routed: Collection[str],
    factors: str = "both",
    round_: int = 1,
    rank: int | None = None,
    lacks: Collection[str] = (),
    learning: Collection[str] | None = None,
) -> Assignment:
    """A role is trained and sent where the client contributes to it and has samples of it, and may train some of it.

    `lacks` are experts that the client does not have, `learning` the keys that a stage of the round trains, None for
    all. ValueError where a role that it sends has one of these and other pieces, where samples are of one, and where no
    routed expert is left.
    """
    held, who = holdings(client, roles, routed), {"tasks": tasks_of(client), "modalities": modalities_of(client)}
    sends = [r for r in roles if held[r.name] and r.contributes(**who, count=held[r.name])]
    still = {r.name: r.elsewhere for r in roles if r not in sends and not r.keep and r.elsewhere != "trainable"}
    free = {key: torch.ones(shape, dtype=torch.bool) for key, shape in shapes.items()}
    above = ranks_above(shapes, rank)
    cut = {piece.key for piece in above}
    of_experts = [(p.key.split(".")[1], p) for p in pieces if p.key.startswith("experts.")]
    absent = {*lacks, *(name for name, p in of_experts if still.get(p.role) == "absent")}
    missing = [p for name, p in of_experts if name in absent]
    for piece in [*(p for p in pieces if p.role in still), *missing, *above]:
        piece.of(free).zero_()
    moving = moving_factors(factors, round_)
    for key, mask in free.items():
        if key.endswith((".lora_A.weight", ".lora_B.weight")) and key[-8] not in moving:
            mask.zero_()
        if learning is not None and key not in learning:
            mask.zero_()
    moved = {piece.role for piece in pieces if bool(piece.of(free).any())}
    sent = tuple(role for role in sends if role.name in moved)
    if mixed := sorted({p.role for p in missing} & {role.name for role in sent}):
        rule = f"sends the role {mixed[0]}, and lacks an expert of it; make a role of each expert, by {{expert}}"
        raise ValueError(f"{client.name} {rule}")
    for piece in pieces:
        inside = rank is not None and piece.key in cut and piece.axis is not None and piece.start < rank < piece.stop
        if inside and piece.role in {role.name for role in sent}:
            rule = f"rank {rank} is inside the ranks {piece.start}:{piece.stop} of the role {piece.role}"
            raise ValueError(f"{client.name} {rule}, whose mean it would fill with zeros")
    if own := sorted({str(row.tag.expert) for row in client.train} & absent):
        raise ValueError(f"{client.name} has samples of the expert {own[0]}, and lacks it")
    if absent >= {*routed}:
        raise ValueError(f"{client.name} has no routed expert: it lacks {sorted(absent)}")
    keeps = tuple(role for role in roles if role.keep and role.name in moved)
    return Assignment(sends=sent, keeps=keeps, free=free, above=tuple(above), absent=frozenset(absent))


def ranks_above(shapes: Mapping[str, tuple[int, ...]], rank: int | None) -> list[Piece]:
    """Rows of A and columns of B of the ranks from `rank` on."""
    axes, found = {".lora_A.weight": 0, ".lora_B.weight": 1}, []
    for key, shape in shapes.items():
        axis = axes.get(key[-14:])
        if rank is not None and axis is not None and key.startswith("experts.") and shape[axis] > rank:
            size = shape[axis] - rank
            own = (*shape[:axis], size, *shape[axis + 1 :])
            found.append(Piece(key=key, shape=own, role="", axis=axis, start=rank, stop=shape[axis]))
    return found
