"""Groups of clients, computed from what each sends of its first round; an expert is the group's own.

In its first round a client trains one expert alone, the slot, from where all experts of groups start. The server then
compares clients, by that lora_B or by the mean evidence of their samples, and gives each a group. The values of clients
that found a group become its expert's; of a client that joins one they are left out. From then on the client's samples
are of its group's expert.

    linkage   average linkage of 1 - cosine, and the number of groups with the best silhouette (FedLEASE, 2509.15087)
    kmeans    of unit vectors (MoAFCL)
    leader    one client after the other: to the likest group, or, where none is like enough, to a new one (DISCO)
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from moa.federated.aggregate import Server, Update, accept, digest_of, is_finite
from moa.federated.assignment import Assignment
from moa.federated.partition import Client
from moa.federated.pieces import Piece, Role
from moa.routing.clusters import best_clusters
from moa.routing.router import AnchorRouter

EVIDENCE = "groups.evidence"  # what a client sends beside its pieces, of groups by evidence
STARTS = 10  # of k-means: the best is taken


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Which group, by the name of its expert, each client has; and the sum of its clients' unit vectors."""

    of: Mapping[str, str] = field(default_factory=dict)
    centres: Mapping[str, Tensor] = field(default_factory=dict)
    since: Mapping[str, int] = field(default_factory=dict)  # client -> the round in which it was compared


@dataclass(frozen=True, kw_only=True)
class Member:
    """Where a client is in a round: its group, whether it has none yet and trains alone, and what it lacks."""

    group: str = ""
    first: bool = False
    lacks: frozenset[str] = frozenset()  # experts

    def rows_of(self, client: Client, experts: Sequence[str]) -> Client:
        """The client with its samples of its group's expert, or of the slot."""
        if not experts:
            return client
        own = self.group or experts[0]
        return replace(client, train=tuple(replace(row, tag=replace(row.tag, expert=own)) for row in client.train))


def alone(found: Assignment, pieces: Sequence[Piece], roles: Collection[str]) -> Assignment:
    """What a client trains in its first round: of these roles."""
    free = {key: torch.zeros_like(mask) for key, mask in found.free.items()}
    for piece in (piece for piece in pieces if piece.role in roles):
        piece.of(free).copy_(piece.of(found.free))
    return replace(found, sends=tuple(role for role in found.sends if role.name in roles), keeps=(), free=free)


def mean_evidence(sums: AnchorRouter) -> Float[Tensor, " feature"]:
    """The mean of each kind of evidence over samples, of unit length; zeros for a kind that none has."""
    means = [sums.get_buffer(f"{k}_sums")[0] / sums.get_buffer(f"{k}_counts").clamp(min=1) for k in sums.evidence]
    return torch.cat([F.normalize(mean, dim=0) for mean in means]).cpu()


# A client is a row of unit length; labels are a number for each.


def average_linkage(rows: np.ndarray, most: int) -> np.ndarray:
    """Of 2 to `most` clusters those with the best silhouette; of equals the fewest."""
    apart = np.clip(pdist(rows, "cosine"), 0, None)
    tree = linkage(apart, "average")
    counts = range(min(2, len(rows)), min(most, len(rows)) + 1)
    cuts = [fcluster(tree, count, "maxclust") for count in counts]
    return max(cuts, key=lambda labels: round(silhouette(squareform(apart), labels), 9))


def silhouette(apart: np.ndarray, labels: np.ndarray) -> float:
    """The mean of (b - a) / max(a, b): a is the mean distance to a client's own cluster, b to the nearest other.

    0 for a client that is alone (Rousseeuw 1987, doi 10.1016/0377-0427(87)90125-7).
    """
    same = labels[:, None] == labels
    sizes = same.sum(1)
    own = (apart * same).sum(1) / np.maximum(sizes - 1, 1)
    others = [np.where(labels == label, np.inf, apart[:, labels == label].mean(1)) for label in np.unique(labels)]
    near = np.min(others, axis=0)
    if not np.isfinite(near).all():  # one cluster
        return 0.0
    return float(np.where(sizes > 1, (near - own) / np.maximum(np.maximum(near, own), 1e-12), 0.0).mean())


def kmeans(rows: np.ndarray, most: int) -> np.ndarray:
    """Lloyd's algorithm from k-means++; fewer than `most` clusters where one stays empty."""
    return best_clusters(rows, min(most, len(rows)), tries=STARTS)[1]


CLUSTERS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"linkage": average_linkage, "kmeans": kmeans}


