"""What training does to the gates of a stage, so that experts see more data than their own and merge well.

    leak      every gate is spread over all choices by that share: each expert sees all data a little
    dropout   a sample has no routed expert at all: shared experts learn to do without
    expert_dropout    each expert of a sample is left out by that chance, and the others share its gate
    blend     a sample has the gates of a merge: r of them, and 1 - r of its own, with r = 1 in half of these samples
              and uniform in (0, 1) in the others

The draws are one stream of random numbers on the CPU, the same on every device.
"""

from dataclasses import dataclass, fields
from typing import Literal

from jaxtyping import Float

from moa.cli.ranges import Share, ShareBelowOne
from moa.routing.late import Tensor, torch

TARGETS = {"mean": lambda count: 1.0 / count, "sum": lambda count: 1.0}


@dataclass(frozen=True, kw_only=True)
class GateSchedule:
    """`NAME_end` is a share's value at the last step of the stage, linear between."""

    leak: ShareBelowOne = 0.0  # of a stage that trains experts: share of every gate that all experts get alike
    leak_end: ShareBelowOne | None = None  # at the last step, linear between; null: as at the first
    dropout: ShareBelowOne = 0.0  # chance that all routed gates of a sample are 0; shared experts stay on
    dropout_end: ShareBelowOne | None = None  # at the last step, linear between; null: as at the first
    # chance that an expert is left out for a sample, whose other experts share its gate
    expert_dropout: ShareBelowOne = 0.0
    blend: Share = 0.0  # chance that a sample's gates are those of a merge, or between these and its own
    blend_end: Share | None = None  # at the last step, linear between; null: as at the first
    # of that merge: mean, 1/N each, or sum, 1 each
    blend_to: Literal["mean", "sum"] = "mean"

    @property
    def is_empty(self) -> bool:
        return not any(getattr(self, f.name) for f in fields(self) if f.name != "blend_to")

    def at(self, progress: float) -> dict[str, float]:
        """The shares where `progress`, from 0 to 1, of the stage is done."""
        found = {}
        for name in ("leak", "dropout", "blend"):
            start, end = getattr(self, name), getattr(self, f"{name}_end")
            found[name] = start if end is None else start + (end - start) * progress
        return found


@dataclass(frozen=True, kw_only=True)
class GateDraws:
    leak: float
    keep: Float[Tensor, " batch"]  # 0 where routed gates are dropped
    share: Float[Tensor, " batch"]  # of the merge's gates in the sample's
    blend_to: str
    left: Float[Tensor, "batch choice"] | None = None  # 0 where an expert is left out, at least one is not; None: all

    def apply(self, gates: Float[Tensor, "batch site choice"]) -> Float[Tensor, "batch site choice"]:
        """keep * ((1 - share) * leaked + share * target), where leaked = (1 - leak) * gates + leak / choices."""
        count = gates.shape[-1]
        keep, share = (draw.to(gates.device)[:, None, None] for draw in (self.keep, self.share))
        leaked = (1 - self.leak) * gates + self.leak / count
        mixed = (1 - share) * leaked + share * TARGETS[self.blend_to](count)
        if self.left is not None:
            left = mixed * self.left.to(gates.device)[:, None]
            rest = left.sum(-1, keepdim=True)  # 0 where no gate is left: then nothing is left out
            left = left * (mixed.sum(-1, keepdim=True) / rest.where(rest > 0, 1.0))
            mixed = left.where(rest > 0, mixed)
        return keep * mixed


def draw_gates(schedule: GateSchedule, progress: float, num_samples: int, num_choices: int = 0) -> GateDraws | None:
    """Draws for a batch; None, and nothing drawn, for an empty schedule."""
    if schedule.is_empty:
        return None
    shares = schedule.at(progress)
    dropped, blended, whole, part = torch.rand(4, num_samples)
    share = torch.where(whole < 0.5, torch.ones_like(part), part) * (blended < shares["blend"])
    keep = (dropped >= shares["dropout"]).float()
    left = None
    if schedule.expert_dropout:
        left = (torch.rand(num_samples, num_choices) >= schedule.expert_dropout).float()
    return GateDraws(leak=shares["leak"], keep=keep, share=share, blend_to=schedule.blend_to, left=left)
