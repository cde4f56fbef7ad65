"""How much a model's scores fall under typos, misread OCR words, noise and blur, and where experts are mixed: the study
of scripts.robustness.

Every strength is scored on the same questions as the clean data set, so that differences are paired, and their
intervals are those of moa.metrics.intervals.py: over the questions of each data set, for the mean over data sets.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table

from data.corruption import CORRUPTIONS, spoilt
from data.mixture import Mapped, Source
from moa.evaluation.result import Result, plain_table
from moa.metrics.intervals import Interval, paired_interval

FILE = "robustness.json"
View = Callable[[Source], Source]


def study(score: Callable[[View | None], Sequence[Result]], names: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Scores in per cent of the clean data sets, and of each corruption at each of its strengths, as a record. `score`
    gives the results of the data sets under a view, or as they are."""
    clean = columns_of(score(None))
    record: dict[str, Any] = {"data_sets": [*clean], "clean": row_of(clean, clean), "corruptions": {}}
    for name in names:
        rows = {}
        for strength in CORRUPTIONS[name].strengths:
            change = partial(spoilt, name=name, strength=strength, seed=seed)
            rows[str(strength)] = row_of(columns_of(score(partial(Mapped, change=change))), clean)
        record["corruptions"][name] = {"unit": CORRUPTIONS[name].unit, "strengths": rows}
    return record


def mixing(
    score: Callable[[Collection[str], Collection[str]], Sequence[Result]],
    own: Mapping[str, str],
    signs: Mapping[tuple[str, str], float],
) -> dict[str, Any]:
    """What two experts lose at half the gate each, on the data sets of the two, beside the share of signs in which they
    disagree, and how the two go together over all pairs (Mixture of Domain Adapters, ACL 2024).

    `score` gives the results of experts, all alike, on data sets; `own` has the expert of each data set.
    """
    alone, pairs = dict[str, Any](), list[dict[str, Any]]()
    for expert in dict.fromkeys(own.values()):
        alone |= columns_of(score([expert], [name for name, other in own.items() if other == expert]))
    for pair, share in signs.items():
        if names := [name for name, expert in own.items() if expert in pair]:
            row = row_of(columns_of(score(pair, names)), {name: alone[name] for name in names})
            pairs.append({"experts": [*pair], "sign_disagreement": share, "fall": row["fall"]})
    both = np.array([(pair["sign_disagreement"], pair["fall"]["value"]) for pair in pairs]).reshape(-1, 2)
    differ = len(both) > 2 and bool((np.ptp(both, 0) > 0).all())
    return {"pairs": pairs, "correlation": float(np.corrcoef(both.T)[0, 1]) if differ else None}


def columns_of(results: Sequence[Result]) -> dict[str, dict[tuple[str, str], float]]:
    """Data set -> the score of each question, by task and id."""
    found = {}
    for result in results:
        keys = [(response.sample.task, response.sample.id) for response in result.responses]
        found[result.name] = dict(zip(keys, result.sample_scores, strict=True))
    return found


def row_of(spoilt: dict[str, dict[Any, float]], clean: dict[str, dict[Any, float]]) -> dict[str, Any]:
    """The mean over data sets and its fall with their intervals, and the score of each data set. A question that cannot
    be asked any more (its text is too long for the model) scores 0."""
    ours, theirs = [], []
    for name, scores in clean.items():
        ours.append(np.array([[100 * spoilt[name].get(key, 0.0) for key in scores]]))
        theirs.append(np.array([[100 * value for value in scores.values()]]))
    nothing = [np.zeros_like(column) for column in ours]
    return {
        "mean": record_of(paired_interval(ours, nothing)),
        "fall": record_of(paired_interval(ours, theirs)),
        "scores": {name: float(column.mean()) for name, column in zip(clean, ours, strict=True)},
    }


def record_of(interval: Interval) -> dict[str, float]:
    return {key: round(getattr(interval, key), 3) for key in ("value", "low", "high")}


def mixing_table(record: dict[str, Any]) -> Table:
    grid, found = plain_table(), record["correlation"]
    together = "too few pairs to correlate" if found is None else f"correlation {found:.2f}"
    grid.title = f"two experts at half the gate each, over each alone on its own data sets; {together}"
    for column in ("experts", "signs that disagree", "fall"):
        grid.add_column(column, justify="left" if column == "experts" else "right", no_wrap=True)
    for pair in record["pairs"]:
        fall = "{value:.1f} [{low:.1f}, {high:.1f}]".format(**pair["fall"])
        grid.add_row(", ".join(pair["experts"]), f"{pair['sign_disagreement']:.1%}", fall)
    return grid


def table(record: dict[str, Any]) -> Table:
    grid = plain_table()
    grid.title = "scores in per cent, and the fall from the clean data sets with its 95 % interval"
    for column in ("", "strength", "mean", "fall", *record["data_sets"]):
        grid.add_column(column, justify="left" if not column else "right", no_wrap=True)
    rows = [("clean", "", record["clean"])]
    for name, own in record["corruptions"].items():
        rows += [(name if not number else "", s, row) for number, (s, row) in enumerate(own["strengths"].items())]
    for name, strength, row in rows:
        fall = "{value:.1f} [{low:.1f}, {high:.1f}]".format(**row["fall"]) if strength else ""
        scores = [f"{row['scores'][source]:.1f}" for source in record["data_sets"]]
        grid.add_row(name, strength, f"{row['mean']['value']:.1f}", fall, *scores)
    return grid
