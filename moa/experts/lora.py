"""LoRA experts at a frozen linear layer.

y = W x + sum_e gate_e scaling_e B_e A_e x

Experts may have one A or one B in common: the same Parameter under the names of all of them. An expert may hold a
start, `start_A_<expert>` and `start_B_<expert>` of its rank, which take part like its own factors and are not trained.
It may have gates of its single ranks, `rank_gates_<expert>`: moa/experts/rank_gates.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moa.experts.context import GateContext, GateState
from moa.experts.crosstalk import Watch, output_energies
from moa.experts.lora_product import Ranks, add_mixture, concatenate, mix, widen
from moa.experts.penalties import LINEAR, PAIRED, PENALTIES
from moa.experts.rank_gates import RankGates, side_by_side, token_rank_gates
from moa.experts.token_routers import LEARNED, TokenSite, directions
from moa.files.peft import site_keys

FACTORS = ("A", "B")
PAIRS = ("lora", "start")  # of factors: an expert's own, and those of its start
Ranked = tuple[RankGates, nn.Parameter | None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A site's rank gates, and its concatenated factors A [rank, in] and B^T [rank, out] in its output's dtype."""

    shape: tuple[int, int]  # of the input they fit: first axis and number of axes
    gates: Tensor | None  # None: tokens are routed one by one
    a: Tensor
    b_t: Tensor

    def fits(self, x: Tensor, dtype: torch.dtype) -> bool:
        return self.shape == (x.shape[0], x.ndim) and self.a.dtype == dtype


