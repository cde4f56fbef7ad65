"""Which experts the router chooses among, and how the gates of the others follow from its choice.

    gate          the expert's gate                                          chosen by the router
    routed        the router's                                               yes
    joint         the router's; exempt from top-k and balancing              yes
    always        1                                                          no
    confidence    1 - m, where m is the largest gate of the router's choice,
                  and every gate of that choice is multiplied by m           no
    rest          1 - the sum of the router's choice                         no
    with:NAME     that of the expert NAME                                    no

`always` is a shared expert (DeepSeekMoE, arXiv 2401.06066), `rest` the universal expert of MoCLE (arXiv 2312.12379),
whose choice is one expert at its share of the softmax, `confidence` the same beside a soft choice, `joint` the shared
expert of ASE (arXiv 2510.00570). A sample that is meant for an expert without a choice gets no routed one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Bool, Float, Int

from moa.routing.late import Tensor, torch

GATES = ("routed", "joint", "always", "confidence", "rest")  # and with:NAME
LEFT_OVER = ("confidence", "rest")  # 0 where one gate is 1
CHOSEN = ("routed", "joint")
WITH = "with:"
NONE = "none"  # where a sample names its expert: the base alone, with router.null_expert


def check_roles(gates: Mapping[str, str]) -> tuple[str, str] | None:
    """The expert and the rule that its gate breaks; None where all are right."""
    for name, gate in gates.items():
        other = gate.removeprefix(WITH)
        if gate in GATES:
            continue
        if other == gate:
            return name, f"must be one of {', '.join(GATES)} or {WITH}NAME, got {gate!r}"
        if other not in gates:
            return name, f"no such expert {other!r}; choices: {[n for n in gates if n != name]}"
        if other == name:
            return name, f"an expert has no gate of its own to copy; choices: {', '.join(GATES)}"
        if gates[other].startswith(WITH):
            return name, f"{other} has the gate {gates[other]} itself; name that expert"
    return None


@dataclass(frozen=True)
class Roles:
    """The gate of each expert of a bank, in its order; `experts` are names, `gates` as in the table above."""

    experts: tuple[str, ...]
    gates: tuple[str, ...]

    @cached_property
    def choices(self) -> tuple[int, ...]:
        return tuple(place for place, gate in enumerate(self.gates) if gate in CHOSEN)

    @cached_property
    def joint(self) -> tuple[bool, ...]:
        return tuple(self.gates[place] == "joint" for place in self.choices)

    def named(self, gate: str) -> list[str]:
        """The experts with this gate."""
        return [name for name, own in zip(self.experts, self.gates, strict=True) if own == gate]

    @property
    def all_routed(self) -> bool:
        return all(gate == "routed" for gate in self.gates)

    @cached_property
    def columns(self) -> list[int]:
        """Of each expert, the column of [choices, 1, 1 - m, 1 - sum] that its gate is."""
        count = len(self.choices)
        fixed = {"always": count, "confidence": count + 1, "rest": count + 2}
        own = [fixed.get(gate, -1) for gate in self.gates]
        for column, place in enumerate(self.choices):
            own[place] = column
        return [
            own[self.experts.index(gate.removeprefix(WITH))] if gate.startswith(WITH) else column
            for gate, column in zip(self.gates, own, strict=True)
        ]

    def assemble(self, chosen: Float[Tensor, "*lead choice"]) -> Float[Tensor, "*lead expert"]:
        """The gates of all experts from those of the choices."""
        if self.all_routed:
            return chosen
        one = chosen.new_ones(*chosen.shape[:-1], 1)
        doubt, rest = torch.zeros_like(one), 1 - chosen.sum(-1, keepdim=True)
        if "confidence" in self.gates:
            largest = chosen.amax(-1, keepdim=True)
            chosen, doubt = chosen * largest, 1 - largest
        wide = torch.cat([chosen, one, doubt, rest], dim=-1)
        return wide.index_select(-1, torch.tensor(self.columns, device=chosen.device))

    def choice_ids(self, expert_ids: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Places among the choices: unknown stays -1; an expert without a choice, and no expert, are the number of
        choices."""
        if self.all_routed:
            return expert_ids
        count = len(self.choices)
        places = [column if column < count else count for column in self.columns]
        table = torch.tensor([*places, count, -1], device=expert_ids.device)
        return table[expert_ids]

    def among_choices(self, of_experts: Bool[Tensor, "*lead expert"]) -> Bool[Tensor, "*lead choice"]:
        return of_experts if self.all_routed else of_experts[..., list(self.choices)]
