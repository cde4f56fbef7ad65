"""Pieces and roles: which part of a mixture's trainable tensors is aggregated how, and over whom.

A piece is a range of one axis of one tensor. In a router's tensors an expert is a row and a kind of evidence a block of
columns, and some ranks of an expert are rows of A and columns of B. So a role, which selects pieces, is finer than a
key. Every element belongs to exactly one role. A key is PART.KEY with the parts and keys of `moa.parts`.

    match                      selects
    experts:NAME               an expert; NAME may be *, all experts
    experts:NAME.A, .B         one factor of it
    experts:NAME.ranks=0:4     some ranks of it: rows of A, columns of B
    router:evidence=KIND       encoder, columns of the head and of its norm, or the anchors, of a kind of evidence
    router:missing=KIND        the vector for samples without it
    router:row=NAME            the expert's row in the last layer, its column of site offsets, its row of token routers
    projector                  a whole part; so are `experts` and `router`
    router:rest, rest          what no other role selects, of a part or of all
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from moa.federated.role import Role
from moa.routing.router import axes_of

REST = "rest"
Shape = Sequence[int]
Span = tuple[int, int, int]  # axis, start, stop


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A range of one axis of a tensor; `axis` None is the whole tensor."""

    key: str
    shape: tuple[int, ...]  # of the piece
    role: str
    axis: int | None = None
    start: int = 0
    stop: int = 0

    @property
    def name(self) -> str:
        """KEY, or KEY[:,4:8] as a slice is written."""
        return self.key if self.axis is None else f"{self.key}[{':,' * self.axis}{self.start}:{self.stop}]"

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def rates(self) -> str:
        """The name of a count: the sum of the learning rates of the steps that its part did."""
        return f"rates of {self.key.partition('.')[0]}"

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The piece of its tensor, a view."""
        whole = tensors[self.key]
        return whole if self.axis is None else whole.narrow(self.axis, self.start, self.stop - self.start)


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the axes of a router's tensors run over: the experts that it chooses among, and its kinds of evidence."""

    choices: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()


def pieces_of(shapes: Mapping[str, Shape], roles: Sequence[Role], names: Names) -> list[Piece]:
    """Every trainable tensor cut along its roles; ValueError for elements in none or two, and what selects nothing."""
    if len({role.name for role in roles}) < len(roles):
        raise ValueError(f"roles: two have the same name, got {[role.name for role in roles]}")
    matches = [(role, match) for role in roles for match in role.match]
    used: set[tuple[str, str]] = set()
    pieces = [piece for key, shape in shapes.items() for piece in _cut(key, tuple(shape), matches, names, used)]
    for role, match in matches:
        if (role.name, match) not in used:
            raise ValueError(f"roles.{role.name}.match: {match} selects nothing")
    return pieces


def _cut(
    key: str, shape: tuple[int, ...], matches: Sequence[tuple[Role, str]], names: Names, used: set[tuple[str, str]]
) -> list[Piece]:
    spans: list[tuple[Span, Role, str]] = []
    for role, match in matches:
        span = None if is_rest(match) else select(match, key, shape, names)
        if span is not None:
            spans.append((span, role, match))
    whole: Span = (0, 0, shape[0])
    axis = next((span[0] for span, *_ in spans if span != whole), 0)
    # A whole tensor has no axis of its own; ranges of two axes always meet.
    spans = [((axis, 0, shape[axis]) if span == whole else span, role, match) for span, role, match in spans]
    spans.sort(key=lambda row: row[0][1:])
    for (one, first, _), (other, second, _) in zip(spans, spans[1:], strict=False):
        if one[0] != other[0] or other[1] < one[2]:
            start, stop = other[1], min(one[2], other[2])
            where = f"[{':,' * axis}{start}:{stop}]" if one[0] == other[0] else ""
            raise ValueError(f"roles: {key}{where} is taken twice, by {first.name} and {second.name}")
    rests = [(role, match) for role, match in matches if is_rest(match) and in_rest(match, key)]
    edges = [0, *(edge for span, *_ in spans for edge in span[1:]), shape[axis]]
    gaps = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
    if gaps and len(rests) != 1:
        where = "" if not spans else "".join(f"[{':,' * axis}{a}:{b}]" for a, b in gaps)
        rule = f"taken twice, by {rests[0][0].name} and {rests[1][0].name}" if rests else "in no role"
        raise ValueError(f"roles: {key}{where} is {rule}")
    spans += [((axis, a, b), *rests[0]) for a, b in gaps]
    used |= {(role.name, match) for _, role, match in spans}
    spans.sort(key=lambda row: row[0][1])
    return [_piece(key, shape, span, role.name) for span, role, _ in spans]


