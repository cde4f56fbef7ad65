"""One round at the server: clients' updates and the table of roles -> the new values and a report. Pure, and streamed.

A role's denominator is the sum of its own contributors' weights, so a client without OCR neither dilutes nor moves what
only OCR clients train. What nobody trained stays bit-identical. Updates are read one at a time; of rules that are sums
memory is one sum, of the others the values of their roles. Sums are in float64, so that the order of clients changes at
most the last bit. An update that is not of this round, state and table is counted with its reason, and never averaged.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from moa.federated import rules
from moa.federated.pieces import Piece, Role, join
from moa.federated.privacy import Privacy
from moa.federated.role import STREAMED

Tensors = Mapping[str, Tensor]
ByRole = Mapping[str, Sequence[Piece]]
SCAFFOLD = rules.SCAFFOLD
FACTORS = (".lora_A.weight", ".lora_B.weight")
MERGE = "merge:"
FOLDING = ("carry", "stack")  # into a frozen expert
PAIRED = ("svd", *FOLDING)  # and merge:METHOD


def _without_options() -> None: ...


RULES: dict[str, Callable[..., Any]] = {**dict.fromkeys(STREAMED, _without_options), **rules.ROBUST}
RULES |= {"svd": _without_options, "carry": rules.carry, "stack": rules.fold}
SERVERS: dict[str, Callable[..., Any]] = {"none": _without_options, **rules.SERVERS}
GLOBAL, CLIENT = "", "client:"


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one client sends. Rules keep values without a copy, so they must not be a model's that trains on."""

    client: str
    round: int
    base: str  # of the server's state that it trained from
    values: Tensors  # by piece, on the CPU
    # role -> samples_of_role, samples, answer_tokens, gate_mass; with server=scaffold also `Piece.rates`
    counts: Mapping[str, Mapping[str, float | int]]
    tasks: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    group: str = ""
    digest: str = ""  # of `values`, where it was sent over a network


@dataclass(frozen=True, kw_only=True)
class Server:
    """The state between rounds. A scope is "" for all, or task:NAME, group:NAME, client:NAME."""

    round: int
    tensors: Tensors  # global, by PART.KEY; also those that no role trains
    scoped: Mapping[str, Tensors] = field(default_factory=dict)  # scope -> piece -> value
    state: Mapping[str, Tensors] = field(default_factory=dict)  # of server optimisers, by scope/piece

    def base(self) -> str:
        """A hash of all values; every update names that of what it was trained from."""
        return digest_of({GLOBAL: self.tensors} | dict(self.scoped))


@dataclass(frozen=True, kw_only=True)
class RoleReport:
    contributors: tuple[str, ...]
    weight: float  # the denominator
    numbers: int  # sent by each contributor
    moved: float  # the norm of the change over that of the values before
    covariance: float | None = None  # of pairs of factors: the share that their mean would leave out
    lost: float | None = None  # squared norm that a rank cut off


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    round: int
    roles: Mapping[tuple[str, str], RoleReport]  # by role and scope; those that nobody trained are absent
    refused: tuple[tuple[str, str], ...]  # client and reason
    unmoved: tuple[str, ...]  # roles, or scopes of one, without as many contributors as the rule needs
    # role -> client -> client -> share of the other's value that it gets, of roles with `transfer`
    transfers: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)


