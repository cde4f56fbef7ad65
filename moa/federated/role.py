"""A row of the table of roles: who trains and sends which pieces, and what the server makes of them. No tensors."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CLIENTS = ("all", "owners")  # and has:MODALITY, task:NAME
WEIGHTS = ("samples_of_role", "samples", "answer_tokens", "gate_mass", "uniform")
SCOPES = ("global", "per_task", "per_group", "per_client")
TRANSFER = {"own": (0, 1), "nearest": (1, 2**20)}
ELSEWHERE = ("trainable", "frozen", "absent")


@dataclass(frozen=True, kw_only=True)
class Role:
    """A row of the table of roles. `rule` and `server` are rows of `moa.federated.rules`.

    `keep` is a role that never leaves its client. `elsewhere` is what it is at a client that does not contribute.
    """

    name: str
    match: tuple[str, ...]
    clients: str = "all"
    weight: str = "samples_of_role"
    rule: str = "mean"
    server: str = "none"
    scope: str = "global"
    keep: bool = False
    elsewhere: str = "trainable"
    clip: float | int | None = None  # the largest norm of a client's change of the role
    into: str = ""  # with the rules carry and stack, the frozen expert that they add to
    options: Mapping[str, Any] = field(default_factory=dict)  # of the rule
    server_options: Mapping[str, float | int] = field(default_factory=dict)
    # with scope per_client: the share `own` of its own value that a client gets, the rest of the `nearest` others'
    transfer: Mapping[str, float | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        closed = {"weight": WEIGHTS, "scope": SCOPES, "elsewhere": ELSEWHERE}
        for key, choices in closed.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"roles.{self.name}.{key}: must be one of {choices}, got {getattr(self, key)!r}")
        if self.clients not in CLIENTS and not re.fullmatch(r"(has|task):.+", self.clients):
            choices = (*CLIENTS, "has:MODALITY", "task:NAME")
            raise ValueError(f"roles.{self.name}.clients: must be one of {choices}, got {self.clients!r}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"roles.{self.name}.clip: must be more than 0, got {self.clip}")
        where = f"roles.{self.name}.transfer"
        if self.transfer and (self.scope != "per_client" or self.keep):
            raise ValueError(f"{where}: mixes what clients send of a role with scope per_client, got {self.scope}")
        for key, value in self.transfer.items():
            least, most = TRANSFER.get(key, (1, 0))
            if not least <= value <= most or (key == "nearest" and value % 1):
                rule = f"has {', '.join(f'{name} in {low}..{high:.4g}' for name, (low, high) in TRANSFER.items())}"
                raise ValueError(f"{where}: {rule}, nearest a whole number; got {key}={value}")
        if not self.match:
            raise ValueError(f"roles.{self.name}.match: is empty")

    def contributes(self, *, tasks: Sequence[str] = (), modalities: Sequence[str] = (), count: float | int = 0) -> bool:
        """Whether a client with these tasks, modalities and samples of the role trains and sends it."""
        kind, _, name = self.clients.partition(":")
        allowed = {"has": name in modalities, "task": name in tasks, "owners": count > 0, "all": True}
        return not self.keep and allowed[kind]
