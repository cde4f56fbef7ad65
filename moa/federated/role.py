"""A row of the table of roles: who trains and sends which pieces, and what the server makes of them. No tensors."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moa.cli.ranges import Positive, check

CLIENTS = ("all", "owners")  # and has:MODALITY, task:NAME
WEIGHTS = ("samples_of_role", "samples", "answer_tokens", "gate_mass", "uniform")
SCOPES = ("global", "per_task", "per_group", "per_client")
TRANSFER = {"own": (0, 1), "nearest": (1, 2**20)}
STREAMED = ("mean", "sum")  # rules that read no single client
ELSEWHERE = ("trainable", "frozen", "absent")


@dataclass(frozen=True, kw_only=True)
class Role:
    """A row of the table of roles. `rule` and `server` are rows of `moa.federated.rules`.

    `keep` is a role that never leaves its client. `elsewhere` is what it is at a client that does not contribute.
    """

    name: str
    match: list[str]
    clients: str = "all"
    weight: str = "samples_of_role"
    rule: str = "mean"
    server: str = "none"
    scope: str = "global"
    keep: bool = False
    elsewhere: str = "trainable"
    clip: Positive | None = None  # the largest norm of a client's change of the role
    into: str = ""  # with the rules carry and stack, the frozen expert that they add to
    options: dict[str, Any] = field(default_factory=dict)  # of the rule
    server_options: dict[str, float] = field(default_factory=dict)
    # with scope per_client: the share `own` of its own value that a client gets, the rest of the `nearest` others'
    transfer: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, choices in {"weight": WEIGHTS, "scope": SCOPES, "elsewhere": ELSEWHERE}.items():
            value = getattr(self, key)
            check(value in choices, key, f"must be one of {choices}, got {value!r}")
        known = self.clients in CLIENTS or re.fullmatch(r"(has|task):.+", self.clients)
        choices = (*CLIENTS, "has:MODALITY", "task:NAME")
        check(bool(known), "clients", f"must be one of {choices}, got {self.clients!r}")
        rule = f"mixes what clients send of a role with scope per_client, got {self.scope}"
        check(not self.transfer or (self.scope == "per_client" and not self.keep), "transfer", rule)
        ends = ", ".join(f"{name} in {low}..{high:.4g}" for name, (low, high) in TRANSFER.items())
        for key, value in self.transfer.items():
            least, most = TRANSFER.get(key, (1, 0))
            fits = least <= value <= most and not (key == "nearest" and value % 1)
            check(fits, "transfer", f"has {ends}, nearest a whole number; got {key}={value}")
        check(bool(self.match), "match", "is empty")

    def contributes(self, *, tasks: Sequence[str] = (), modalities: Sequence[str] = (), count: float | int = 0) -> bool:
        """Whether a client with these tasks, modalities and samples of the role trains and sends it."""
        kind, _, name = self.clients.partition(":")
        allowed = {"has": name in modalities, "task": name in tasks, "owners": count > 0, "all": True}
        return not self.keep and allowed[kind]