class ExpertLinear(nn.Module):
    """A frozen linear layer and the LoRA experts at its site.

    The factors are direct parameters `lora_A_<expert>` [rank, in] and `lora_B_<expert>` [out, rank]
    rather than those of a ParameterDict: ZeRO-3 gathers what the running module itself owns.
    """

    token_router: nn.Parameter | None
    task_router: nn.Parameter | None
    token_noise: nn.Parameter | None
    depth: nn.Parameter | None
    token_query: nn.Parameter | None
    token_key: nn.Parameter | None
    kind = "lora"
    factors: tuple[str, ...] = FACTORS  # that an expert here learns
    activation = ""  # between A and B: none

    def __init__(self, base_layer: nn.Module, name: str, context: GateContext) -> None:
        super().__init__()
        self.base_layer: Any = base_layer  # a linear one
        self.name = name
        self.context = context
        self.scalings: dict[str, float] = {}  # expert -> alpha / rank or alpha / sqrt(rank)
        for learned in LEARNED:  # by tokens here
            self.register_parameter(learned, None)
        self.routed: TokenSite | None = None  # None: its own router, if any, with every choice
        self.starts: set[str] = set()  # experts that hold one
        self.ranked: dict[str, RankGates] = {}  # expert -> what decides the gates of its ranks
        self._leaders: dict[str, str] = {}  # name of a factor -> the first one that is the same Parameter
        # of the last forward's experts: what their ranks are, and the names of their factors, each once
        self._layout: tuple[Any, Ranks, list[str], list[str]] | None = None

    def forward(self, x: Float[Tensor, "*lead in"]) -> Float[Tensor, "*lead out"]:
        """The base's output, plus each expert's B A x times its gate and scaling."""
        out = self.base_layer(x)
        state = self._state()
        if state is None:  # switched off, or no expert of this site has a gate other than 0
            return out
        if state.watch is not None and self.name in state.watch.sites:
            self._measure(x, state, state.watch)
        self._penalise(x, state)
        if torch.is_grad_enabled():
            # Each factor goes in by itself, so that each gets its own gradient, also from gate 0.
            self.context.forget()  # the step that follows changes the factors
            gates = self._gates(x, state)  # [batch, 1, expert], or by token [batch, seq, expert]
            ranks = self._with_cores(state)
            own = self._own_rank_gates(x, state, drop=self.training)
            if own is not None:  # then every rank has a gate of its own
                gates = gates.index_select(-1, ranks.place) * own
                ranks = replace(ranks, place=torch.arange(own.shape[-1], device=own.device))
            return mix(x, out, gates, ranks, *self._factors(state), root=self.context.root)
        # A generation calls this at each token under the same gates: its rank gates, A and B are
        # put together at the first one. `out` is fresh, so that the product is added into it.
        rank_gates, a, b_t = self._prepared(x, state, out.dtype)
        ranks = self._with_cores(state)
        return add_mixture(out, x, rank_gates, a, b_t, ranks.spread, ranks.gather)

    @property
    def shape(self) -> tuple[int, int]:
        return self.base_layer.out_features, self.base_layer.in_features

    @property
    def keys(self) -> tuple[str, ...]:
        return site_keys(self.name)

    @property
    def weight(self) -> Tensor:
        """Of the base: where the experts are to be, and what some starts read."""
        weight: Tensor = self.base_layer.weight
        return weight

    @property
    def experts(self) -> list[str]:
        return list(self.scalings)

    @property
    def lora_A(self) -> dict[str, nn.Parameter]:
        return {expert: getattr(self, f"lora_A_{expert}") for expert in self.scalings}

    @property
    def lora_B(self) -> dict[str, nn.Parameter]:
        return {expert: getattr(self, f"lora_B_{expert}") for expert in self.scalings}

    @property
    def ranks(self) -> dict[str, int]:
        # not by lora_A: inside functional_call a factor is a plain tensor
        return {expert: getattr(self, f"lora_A_{expert}").shape[0] for expert in self.scalings}

    def own(self, expert: str) -> list[nn.Parameter]:
        return [getattr(self, name) for name in self._names(expert)]

    def _names(self, expert: str) -> list[str]:
        kinds = PAIRS if expert in self.starts else PAIRS[:1]
        return [f"{kind}_{factor}_{expert}" for kind in kinds for factor in FACTORS]

    def factor(self, kind: str, factor: str, expert: str) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self, f"{kind}_{factor}_{expert}")
        return parameter

    def whole(self, expert: str) -> tuple[Tensor, ...]:
        """A and B with the start's behind them: the whole update."""
        a, b, *start = self.own(expert)
        return (torch.cat([a, start[0]]), torch.cat([b, start[1]], 1)) if start else (a, b)

    def write(self, expert: str, *factors: Tensor) -> None:
        (a, b), own = factors, self.own(expert)
        rank = len(own[0])
        for parameter, new in zip(own, (a[:rank], b[:, :rank], a[rank:], b[:, rank:]), strict=False):
            parameter.copy_(new)

    def add(self, expert: str, factors: Sequence[nn.Parameter], scaling: float, ranked: Ranked | None = None) -> None:
        """Take an expert's factors [rank, in] and [out, rank], those of its start behind them if it holds one, and the
        gates of its ranks, as the last one's successor."""
        for place, parameter in enumerate(factors):
            self.register_parameter(f"{PAIRS[place // 2]}_{FACTORS[place % 2]}_{expert}", parameter)
        self.scalings[expert] = scaling
        if len(factors) > len(FACTORS):
            self.starts.add(expert)
        if ranked is not None:
            self.gate_ranks(expert, *ranked)
        self._changed()

    def gate_ranks(self, expert: str, settings: RankGates, learned: nn.Parameter | None) -> None:
        """Let an expert's ranks have gates of their own; `learned` as `settings.start` gives it."""
        self.ranked[expert] = settings
        self.register_parameter(f"rank_gates_{expert}", learned)

    def mask_b(self, expert: str, mask: Tensor | None) -> None:
        """Let the numbers of an expert's B where `mask` is 0 be 0 and not learn; None: all learn."""
        self.register_buffer(f"mask_lora_B_{expert}", mask, persistent=False)

    def learned_rank_gates(self, expert: str) -> nn.Parameter | None:
        return getattr(self, f"rank_gates_{expert}", None)

    def remove(self, expert: str) -> tuple[Sequence[nn.Parameter], float, Ranked | None]:
        """Give back what `add` took."""
        factors, ranked = self.own(expert), None
        if expert in self.ranked:
            ranked = self.ranked.pop(expert), self.learned_rank_gates(expert)
            delattr(self, f"rank_gates_{expert}")
        for name in self._names(expert):
            delattr(self, name)
        self.starts.discard(expert)
        scaling = self.scalings.pop(expert)
        self._changed()
        return factors, scaling, ranked

    def remove_all(self) -> dict[str, tuple[Any, ...]]:
        return {expert: self.remove(expert) for expert in self.experts}

    def tie(self, factor: str, expert: str, parameter: nn.Parameter, kind: str = "lora") -> None:
        """Let an expert's factor, "A" or "B", be a Parameter that another place has too."""
        self.register_parameter(f"{kind}_{factor}_{expert}", parameter)
        self._changed()

    def layout(self, state: GateState) -> tuple[Ranks, list[str], list[str]]:
        """What the ranks of the experts that take part are, and the names of their factors A and B, each once."""
        key, known = (state.experts, state.active), self._layout
        if known is None or known[0] != key:
            device, of, pairs = self.weight.device, self.ranks, self._pairs(state)
            each = [e for _, e in pairs for _ in range(of[e])]
            place = torch.tensor([state.experts.index(e) for e in each], device=device)
            scaling = torch.tensor([self.scalings[e] for e in each], device=device)
            rows, spread = self._once({f"{kind}_A_{e}": of[e] for kind, e in pairs})
            columns, gather = self._once({f"{kind}_B_{e}": of[e] for kind, e in pairs})
            spread = None if spread is None else spread.to(device)
            gather = None if gather is None else gather.t().to(device)
            ranks = Ranks(place=place, scaling=scaling, spread=spread, gather=gather)
            known = self._layout = key, ranks, rows, columns
        return known[1:]

    def _once(self, ranks: dict[str, int]) -> tuple[list[str], Tensor | None]:
        """The names of the different factors among some, and [rows, rank] of zeros and ones from these to each rank;
        None where all differ."""
        held, start, row_of = dict[str, tuple[str, int]](), 0, list[int]()
        for name, rank in ranks.items():
            leader = self._leaders.get(name, name)
            if leader not in held:
                held[leader], start = (name, start), start + rank
            row_of += range(held[leader][1], held[leader][1] + rank)
        names = [name for name, _ in held.values()]
        spread = F.one_hot(torch.tensor(row_of), start).t().float() if len(names) < len(ranks) else None
        return names, spread

    def _changed(self) -> None:
        """Note anew which factors are the same as an earlier one."""
        self._layout, first = None, dict[int, str]()
        for name in (name for expert in self.scalings for name in self._names(expert)):
            first.setdefault(id(self._parameters[name]), name)
        names = [name for name, parameter in self._parameters.items() if id(parameter) in first]
        self._leaders = {n: f for n in names if (f := first[id(self._parameters[n])]) != n}

    def extra_repr(self) -> str:
        return f"site={self.name}, ranks={self.ranks}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "ExpertLinear":
        self._layout = None  # the device may change
        self.context.forget()
        return super()._apply(fn, recurse)

    def _state(self) -> GateState | None:
        """None where no expert of this site takes part."""
        if not self.scalings or not self.context.enabled:
            return None
        state = self.context.state
        if state is None:
            raise ValueError(
                f"{self.name}: its experts {list(self.scalings)} have no gates; call "
                "bank.set_gates(...) first, or run inside bank.context.disabled()"
            )
        return state if state.active is None or not state.active.isdisjoint(self.scalings) else None

    def _measure(self, x: Tensor, state: GateState, watch: Watch) -> None:
        """The energies [*lead, expert] that all experts, whatever their gates, add to this input; 0 for one that is not
        at this site."""
        if not watch.gradient and not state.recording:
            return
        # With a gradient also where checkpointing runs the layer again, which must save the same tensors.
        with torch.set_grad_enabled(watch.gradient and torch.is_grad_enabled()):
            wholes = [self.whole(expert) for expert in self.scalings]
            factors = [a for a, _ in wholes], [b for _, b in wholes]
            found = output_energies(x, *factors, [*self.scalings.values()])
            own = dict(zip(self.scalings, found.unbind(-1), strict=True))
            energies = torch.stack([own.get(e, torch.zeros_like(found[..., 0])) for e in state.experts], -1)
        if state.recording:
            watch.found[self.name] = energies

    def _penalise(self, x: Tensor, state: GateState) -> None:
        """The losses on experts of this site, where training asks for them."""
        watch = state.watch
        if watch is None or not watch.penalties or not torch.is_grad_enabled():
            return
        tasks, rows = watch.tasks_at(state.streams[self.name], x), x.detach().flatten(0, -2)
        for name in watch.penalties:
            chosen = [e for e in self.scalings if e in watch.routed or name not in PAIRED]
            if name not in LINEAR:  # a shared A once
                chosen = [*{id(self._parameters[f"lora_A_{e}"]): e for e in chosen}.values()]
            if len(chosen) < (2 if name in PAIRED else 1):
                continue
            pairs = [self.whole(e) if name in LINEAR else (self.lora_A[e], self.lora_B[e]) for e in chosen]
            with torch.autocast(x.device.type, enabled=False):
                a, b = ([factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in own]
                        for own in zip(*pairs, strict=True))  # fmt: skip
                value = PENALTIES[name](a, b, [F.linear(rows.to(own.dtype), own) for own in a], tasks)
            if state.recording:  # checkpointing runs the layer again, which must save the same tensors
                watch.values.setdefault(name, []).append(value)

    def _gates(self, x: Tensor, state: GateState) -> Tensor:
        attends = self.token_key is not None and state.gates is None
        features, router = self._attention(x) if attends else (x, self._router(state))
        return state.gates_at(self.name, features, router, self.routed, self.depth)

    def _attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's query [*lead, width] and the keys of the experts' answers to it [*lead, expert, width]; with
        banks 1, and a key of one number by the row of its bank."""
        query, key, routed = self.token_query, self.token_key, self.routed
        keys: list[Tensor] = []
        assert key is not None and routed is not None
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            for place, expert in enumerate(routed.compared):
                a, b = (factor.float() for factor in self.whole(expert))
                own = key[routed.banks[place]][None] if routed.banks else key
                hidden = self.activate(F.linear(x, a), [len(a)])
                keys.append(F.linear(hidden, self.scalings[expert] * (own.float() @ b)))
            ones = x.new_ones(*x.shape[:-1], 1)
            return ones if query is None else F.linear(x, query.float()), torch.stack(keys, dim=-2)

    def activate(self, hidden: Tensor, ranks: Sequence[int]) -> Tensor:
        """What is between A and B, of experts with these ranks."""
        return hidden

    def _router(self, state: GateState) -> Tensor | None:
        """What decides for tokens here: the learned router, those of all tasks, or one that is computed from the
        experts, once for all steps of a generation."""
        if self.task_router is not None:
            return self.task_router.flatten(0, 1)
        if self.token_router is not None and self.token_noise is not None:
            return torch.cat([self.token_router, self.token_noise])
        routed, key = self.routed, f"arrow/{self.name}"
        if state.gates is not None or routed is None or not routed.compared or routed.leader != self.name:
            return self.token_router
        if key not in state.prepared:
            a, b = zip(*map(self.whole, routed.compared), strict=True)
            state.prepared[key] = directions(a, b)
        found: Tensor = state.prepared[key]
        return found

    def _with_cores(self, state: GateState) -> Ranks:
        """What the ranks are, with the cores of experts in S, so that it gives core A x."""
        ranks, of = self.layout(state)[0], self.ranks
        if not any(own.kind == "core" for own in self.ranked.values()):
            return ranks
        blocks: list[Tensor] = []
        for _, expert in self._pairs(state):
            own, core = self.ranked.get(expert, RankGates()), self.learned_rank_gates(expert)
            one = torch.eye(of[expert], device=self.weight.device)
            blocks.append(one if core is None or own.kind != "core" else core.t())
        cores = torch.block_diag(*blocks)
        return replace(ranks, spread=cores if ranks.spread is None else ranks.spread.to(cores) @ cores)

    def _rank_gates(self, x: Tensor, state: GateState, dtype: torch.dtype) -> Tensor:
        ranks, own = self.layout(state)[0], self._own_rank_gates(x, state)
        wide = widen(self._gates(x, state), ranks.place, ranks.scaling)
        return (wide if own is None else wide * own).to(dtype)

    def _own_rank_gates(self, x: Tensor, state: GateState, drop: bool = False) -> Tensor | None:
        """What the gate of each rank is multiplied by, [*lead or 1, rank]; None where no expert has such gates."""
        if not self.ranked:
            return None
        found, of = dict[str, Tensor](), self.ranks
        for expert in self._running(state):
            own, learned = self.ranked.get(expert, RankGates()), self.learned_rank_gates(expert)
            if own.kind == "task" and learned is not None:
                found[expert] = state.tasks_at(self.name, x) @ learned
            elif own.kind == "token" and learned is not None:
                found[expert] = token_rank_gates(x, learned, own.keep)
            if drop and own.dropout:
                ones = x.new_ones(*x.shape[:-1], of[expert], dtype=torch.float32)
                found[expert] = found.get(expert, 1.0) * F.dropout(ones, own.dropout)
        order = [(expert, of[expert]) for _, expert in self._pairs(state)]  # a start has the gates of its expert
        return side_by_side(found, order, next(iter(found.values()))) if found else None

    def _prepared(self, x: Tensor, state: GateState, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Rank gates, A [rank, in] and B^T [rank, out], kept in the state until the next gates."""
        kept = state.prepared.get(self.name)
        if kept is None or not kept.fits(x, dtype):
            a, b = concatenate(*self._factors(state), dtype)
            by_token = state.gates is None and state.pooling is None
            by_token = by_token or any(own.kind == "token" for own in self.ranked.values())
            gates = None if by_token else self._rank_gates(x, state, dtype)
            kept = Prepared(shape=(x.shape[0], x.ndim), gates=gates, a=a, b_t=b.t())
            state.prepared[self.name] = kept
        gates = self._rank_gates(x, state, dtype) if kept.gates is None else kept.gates
        return gates, kept.a, kept.b_t

    def _running(self, state: GateState) -> list[str]:
        active = state.active
        return [e for e in self.scalings if active is None or e in active]

    def _pairs(self, state: GateState) -> list[tuple[str, str]]:
        running = self._running(state)
        return [("lora", e) for e in running] + [("start", e) for e in running if e in self.starts]

    def _factors(self, state: GateState) -> tuple[list[Tensor], list[Tensor]]:
        _, names_a, names_b = self.layout(state)
        parameters: Any = self._parameters  # getattr would search for each of them
        masks = {name: self._buffers.get(f"mask_{name}") for name in names_b}
        factors_b = [parameters[name] if mask is None else parameters[name] * mask for name, mask in masks.items()]
        return [parameters[name] for name in names_a], factors_b
