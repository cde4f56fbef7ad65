"""What makes a sample bad: one error that names the sample, the rule and the value.

Readers raise BadSampleError where a row cannot become a sample; collation raises it where a sample
breaks a rule. A run stops at the first one, or counts them by rule and goes on, as its config says.
"""

from collections.abc import Collection
from typing import Literal

from data.boxes import check_box
from data.sample import Sample

Rule = Literal[
    "unreadable row", "missing image", "broken image", "picture outside folder", "picture too large",
    "empty question", "empty answer", "unknown task", "unknown expert", "unknown class",
    "box outside picture", "box hidden by crop",
    "image token in text", "too long",
]  # fmt: skip


class BadSampleError(ValueError):
    """`where` is a file and row, or a source and sample; `rule` is what skipped samples count by."""

    def __init__(self, where: str, rule: Rule, detail: str = ""):
        super().__init__(where, rule, detail)  # as args, so that it survives pickling by a worker
        self.where, self.rule, self.detail = where, rule, detail

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}{': ' if self.detail else ''}{self.detail}"


def name_of(sample: Sample) -> str:
    return f"source {sample.source!r}, sample {sample.id}"


def check_sample(
    sample: Sample,
    *,
    tasks: Collection[str] | None = None,
    experts: Collection[str] | None = None,
    needs_answer: bool = True,
    where: str | None = None,
) -> None:
    """Raise BadSampleError for the first rule that the sample breaks.

    `tasks` and `experts` are the known names; None allows every name.
    """
    where = where or name_of(sample)
    if not sample.question.strip():
        raise BadSampleError(where, "empty question")
    if needs_answer and not sample.boxes and not any(a.strip() for a in sample.answers):
        raise BadSampleError(where, "empty answer", f"answers={sample.answers!r} and no box")
    if tasks is not None and sample.task not in tasks:
        raise BadSampleError(where, "unknown task", f"{sample.task!r}; choices: {[*tasks]}")
    if experts is not None and sample.expert is not None and sample.expert not in experts:
        raise BadSampleError(where, "unknown expert", f"{sample.expert!r}; choices: {[*experts]}")
    for box in sample.boxes:
        try:
            check_box(box, *sample.size)
        except ValueError as error:
            raise BadSampleError(where, "box outside picture", str(error)) from None
