"""Evidence -> gates: a kind of router with its settings, held by every mixture.

evidence -> router -> logits over temperature -> kind -> gates of the choices -> roles -> gates of all experts

The router chooses among the routed experts; `Roles` gives the gates of those that are shared.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moa.routing.gating import apply_availability, draw_noise, one_hot_gates, straight_through
from moa.routing.kinds import KINDS
from moa.routing.losses import gate_losses
from moa.routing.roles import Roles
from moa.routing.router import NEVER, Evidence
from moa.routing.schedule import GateDraws
from moa.routing.scores import SCORES, linear


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Gates [batch, site or 1, expert], and what a learned router decided them from, once or for each site.

    `logits` are divided by the temperature already; `probs` are the gates before top-k, summing to
    one. The choices are the router's experts, and last the null expert where there is one. Gates and probabilities
    are None where tokens are routed one by one, inside the model, and logits where these alone decide.
    """

    gates: Float[Tensor, "batch site expert"] | None = None
    logits: Float[Tensor, "batch decision choice"] | None = None
    probs: Float[Tensor, "batch decision choice"] | None = None


class Routing(nn.Module):
    """Decides the gates of each sample by itself, from the prompt side alone.

    kind: a row of moa/routing/kinds.py, with its `router` where it has one. roles: of the bank's experts. weights: of
    kind fixed, for each choice, uniform by default.
    granularity "token": token routers decide at the sites, and `router` is None; with a `pool` the tokens of a prompt
    together, see moa/experts/token_routers.py. "both": the logits of `router` take part at the sites. null_expert: one
    choice more, which adds nothing to the backbone, so that a sample's gates may sum to less than one. noise: a name
    of `NOISES`, of scale `noise_scale`. top_p, threshold, normalize, renormalize, straight_through, bias_rate: see
    moa/routing/gating.py. unknown_task: what samples get that name a task outside of the run's. added_up: for each
    site whether all choices have the gate 1 there. banks: of granularity "both", the bank of each choice; samples
    choose in each bank by itself, and tokens between banks.
    """

    weights: Tensor
    joint: Tensor | None
    added_up: Tensor | None

    def __init__(
        self,
        router: nn.Module | None = None,
        *,
        roles: Roles,
        kind: str = "softmax",
        top_k: int = 2,
        null_expert: bool = False,
        temperature: float | int = 1.0,
        granularity: str = "sample",
        pool: str = "none",
        weights: Sequence[float] | None = None,
        top_p: float | int | None = None,
        threshold: float | int | None = None,
        normalize: bool = False,
        renormalize: bool = True,
        noise: str | None = None,
        noise_scale: float | int | None = None,
        straight_through: bool = False,
        score: str = "linear",
        bias_rate: float | int | None = None,
        unknown_task: str = "route",
        added_up: Sequence[bool] | None = None,
        banks: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.options = {"top_k": top_k, "top_p": top_p, "threshold": threshold}
        self.options |= {"normalize": normalize, "renormalize": renormalize}
        self.noise, self.noise_scale = noise, 1.0 if noise_scale is None else noise_scale
        self.straight_through, self.score = straight_through, SCORES.get(score, linear)
        self.bias_rate, self.banks = bias_rate or 0.0, tuple(banks)
        self.unknown_task = unknown_task
        self.learned_threshold = KINDS[kind].learned_threshold and threshold is None
        self.kind, self.granularity, self.null_expert = KINDS[kind], granularity, null_expert
        self.router, self.top_k, self.temperature, self.pool = router, top_k, temperature, pool
        wanted = self.kind.router is not None and granularity != "token"
        if wanted != (router is not None):
            needs = "needs a router" if wanted else "has no router"
            raise ValueError(f"router.kind {kind} with granularity {granularity} {needs}")
        self.roles, count = roles, len(roles.choices)
        uniform = [1.0 / max(count, 1)] * count
        self.register_buffer("weights", torch.tensor(weights or uniform), persistent=False)
        joint = torch.tensor(roles.joint) if any(roles.joint) else None
        self.register_buffer("joint", joint, persistent=False)
        everyone = torch.tensor(added_up) if added_up is not None and any(added_up) else None
        self.register_buffer("added_up", everyone, persistent=False)

    @property
    def evidence(self) -> tuple[str, ...]:
        return getattr(self.router, "evidence", ())

    def override(self, gates: Tensor, available: Tensor | None = None) -> Gates:
        """Gates [batch, expert] or [batch, site or 1, expert] from elsewhere, where experts are available."""
        gates = (gates if gates.dim() == 3 else gates[:, None]).float()
        if available is None:
            return Gates(gates=gates)
        rows, choices = _rows(available, gates), list(self.roles.choices)
        chosen = apply_availability(gates[..., choices], rows[..., choices])
        gates = gates * rows
        gates[..., choices] = chosen
        return Gates(gates=gates)

    def oracle(
        self, expert_ids: Int[Tensor, " batch"], draws: GateDraws | None = None
    ) -> Float[Tensor, "batch 1 expert"]:
        """The gates of samples that are meant for these experts: -1 is uniform, the number of experts is none."""
        ids = self.roles.choice_ids(expert_ids)
        chosen = one_hot_gates(ids, len(self.roles.choices), self.joint)[:, None]
        if draws is not None:  # which bring samples that are meant for no expert to none either
            chosen = draws.apply(chosen) * (expert_ids != len(self.roles.gates))[:, None, None]
        return self.roles.assemble(chosen)

    def decide(
        self,
        evidence: Evidence,
        expert_ids: Int[Tensor, " batch"],
        *,
        withhold: Collection[str] = (),
        available: Tensor | None = None,
        draws: GateDraws | None = None,
    ) -> Gates:
        """The gates of a batch; see `MixtureModel.compute_gates`. None where tokens are routed one by one."""
        if self.granularity != "sample":
            if available is not None:
                raise ValueError("available: token routing uses all experts; give gates instead")
            logits = None if self.router is None else self.router(evidence, withhold) / self.temperature
            return Gates(logits=logits if logits is None or not self.banks else self._in_banks(logits))
        rows = None if available is None else _rows(available, self.weights)
        more: dict[str, Any] = {}
        logits, mask = None, None if rows is None else self.roles.among_choices(rows)
        if self.router is not None:
            logits, more = self._split(self.router(evidence, withhold), 1.0)
            logits = logits / self.temperature
            mask = None if mask is None else mask.expand_as(logits)
            if self.null_expert:  # of logit 0, without a parameter: softmax reads differences alone
                logits = F.pad(logits, (0, 1))
                mask = None if mask is None else F.pad(mask, (0, 1), value=True)
        more["draw"] = self.training
        chosen, probs = self._gates(logits, mask, self.roles.choice_ids(expert_ids), **more)
        chosen = chosen[..., :-1] if self.null_expert else chosen
        chosen = chosen if draws is None else draws.apply(chosen)
        if self.added_up is not None:
            chosen = torch.where(self.added_up[:, None], torch.ones_like(chosen), chosen)
        gates = self.roles.assemble(chosen)
        if self.unknown_task != "route" and "task" not in withhold:
            gates = self._of_unknown_tasks(gates, evidence, None if rows is None else self.roles.among_choices(rows))
        return Gates(gates=gates if rows is None else gates * rows, logits=logits, probs=probs)

    def _in_banks(self, logits: Float[Tensor, "batch 1 choice"]) -> Float[Tensor, "batch 1 choice"]:
        """The logarithm of each choice's gate, decided in its bank alone; `NEVER` for a gate of 0."""
        found = torch.full_like(logits, NEVER)
        for bank in range(max(self.banks) + 1):
            own = tuple(choice for choice, number in enumerate(self.banks) if number == bank)
            gates = self._gates(logits[..., own], choices=own, draw=self.training)[0]
            logs = torch.where(gates > 0, gates.clamp(min=torch.finfo(gates.dtype).tiny).log(), NEVER)
            found = found.index_copy(-1, torch.tensor(own, device=logits.device), logs)
        return found

    def _of_unknown_tasks(
        self, gates: Float[Tensor, "batch site expert"], evidence: Evidence, available: Tensor | None
    ) -> Float[Tensor, "batch site expert"]:
        """Those of `unknown_task`, at every site, in the place of a sample's whose task is none of the run's."""
        ids: Any = evidence.task_ids
        alike = gates.new_ones(1, 1, len(self.roles.choices)) if available is None else available.to(gates)
        alike = self.roles.assemble(alike / alike.sum(-1, keepdim=True).clamp(min=1))
        alike = alike if self.unknown_task == "mean" else torch.zeros_like(gates)
        return torch.where((ids < -1)[:, None, None], alike, gates)

    def targets(self, expert_ids: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The choice that each sample is meant to get, -1 where it has none: unknown, or of a shared expert alone."""
        ids = self.roles.choice_ids(expert_ids)
        return ids if self.null_expert else ids.masked_fill(ids == len(self.roles.choices), -1)

    def token_logits(
        self, features: Float[Tensor, "*lead width"], weight: Float[Tensor, "*_ column width"]
    ) -> Float[Tensor, "*lead column"]:
        """What a token router gives, before the temperature: the scores, and linear what else it learns: a threshold,
        the scales of its noise."""
        count = self._num_choices(weight.shape[-2])
        if count == weight.shape[-2]:
            return self.score(features, weight)
        return torch.cat([self.score(features, weight[:count]), F.linear(features, weight[count:])], dim=-1)

    def _num_choices(self, columns: int) -> int:
        """Of what a router gives: a logit for each choice, then a threshold, then a scale for each choice."""
        rest = columns - self.learned_threshold
        return rest // 2 if self.noise == "learned" else rest

    def token_gates(
        self,
        logits: Float[Tensor, "*lead column"],
        choices: tuple[int, ...] | None = None,
        *,
        draw: bool = False,
        bias: Float[Tensor, "*#lead choice"] | None = None,
    ) -> Float[Tensor, "*lead expert"]:
        """The gates of tokens by their logits, which are divided by the temperature; with the noise of training
        where asked for: checkpointing brings the random stream back, so that a layer draws the same twice.

        `choices` are the places of the logits among all choices; the others are not at the site, and get 0.
        """
        if choices == ():
            return self.roles.assemble(logits.new_zeros(*logits.shape[:-1], len(self.roles.choices)))
        chosen = self.token_choice(logits, choices, draw=draw, bias=bias)
        if choices is not None:
            everyone = chosen.new_zeros(*chosen.shape[:-1], len(self.roles.choices))
            chosen = everyone.index_copy(-1, torch.tensor(choices, device=chosen.device), chosen)
        return self.roles.assemble(chosen)

    def token_choice(
        self, logits: Tensor, choices: tuple[int, ...] | None = None, *, draw: bool = False, bias: Tensor | None = None
    ) -> Float[Tensor, "*lead choice"]:
        """The same of the choices at the site alone."""
        logits, more = self._split(logits, self.temperature)
        if self.banks:  # these are decided already
            return logits.exp()
        return self._gates(logits, **more, choices=choices, draw=draw and self.training, bias=bias)[0]

    def token_losses(
        self,
        logits: Float[Tensor, "site token column"],
        expert_ids: Int[Tensor, " token"],
        task_ids: Int[Tensor, " token"],
        mask: Bool[Tensor, " token"],
        choices: tuple[int, ...] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """The losses on the decisions of tokens, at sites with these choices; empty where none of them is routed."""
        logits, more = self._split(logits, self.temperature)
        probs = logits.exp() if self.banks else self._gates(logits, **more, choices=choices)[1]
        assert probs is not None  # kinds that route tokens have logits
        return self._losses(logits, probs, expert_ids, task_ids, mask, choices)

    def losses(
        self, decided: Sequence[Gates], expert_ids: Int[Tensor, " _"], task_ids: Int[Tensor, " _"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The losses on decisions, row after row; empty where no gradient could follow them."""
        if self.kind.learns != "gradient" or any(d.logits is None for d in decided):
            return {}
        logits, probs = (torch.cat([getattr(d, name) for d in decided]).transpose(0, 1) for name in ("logits", "probs"))
        return self._losses(logits, probs, expert_ids, task_ids)

    def _losses(
        self,
        logits: Tensor,
        probs: Tensor,
        expert_ids: Tensor,
        task_ids: Tensor,
        mask: Tensor | None = None,
        choices: tuple[int, ...] | None = None,
    ) -> dict[str, Tensor]:
        """Of routed experts alone: a joint one is meant to be used by all samples."""
        ids, number = self.targets(expert_ids), len(self.roles.choices)
        own = range(number) if choices is None else choices
        counted = [column for column, place in enumerate(own) if not self.roles.joint[place]]
        if not counted and choices is not None:
            return {}
        if len(counted) < number:
            null = [logits.shape[-1] - 1] if self.null_expert else []
            logits, probs = logits[..., counted + null], probs[..., counted + null]
            probs = probs / probs.sum(-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)
            known = torch.tensor([*(own[column] for column in counted), *(number for _ in null)], device=ids.device)
            places = torch.full((number + 2,), -1, device=ids.device)
            places[known] = torch.arange(len(known), device=ids.device)
            ids = places[ids]  # -1 is the last place, which stays -1
        top_k = min(self.top_k, logits.shape[-1]) if "top_k" in self.kind.options else None
        spread = self.noise_scale / self.temperature if self.noise == "gaussian" else None
        return gate_losses(logits, probs, ids, task_ids, top_k=top_k, mask=mask, spread=spread)

    def _split(self, columns: Tensor, times: float | int) -> tuple[Tensor, dict[str, Any]]:
        """A router's output -> the logits, and what it learns beside them, `times` a factor."""
        more: dict[str, Any] = {}
        if self.noise == "learned":
            count = self._num_choices(columns.shape[-1])
            columns, scale = columns[..., :-count], columns[..., -count:]
            more["scale"] = F.softplus(scale * times)
        if self.learned_threshold:
            columns, raised = columns[..., :-1], columns[..., -1:]
            more["raised"] = raised * times
        return columns, more

    def _gates(
        self,
        logits: Tensor | None,
        mask: Tensor | None = None,
        expert_ids: Any = None,
        *,
        raised: Tensor | None = None,
        scale: Tensor | float | None = None,
        choices: tuple[int, ...] | None = None,
        draw: bool = False,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Gates with the noise that is drawn, and probabilities without."""
        joint = self.joint if self.joint is None or not self.null_expert else F.pad(self.joint, (0, 1))
        top_k = self.top_k
        if choices is not None:
            joint = None if joint is None else joint[list(choices)]
            top_k = max(1, min(top_k, sum(not self.roles.joint[place] for place in choices)))
        own: dict[str, Any] = {"mask": mask, "expert_ids": expert_ids, "weights": self.weights, "joint": joint}
        own |= {"raised": raised, "bias": bias, **self.options, "top_k": top_k}
        gates, probs = self.kind.gates(logits=logits, **own)
        soft = probs
        if draw and self.noise is not None and logits is not None:
            size = (self.noise_scale if scale is None else scale) / self.temperature
            noise = draw_noise(self.noise, logits[..., : logits.shape[-1] - self.null_expert]) * size
            noise = F.pad(noise, (0, 1)) if self.null_expert else noise
            gates, soft = self.kind.gates(logits=logits + noise, **own)
        if self.straight_through and soft is not None:
            gates = straight_through(gates, soft)
        return gates, probs


def _rows(available: Bool[Tensor, "*batch expert"], like: Tensor) -> Bool[Tensor, "_ 1 expert"]:
    """[expert] or [batch, expert] -> broadcastable to [batch, site, expert]."""
    return (available[None, None] if available.dim() == 1 else available[:, None]).to(like.device)
