"""The table of scripts.compare_merges: a cell under every heading, both normalisations, and what counts as trained."""

from dataclasses import replace

import numpy as np
import pytest

from data.config import DataConfig, SourceConfig
from data.sample import Sample
from moa.benchmarks.scores import Response, Scores
from moa.config import RunConfig
from moa.evaluation.result import Result
from moa.sections import ExpertConfig
from scripts.compare_merges import markdown, summarise, trained_sets


def table():
    """Of two data sets with four questions each."""
    scores = lambda a, b: {"scores": {"a": np.array(a, dtype=float), "b": np.array(b, dtype=float)}}  # noqa: E731
    return [
        {"method": "base", "options": {}, "data": "none", "default": scores([0, 0, 0, 1], [1, 1, 1, 1])},
        {"method": "routed, not merged", "options": {}, "data": "none", "default": scores([1, 1, 1, 1], [1, 1, 1, 0])},
        {"method": "ties", "options": {"reduce": "sum"}, "data": "none", "rank": 4,
         "default": scores([0, 0, 0, 0], [1, 0, 0, 0]) | {"seconds": 1.0},
         "tuned": scores([1, 1, 0, 0], [1, 0, 0, 0]) | {"seconds": 20.0}},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("trained", "trained_mean", "of_routed", "of_gain", "worst", "held_out"),
    [
        ({"a"}, 50, 50, 100 * 0.25 / 0.75, ["a", 50], 25),
        ({"a", "b"}, 37.5, 100 * 0.375 / 0.875, 100 * -0.25 / 0.25, ["b", 100 / 3], None),
    ],
)
def test_both_normalisations_and_the_worst_task(trained, trained_mean, of_routed, of_gain, worst, held_out):
    rows = table()
    summarise(rows, trained)
    found = rows[2]["tuned"]["summary"]
    assert found["trained"][0] == pytest.approx(trained_mean) and found["of_routed"][0] == pytest.approx(of_routed)
    assert found["worst"] == [worst[0], pytest.approx(worst[1])]
    assert found["held_out"] == (None if held_out is None else pytest.approx(held_out))
    assert found["trained"][1] < trained_mean < found["trained"][2]
    # some draws of four questions have no gain to share
    assert found["of_gain"] is None or found["of_gain"][0] == pytest.approx(of_gain)
    assert rows[1]["default"]["summary"]["of_routed"] == pytest.approx([100, 100, 100])
    head, rule, *lines = markdown(rows).splitlines()
    for line in (rule, *lines):
        assert line.count("|") == head.count("|")
    [ties] = [line for line in lines if line.startswith("| `ties` (reduce=sum) | none | 4 | ")]
    assert ties.endswith(" | 1.0 / 20.0 |")
    assert lines[0].startswith("| `routed, not merged` | none |  | ")


def result(name, **sample):
    made = Sample(id="1", task="vqa", question="q", answers=("a",), source=name, image_id="1", image=None)
    prediction = Response(sample=replace(made, **sample), text="a")
    return Result(name=name, tasks={"vqa": ([prediction], Scores(primary="x", values={"x": [1.0]}))})


def test_a_data_set_is_trained_by_its_expert_source_or_task_not_by_an_experts_name():
    config = RunConfig(
        experts={"color": ExpertConfig(), "chat": ExpertConfig()},
        data=DataConfig(
            tasks=["vqa", "caption", "count"],
            sources={
                "colors": SourceConfig(name="colors", task="vqa", expert="color", num_samples=1),
                "own": SourceConfig(name="own", task="caption", expert="chat", num_samples=1),
                "left": SourceConfig(name="left", task="count", num_samples=1),
            },
        ),
    )
    results = [
        result("color_test"),  # by its task
        result("own", task="count"),  # by its name
        result("named", task="count", expert="chat"),
        result("color", task="count"),  # called as an expert, but of another task
        result("left", task="count"),  # trained by no expert
    ]
    assert trained_sets(results, config) == {"color_test", "own", "named"}