def _piece(key: str, shape: tuple[int, ...], span: Span, role: str) -> Piece:
    axis, start, stop = span
    if stop - start == shape[axis]:
        return Piece(key=key, shape=shape, role=role)
    own = (*shape[:axis], stop - start, *shape[axis + 1 :])
    return Piece(key=key, shape=own, role=role, axis=axis, start=start, stop=stop)


def is_rest(match: str) -> bool:
    return match.rpartition(":")[2] == REST


def in_rest(match: str, key: str) -> bool:
    part = match.rpartition(":")[0]
    return not part or key.startswith(f"{part}.")


def select(match: str, key: str, shape: tuple[int, ...], names: Names) -> Span | None:
    """The range of a tensor that a match selects, or None; see the table above."""
    part, _, what = match.partition(":")
    if part not in SELECT:
        raise ValueError(f"roles: match {match!r} must begin with one of {(*SELECT, REST)}")
    if not key.startswith(f"{part}."):
        return None
    return SELECT[part](match, what, key.removeprefix(f"{part}."), shape, names) if what else (0, 0, shape[0])


def of_expert(match: str, what: str, key: str, shape: tuple[int, ...], names: Names) -> Span | None:
    found = re.fullmatch(r"(?P<name>[^.=:]+)(\.((?P<factor>[AB])|ranks=(?P<start>\d+):(?P<stop>\d+)))?", what)
    if found is None:
        raise ValueError(f"roles: match {match!r} must be experts:NAME, NAME.A, NAME.B or NAME.ranks=START:STOP")
    factor = next((f for f in "AB" if key.endswith(f".lora_{f}.weight")), None)
    if found["name"] not in ("*", key.partition(".")[0]) or found["factor"] not in (None, factor):
        return None
    if found["start"] is None:
        return 0, 0, shape[0]
    axis = {"A": 0, "B": 1, None: 0}[factor]
    start, stop = int(found["start"]), min(int(found["stop"]), shape[axis])
    return (axis, start, stop) if factor and start < stop else None


def of_router(match: str, what: str, key: str, shape: tuple[int, ...], names: Names) -> Span | None:
    by, _, name = what.partition("=")
    known = {"evidence": names.evidence, "missing": names.evidence, "row": names.choices}
    if name not in known.get(by, ()):
        choices = [f"router:{by}={n}" for by, all_names in known.items() for n in all_names]
        raise ValueError(f"roles: match {match!r} is unknown; choices: {choices}")
    if by == "row":
        place, axes = names.choices.index(name), axes_of(key)
        if "expert" not in axes:
            return None
        of = axes.index("expert")
        if shape[of] < len(names.choices):
            raise ValueError(f"roles: match {match!r}: {key} routes only some of the experts (experts.NAME.targets)")
        return of, place, place + 1
    if by == "missing":
        return (0, 0, shape[0]) if key == f"missing.{name}" else None
    if key.startswith((f"encoders.{name}.", f"{name}_sums", f"{name}_counts")):
        return 0, 0, shape[0]
    axis = {"head.0.weight": 0, "head.0.bias": 0, "head.1.weight": 1}.get(key)
    if axis is None:
        return None
    width, place = shape[axis] // len(names.evidence), names.evidence.index(name)
    return axis, place * width, (place + 1) * width


def of_projector(match: str, what: str, key: str, shape: tuple[int, ...], names: Names) -> Span | None:
    raise ValueError(f"roles: match {match!r} must be projector or projector:{REST}")


SELECT: dict[str, Callable[..., Span | None]] = {"experts": of_expert, "router": of_router, "projector": of_projector}


def join(pieces: Sequence[Piece], values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the pieces in `values`, by name, put in; the others are those of `into`, unchanged."""
    joined = dict(into)
    for piece in pieces:
        if piece.name not in values:
            continue
        if piece.axis is None:
            joined[piece.key] = values[piece.name]
            continue
        if joined[piece.key] is into[piece.key]:
            joined[piece.key] = into[piece.key].clone()
        piece.of(joined).copy_(values[piece.name])
    return joined


def print_roles(
    pieces: Sequence[Piece],
    roles: Sequence[Role],
    itemsize: int = 4,
    senders: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """One line a role: numbers, bytes sent, who contributes (of `senders`), weight, rule, scope, elsewhere."""
    lines = [f"{'role':<20} {'numbers':>12} {'sent bytes':>12}  clients, weight, rule, scope, elsewhere"]
    for role in roles:
        numbers = sum(piece.numel for piece in pieces if piece.role == role.name)
        settings = f"{role.clients}, {role.weight}, {role.rule}, {role.scope}, {role.elsewhere}"
        own = None if senders is None or role.keep else senders[role.name]
        by = "" if own is None else f": {', '.join(own) or 'nobody'}"
        sent = 0 if role.keep else numbers * itemsize
        lines.append(f"{role.name:<20} {numbers:>12,} {sent:>12,}  {'kept local' if role.keep else settings}{by}")
    return "\n".join(lines)