def place_clients(
    groups: Groups,
    features: Mapping[str, Float[Tensor, " feature"]],
    experts: Sequence[str],
    how: str,
    likeness: float | int = -1,
) -> Groups:
    """A group for each of these clients, among `experts`; whatever their order.

    Groups are there already, or clustered, or begun where a client's cosine with each is below `likeness` and an expert
    is left. Their names follow the names of their first clients.
    """
    names, of, centres = sorted(features), dict(groups.of), dict(groups.centres)
    if not names:
        return groups
    rows = F.normalize(torch.stack([features[name].double() for name in names]), dim=1)
    labels = None
    if how in CLUSTERS and not centres and len(names) > 1:
        labels = CLUSTERS[how](rows.numpy(), len(experts)).tolist()
    first: dict[int, str] = {}  # of each label its expert
    for place, (name, row) in enumerate(zip(names, rows, strict=True)):
        free = next((expert for expert in experts if expert not in centres), None)
        like = {own: float(F.cosine_similarity(row, centre, dim=0)) for own, centre in centres.items()}
        group = max(like, key=lambda own: like[own]) if like else None
        if labels is not None:
            group = first.setdefault(labels[place], free or "")
        elif free is not None and (group is None or like[group] < likeness):
            group = free
        assert group  # a cluster for each expert at most
        of[name], centres[group] = group, centres.get(group, torch.zeros_like(row)) + row
    return replace(groups, of=of, centres=centres)


def lora_b(update: Update, pieces: Sequence[Piece], slot: str) -> Float[Tensor, " feature"]:
    """All lora_B of the slot that a client trained alone."""
    own = [p.name for p in pieces if p.key.startswith(f"experts.{slot}.") and p.key.endswith(".lora_B.weight")]
    return torch.cat([update.values[name].flatten() for name in own if name in update.values])


def roles_of(expert: str, roles: Sequence[Role], pieces: Sequence[Piece]) -> list[str]:
    """The roles with pieces of an expert, in the order of the table."""
    own = {piece.role for piece in pieces if piece.key.startswith(f"experts.{expert}.")}
    return [role.name for role in roles if role.name in own]


def moved(update: Update, roles: Sequence[Role], pieces: Sequence[Piece], slot: str, expert: str) -> Update:
    """What a client sends of the slot, as that of an expert whose roles have the same pieces."""
    pairs = dict(zip(roles_of(slot, roles, pieces), roles_of(expert, roles, pieces), strict=True))
    names: dict[str, str] = {}
    for one, other in pairs.items():
        both = ([piece.name for piece in pieces if piece.role == role] for role in (one, other))
        names |= dict(zip(*both, strict=True))
    values = {names[name]: value for name, value in update.values.items()}
    return replace(update, values=values, counts={pairs[name]: own for name, own in update.counts.items()}, digest="")


def check_groups(experts: Sequence[str], roles: Sequence[Role], pieces: Sequence[Piece]) -> None:
    """ValueError where experts of groups share a role, or their roles have other pieces."""
    found = {expert: roles_of(expert, roles, pieces) for expert in experts}
    shapes = {e: [[p.shape for p in pieces if p.role == name] for name in own] for e, own in found.items()}
    for expert in experts[1:]:
        if both := sorted({*found[expert]} & {*found[experts[0]]}):
            rule = f"has the experts {experts[0]} and {expert}, which are of two groups; make a role of each"
            raise ValueError(f"roles.{both[0]} {rule}, by {{expert}}")
        if shapes[expert] != shapes[experts[0]]:
            rule = "are of groups, and have not the same pieces in their roles"
            raise ValueError(f"groups: the experts {experts[0]} and {expert} {rule}")


def regroup(
    server: Server,
    updates: Sequence[Update],
    newcomers: Sequence[str],
    groups: Groups,
    roles: Sequence[Role],
    pieces: Sequence[Piece],
    *,
    experts: Sequence[str],
    by: str,
    how: str,
    likeness: float | int = -1,
) -> tuple[list[Update], Groups, list[tuple[str, str]]]:
    """The round's updates, those of newcomers as their groups', the groups, and who was refused, with the reason."""
    by_role = {role.name: [piece for piece in pieces if piece.role == role.name] for role in roles}
    features, refused, plain, base = dict[str, Tensor](), list[tuple[str, str]](), dict[str, Update](), server.base()
    for update in (update for update in updates if update.client in newcomers):
        torn = update.digest and update.digest != digest_of(update.values)
        values = dict(update.values)
        found = values.pop(EVIDENCE, None)
        own = replace(update, values=values, digest="")
        try:
            if torn:
                raise ValueError("torn: the values are not those of its digest")
            accept(own, server.round, base, (), roles, by_role)
            if by == "lora_B":
                found = lora_b(own, pieces, experts[0])
            known = next(iter({**groups.centres, **features}.values()), None)
            same = found is not None and (known is None or found.shape == known.shape)
            if found is None or not same or not is_finite(found) or not found.any():
                raise ValueError(f"its {by}, by which clients are compared, is missing, zero or not finite")
        except ValueError as error:
            refused.append((update.client, str(error)))
            continue
        features[update.client], plain[update.client] = found, own
    now = place_clients(groups, features, experts, how, likeness)
    now = replace(now, since={**now.since, **dict.fromkeys(features, server.round)})
    lost, kept = {client for client, _ in refused}, []
    for update in (update for update in updates if update.client not in lost):
        own, group = plain.get(update.client, update), now.of.get(update.client, "")
        if update.client in plain and group in groups.centres:
            own = replace(own, values={}, counts={})
        elif update.client in plain:
            own = moved(own, roles, pieces, experts[0], group)
        kept.append(replace(own, group=group))
    return kept, now, refused