def digest_of(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of names, types, shapes and bytes, in the order of names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            found.update(f"{name} {{{digest_of(value)}}}".encode())
    return found.hexdigest()


def check_roles(roles: Sequence[Role], pieces: Sequence[Piece]) -> None:
    """ValueError for a rule that is unknown, or that the role's other settings or pieces do not allow."""
    for role in roles:
        where = f"roles.{role.name}"
        if not is_paired(role) and role.rule not in RULES:
            choices = (*RULES, f"{MERGE}METHOD")
            raise ValueError(f"{where}.rule: must be one of {choices}, got {role.rule!r}")
        if role.rule in rules.UNWEIGHTED and role.weight != "uniform":
            raise ValueError(f"{where}.weight: {role.rule} reads no weights; must be uniform, got {role.weight!r}")
        if role.server not in SERVERS:
            raise ValueError(f"{where}.server: must be one of {(*SERVERS,)}, got {role.server!r}")
        if role.server == SCAFFOLD and (role.clients, role.rule, role.scope) != ("all", "mean", "global"):
            raise ValueError(f"{where}.server: scaffold is of a mean over all clients: clients=all, scope=global")
        if is_paired(role) and role.server != "none":
            raise ValueError(f"{where}.server: {role.server} steps along a change; {role.rule} makes new factors")
        if (role.into != "") != (role.rule in FOLDING):
            rule = "the expert that rule=carry or rule=stack adds to, and of no other rule"
            raise ValueError(f"{where}.into: {rule}, got {role.into!r}")
        if role.into and (role.scope != "global" or any(p.key.startswith(f"experts.{role.into}.") for p in pieces)):
            raise ValueError(f"{where}.into: needs scope=global and a frozen expert in no role, got {role.into!r}")
        _check_options(f"{where}.", role.options, RULES.get(role.rule))
        _check_options(f"{where}.server_", role.server_options, SERVERS[role.server])
        if is_paired(role):
            pairs_of(role, pieces)
            if role.rule.startswith(MERGE):
                rules.check_merge(role.rule.removeprefix(MERGE), role.options)
    filled = Counter(
        carrying(role, piece) for role in roles if role.into for piece in pieces if piece.role == role.name
    )
    if twice := [key for key, number in filled.items() if number > 1]:
        raise ValueError(f"roles: two experts add to {twice[0]}, and the second would undo the first")


def _check_options(where: str, options: Mapping[str, Any], function: Callable[..., Any] | None) -> None:
    if function is None:  # a merging method, which checks its own
        return
    known = [name for name, p in signature(function).parameters.items() if p.kind is Parameter.KEYWORD_ONLY]
    for key in options:
        if key not in known:
            raise ValueError(f"{where}options.{key}: no such option; it has {known or 'none'}")
    try:
        rules.check_values(options)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def is_paired(role: Role) -> bool:
    return role.rule in PAIRED or role.rule.startswith(MERGE)


def pairs_of(role: Role, pieces: Sequence[Piece]) -> list[tuple[Piece, Piece]]:
    """Both factors of every site; ValueError for a piece that is not a whole factor with its other."""
    own = {piece.key: piece for piece in pieces if piece.role == role.name}
    pairs = []
    for key, piece in own.items():
        stem = next((key.removesuffix(end) for end in FACTORS if key.endswith(end)), None)
        both = None if stem is None else [own.get(f"{stem}{end}") for end in FACTORS]
        if piece.axis is not None or both is None or both[0] is None or both[1] is None:
            raise ValueError(f"roles.{role.name}.rule: {role.rule} needs both whole factors, got {piece.name} alone")
        if key.endswith(FACTORS[0]):
            pairs.append((both[0], both[1]))
    return pairs


def scope_of(role: Role, update: Update) -> str:
    """Whose value of the role an update moves; ValueError where the client has none such."""
    if role.scope == "per_task" and len(update.tasks) != 1:
        raise ValueError(f"{role.name} is per task, and the client has the tasks {list(update.tasks)}")
    if role.scope == "per_group" and not update.group:
        raise ValueError(f"{role.name} is per group, and the client has none")
    names = {"global": GLOBAL, "per_client": f"{CLIENT}{update.client}", "per_group": f"group:{update.group}"}
    return names[role.scope] if role.scope in names else f"task:{update.tasks[0]}"


def deliver(server: Server, roles: Sequence[Role], pieces: Sequence[Piece], scopes: Sequence[str]) -> dict[str, Tensor]:
    """The tensors that a client receives: the global ones, with those of its own scopes put in."""
    values: dict[str, Tensor] = {}
    for scope in scopes:
        values |= server.scoped.get(scope, {})
    return join(pieces, values, server.tensors)


def carrying(role: Role, factor: Piece) -> str:
    """The key of the same factor in the expert that a role adds to."""
    return f"experts.{role.into}.{factor.key.split('.', 2)[2]}"


class _Total:
    """The contributions to one role in one scope: a sum of each piece, or all values where the rule needs them."""

    def __init__(self, role: Role, scope: str, pieces: Sequence[Piece], server: Server, private: Privacy | None):
        self.role, self.scope, self.pieces, self.server, self.private = role, scope, pieces, server, private
        self.start = _values(server, pieces, scope)  # the values before, by piece
        self.changes: dict[str, Tensor] = {}  # of control variates, added up
        self.clients: list[str] = []
        self.weights: list[float] = []
        self.sums: dict[str, Tensor] = {}
        self.values: list[dict[str, Tensor]] = []

    def of(self, update: Update) -> dict[str, Tensor]:
        return {piece.name: update.values[piece.name] for piece in self.pieces}

    def add(self, update: Update, weight: float, shrink: float) -> None:
        """With a share of its change, 1 for all."""
        self.clients.append(update.client)
        self.weights.append(weight)
        own = self.of(update)
        for piece in self.pieces if self.role.server == SCAFFOLD else ():
            rates, start, end = update.counts[self.role.name][piece.rates], self.start[piece.name], own[piece.name]
            change = self.changes.setdefault(piece.name, torch.zeros(piece.shape, dtype=torch.float64))
            if rates and not torch.equal(start, end):
                before = self.state(piece.name).get("c", 0)
                change += rules.next_variate(start.double(), end.double(), before, 0, rates)
        role_shrink = 1.0 if self.role.clip is None else rules.shrink(norm_of(own, self.start), self.role.clip)
        for share in (role_shrink, shrink):
            if share < 1:
                old = {name: value.double() for name, value in self.start.items()}
                own = {name: old[name] + share * (value.double() - old[name]) for name, value in own.items()}
        if self.role.rule not in STREAMED:
            self.values.append(own)
            return
        for name, value in own.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(value, dtype=torch.float64)
            self.sums[name].add_(value, alpha=weight)

    def state(self, piece: str) -> dict[str, Tensor]:
        """Of the server's optimiser, in float64."""
        return {k: value.double() for k, value in self.server.state.get(f"{self.scope}/{piece}", {}).items()}

    def ordered(self) -> tuple[list[dict[str, Tensor]], list[float]]:
        """Values and weights by the name of the client, whatever the order in which they came."""
        order = sorted(range(len(self.clients)), key=lambda place: self.clients[place])
        return [self.values[place] for place in order], [self.weights[place] for place in order]

    def mean(self) -> dict[str, Tensor]:
        """What the rule makes of the values, in float64."""
        count, weight = len(self.clients), math.fsum(self.weights)
        if self.private is not None:
            own = ((p.name, self.start[p.name], self.sums.get(p.name)) for p in self.pieces)
            return {name: self.private.value(name, start, total, count) for name, start, total in own}
        if self.role.rule == "mean":
            return {name: total.div_(weight) for name, total in self.sums.items()}
        if self.role.rule == "sum":  # of changes
            return {name: total - (count - 1) * self.start[name].double() for name, total in self.sums.items()}
        values, weights = self.ordered()
        found: dict[str, Tensor] = {}
        for together in [[p] for p in self.pieces] if self.role.rule in rules.BY_NUMBER else [self.pieces]:
            rows = torch.stack([torch.cat([own[p.name].double().flatten() for p in together]) for own in values])
            mean = rules.ROBUST[self.role.rule](rows, torch.tensor(weights).double(), **self.role.options)
            parts = mean.split([piece.numel for piece in together])
            found |= {piece.name: part.view(piece.shape) for piece, part in zip(together, parts, strict=True)}
        return found

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Tensors], dict[str, Tensor], RoleReport]:
        """The new values by piece, the optimiser's state, other tensors that changed, and the report."""
        state: dict[str, Tensors] = {}
        more: dict[str, Tensor] = {}
        facts: dict[str, float] = {}
        if is_paired(self.role):
            values, more, facts = self.paired(self.server.tensors)
        else:
            values = self.mean()
        for name, value in values.items():
            before = self.start[name]
            if self.role.server != "none":
                own = self.state(name) | ({"change": self.changes[name]} if name in self.changes else {})
                step, own = SERVERS[self.role.server](value - before.double(), own, **self.role.server_options)
                value = before.double() + step
                state[f"{self.scope}/{name}"] = {k: v.to(before.dtype) for k, v in own.items()}
            values[name] = value.to(before.dtype)
        change = [float((values[n] - self.start[n]).double().square().sum()) for n in values]
        size = [float(self.start[n].double().square().sum()) for n in values]
        moved = math.sqrt(math.fsum(change)) / (math.sqrt(math.fsum(size)) or 1.0)
        numbers = sum(piece.numel for piece in self.pieces)
        clients, weight = tuple(sorted(self.clients)), math.fsum(self.weights)
        report = RoleReport(contributors=clients, weight=weight, numbers=numbers, moved=moved, **facts)
        return values, state, more, report

    def paired(self, tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
        """New factors of every site, those of the carrying expert, and what the rank lost."""
        all_values, weights = self.ordered()
        values: dict[str, Tensor] = {}
        more: dict[str, Tensor] = {}
        norms, lost = [(0.0, 0.0)], 0.0
        for a, b in pairs_of(self.role, self.pieces):
            pairs = [(own[a.name].double(), own[b.name].double()) for own in all_values]
            norms.append(rules.covariance_norms(pairs, weights))
            like = self.start[a.name].double(), self.start[b.name].double()
            if self.role.into:
                keys = [carrying(self.role, piece) for piece in (a, b)]
                carried = tensors[keys[0]].double(), tensors[keys[1]].double()
                if self.role.rule == "carry":
                    pair, low = rules.carry(pairs, weights, carried, **self.role.options)
                else:
                    low = rules.fold(pairs, weights, carried, **self.role.options)
                    pair = like[0], torch.zeros_like(like[1])
                both = rules.padded(low, carried)
                more |= {key: new.to(tensors[key].dtype) for key, new in zip(keys, both, strict=True)}
            else:
                method, rank = self.role.rule.removeprefix(MERGE), len(like[0])
                if method == "svd":
                    low = rules.svd(pairs, weights, rank)
                else:
                    own: dict[str, Any] = {"options": self.role.options, "site": a.key.removesuffix(FACTORS[0])}
                    low = rules.merge(pairs, weights, rank, method=method, start=like, **own)
                pair = rules.padded(low, like)
            lost += low.lost
            values |= {a.name: pair[0], b.name: pair[1]}
        left_out, whole = (math.fsum(row) for row in zip(*norms, strict=True))
        return values, more, {"covariance": math.sqrt(left_out / (whole or 1.0)), "lost": lost}


def norm_of(values: Tensors, start: Tensors) -> float:
    """Of the change of all pieces together."""
    return math.sqrt(math.fsum(float((v.double() - start[name]).square().sum()) for name, v in values.items()))


def screened(
    server: Server, updates: Iterable[Update], roles: Sequence[Role], by_role: ByRole, most: float | int
) -> dict[str, str]:
    """Why updates are refused whose change of a role is far larger than the others'; see `rules.outliers`."""
    norms: dict[str, dict[str, float]] = {role.name: {} for role in roles}
    base, seen = server.base(), set[str]()
    for update in updates:
        with suppress(ValueError):  # refused for another reason
            for role, _ in accept(update, server.round, base, seen, roles, by_role):
                own = {piece.name: update.values[piece.name] for piece in by_role[role.name]}
                start = _values(server, by_role[role.name], scope_of(role, update))
                norms[role.name][update.client] = norm_of(own, start)
            seen |= {update.client}
    found = {}
    for name, row in norms.items():
        clients, values = [*row], torch.tensor([*row.values()], dtype=torch.float64)
        for place in rules.outliers(values, most):
            times = values[place] / values[[k for k in range(len(clients)) if k != place]].quantile(0.5)
            found[clients[place]] = f"its change of {name} is {float(times):.3g} times the median of the others"
    return found


def aggregate(
    server: Server,
    updates: Iterable[Update],
    roles: Sequence[Role],
    pieces: Sequence[Piece],
    *,
    screen: float | int | None = None,
    private: Privacy | None = None,
) -> tuple[Server, RoundReport]:
    """The server after a round. ValueError for a table that is wrong; a wrong update is in the report.

    With `screen`, deviations of norms above which an update is refused, the updates are read twice. A `private` round
    moves every role, also one that no client has sent.
    """
    check_roles(roles, pieces)
    base, seen, refused = server.base(), set[str](), list[tuple[str, str]]()
    by_role = {role.name: [piece for piece in pieces if piece.role == role.name] for role in roles}
    for role in (role for role in roles if role.into):
        if lost := [k for k in (carrying(role, p) for p in by_role[role.name]) if k not in server.tensors]:
            raise ValueError(f"roles.{role.name}.into: {role.into} has no {lost[0]}")
    large = {} if screen is None else screened(server, updates, roles, by_role, screen)
    totals: dict[tuple[str, str], _Total] = {}

    def total_of(role: Role, scope: str) -> _Total:
        if (role.name, scope) not in totals:
            totals[role.name, scope] = _Total(role, scope, by_role[role.name], server, private)
        return totals[role.name, scope]

    if private is not None:
        for role in (role for role in roles if not role.keep):
            total_of(role, GLOBAL)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # a thread for each role
        for update in updates:
            try:
                accepted = accept(update, server.round, base, seen, roles, by_role)
                if update.client in large:
                    raise ValueError(large[update.client])
            except ValueError as error:
                refused.append((update.client, str(error)))
                continue
            seen.add(update.client)
            own = [(total_of(role, scope_of(role, update)), weight) for role, weight in accepted]
            shrink = 1.0
            if private is not None:
                norm = math.hypot(*(norm_of(total.of(update), total.start) for total, _ in own))
                shrink = rules.shrink(norm, private.clip)
            for work in [pool.submit(total.add, update, weight, shrink) for total, weight in own]:
                work.result()
    tensors, scoped, state = dict(server.tensors), dict(server.scoped), dict(server.state)
    reports: dict[tuple[str, str], RoleReport] = {}
    least = {} if private else {k: rules.least_clients(t.role.rule, t.role.options) for k, t in totals.items()}
    few = {key for key, number in least.items() if len(totals[key].clients) < number}
    for name, scope in sorted(totals.keys() - few):
        values, own_state, more, reports[name, scope] = totals.pop((name, scope)).finish()
        tensors |= more
        state |= own_state
        if scope == GLOBAL:
            tensors = join(by_role[name], values, tensors)
        else:
            scoped[scope] = {**scoped.get(scope, {}), **values}
    trained = {name for name, _ in reports}
    unmoved = tuple(role.name for role in roles if role.name not in trained and not role.keep)
    unmoved += tuple(f"{name} {scope}" for name, scope in sorted(few) if name in trained)
    after, shares = Server(round=server.round + 1, tensors=tensors, scoped=scoped, state=state), {}
    for role in (role for role in roles if role.transfer):
        scopes = [scope for name, scope in reports if name == role.name]
        after, shares[role.name] = transfer(after, role, pieces, scopes)
    report = RoundReport(round=server.round, roles=reports, refused=tuple(refused), unmoved=unmoved, transfers=shares)
    return after, report


def accept(
    update: Update, round_: int, base: str, seen: Collection[str], roles: Sequence[Role], by_role: ByRole
) -> list[tuple[Role, float]]:
    """The roles that an update contributes to, with its weights; ValueError with the reason to refuse it whole.

    It has the pieces of every role that it counts; those of a weight of 0 are in no sum.
    """
    if update.round != round_:
        raise ValueError(f"of round {update.round}, and this is {round_}")
    if update.base != base:
        raise ValueError("trained from other values than those of this round")
    if update.client in seen:
        raise ValueError("a second update of this client")
    known = {role.name: role for role in roles}
    accepted = []
    for name, counts in update.counts.items():
        if (role := known.get(name)) is None:
            raise ValueError(f"{name} is no role; choices: {list(known)}")
        if weight := _weight(role, counts):
            if not role.contributes(tasks=update.tasks, modalities=update.modalities, count=weight):
                rule = "is kept local" if role.keep else f"is trained by {role.clients} alone"
                raise ValueError(f"{name} {rule}")
            scope_of(role, update)
            for count in {piece.rates for piece in by_role[name]} if role.server == SCAFFOLD else ():
                _count(role, counts, count)
            accepted.append((role, weight))
    expected = {piece.name: piece for name in update.counts for piece in by_role[name]}
    if missing := sorted(expected.keys() - update.values.keys()):
        raise ValueError(f"torn: {len(missing)} of {len(expected)} pieces are missing, such as {missing[0]}")
    if extra := sorted(update.values.keys() - expected.keys()):
        raise ValueError(f"{len(extra)} pieces are of no role that it counts, such as {extra[0]}")
    for name, value in update.values.items():
        if tuple(value.shape) != expected[name].shape:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}, must be {expected[name].shape}")
        if not is_finite(value):
            raise ValueError(f"{name} is not finite numbers")
    if update.digest and update.digest != digest_of(update.values):
        raise ValueError("torn: the values are not those of its digest")
    return accepted


