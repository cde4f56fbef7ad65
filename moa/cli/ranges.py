"""What a setting may be, written beside its type: `rank: Count = 8`, `out: FilePath = "runs/run"`.

moa.cli.settings checks it while loading, for every class of settings, and `--help` prints it. A number
without a range of its own must be finite.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Where a number must be; `least` and `most` are allowed themselves, `above` and `below` are not."""

    least: float | int = -math.inf
    most: float | int = math.inf
    above: float | int = -math.inf
    below: float | int = math.inf

    def rules(self) -> dict[str, Callable[[float], bool]]:
        """Each end in words, with its test; NaN and infinities break the last."""
        ends = {
            f"{self.least:.10g} or more": lambda number: number >= self.least,
            f"above {self.above:.10g}": lambda number: number > self.above,
            f"at most {self.most:.10g}": lambda number: number <= self.most,
            f"below {self.below:.10g}": lambda number: number < self.below,
        }
        return {text: rule for text, rule in ends.items() if "inf" not in text} | {"finite": math.isfinite}

    def broken_by(self, number: float | int) -> str | None:
        """The first rule that a number breaks, in words."""
        return next((text for text, holds in self.rules().items() if not holds(number)), None)

    def __str__(self) -> str:
        """The ends that a reader can tell apart from a typing mistake."""
        hidden = ("finite", f"at most {MOST}", f"at most {MANY}")
        return " and ".join(text for text in self.rules() if text not in hidden)


class Wrong(ValueError):
    """A value that cannot be; `key` is relative to the class that says so, until it is found within others."""

    def __init__(self, key: str, message: str):
        super().__init__(f"{key}: {message}" if key else message)
        self.key, self.message = key, message

    def within(self, parent: str) -> "Wrong":
        return Wrong(".".join(filter(None, (parent, self.key))), self.message)


def check(rule: bool, key: str, message: str) -> None:
    """Raise the one error of a broken rule; `key` is relative to the class whose rule it is."""
    if not rule:
        raise Wrong(key, message)


MOST = 2**31 - 1  # more than any count: a typing mistake
PATH = "path"  # mark of a file or folder on this machine: `~` is the home folder
OF_RUN = "of_run"  # mark of a setting that `"*": default` in a layer leaves as the files below have it
MANY = 2**20  # more of what takes memory or time at once is a typing mistake
FINITE = Range()

FilePath = Annotated[str, PATH]
Count = Annotated[int, Range(1, MOST)]
CountOrZero = Annotated[int, Range(0, MOST)]
Size = Annotated[int, Range(1, MANY)]  # of something that is held in memory
Seed = Annotated[int, Range(0, 2**32 - 1)]
Port = Annotated[int, Range(1, 65535)]
Processes = Annotated[int, Range(0, 1024)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
ShareAboveZero = Annotated[float, Range(above=0, most=1)]
ShareBelowOne = Annotated[float, Range(0, below=1)]