def is_finite(value: Tensor) -> bool:
    """By the sum, which is twice as fast as looking at each number; in float64 where float32 may have overflowed."""
    if not value.is_floating_point():
        return False
    return math.isfinite(float(value.sum())) or math.isfinite(float(value.sum(dtype=torch.float64)))


def _weight(role: Role, counts: Mapping[str, float | int]) -> float:
    """Of a client in a role; 0 where it has no samples of it."""
    found = _count(role, counts, "samples_of_role" if role.weight == "uniform" else role.weight)
    return 1.0 if role.weight == "uniform" and found else found


def _count(role: Role, counts: Mapping[str, float | int], measure: str) -> float:
    found = counts.get(measure, math.nan)
    if not (isinstance(found, int | float) and math.isfinite(found) and found >= 0):
        raise ValueError(f"{role.name} needs a count of {measure} that is 0 or more, got {counts.get(measure)}")
    return float(found)


def _values(server: Server, pieces: Sequence[Piece], scope: str) -> dict[str, Tensor]:
    """A role's values before the round: those of the scope, or, where it has none yet, the global ones."""
    own = server.scoped.get(scope, {})
    return {piece.name: own[piece.name] if piece.name in own else piece.of(server.tensors) for piece in pieces}


def transfer(
    server: Server, role: Role, pieces: Sequence[Piece], of: Collection[str]
) -> tuple[Server, dict[str, dict[str, float]]]:
    """Mix the values that clients with the scopes `of` have of a role, by its `transfer`, with those of all clients.

    Others stay: a value that is mixed again and has not trained goes toward all. Also the weights, client -> client ->
    share; see `moa.federated.rules.nearest_weights`.
    """
    names = [piece.name for piece in pieces if piece.role == role.name]
    scopes = sorted(s for s, values in server.scoped.items() if s.startswith(CLIENT) and set(names) <= {*values})
    if not of:
        return server, {}
    rows = torch.stack([torch.cat([server.scoped[s][n].double().flatten() for n in names]) for s in scopes])
    shares = rules.nearest_weights(rules.distances(rows), **role.transfer)
    scoped, table = dict(server.scoped), dict[str, dict[str, float]]()
    clients = [scope.removeprefix(CLIENT) for scope in scopes]
    for client, scope, share in zip(clients, scopes, shares, strict=True):
        if scope in of:
            before = server.scoped[scope]
            parts = (share @ rows).split([before[name].numel() for name in names])
            new = {n: part.view(before[n].shape).to(before[n].dtype) for n, part in zip(names, parts, strict=True)}
            scoped[scope] = {**before, **new}
            table[client] = dict(zip(clients, share.tolist(), strict=True))
    return replace(server, scoped=scoped), table
