"""The table of scripts.compare_merges: a cell under every heading, and what counts as trained."""

from dataclasses import replace

import pytest

from data.config import DataConfig, SourceConfig
from data.sample import Sample
from moa.benchmarks.scores import Response, Scores
from moa.config import ExpertConfig, RunConfig
from moa.evaluation.result import Result
from scripts.compare_merges import markdown, trained_sets

ROWS = [
    {"method": "ties", "options": {}, "rank": 4, "seconds": 1.0, "scores": {"a": 0.5, "b": 0.25}},
    {"method": "base", "options": {}, "rank": None, "seconds": None, "scores": {"a": 0.75, "b": 1}},
]


@pytest.mark.parametrize(
    ("trained", "means"),
    [({"a", "b"}, ["38", "-"]), ({"a"}, ["50", "25"]), (set(), ["-", "38"])],
)
def test_every_row_has_a_cell_under_every_heading(trained, means):
    head, rule, *rows = markdown(ROWS, trained).splitlines()
    names = [name.strip() for name in head.strip("|").split("|")]
    for line in (rule, *rows):
        assert line.count("|") == head.count("|")
    cells = {row.split("|")[1].strip(): row.strip("|").split("|") for row in rows}
    ties = dict(zip(names, (cell.strip() for cell in cells["`ties`"]), strict=True))
    assert [ties["trained"], ties["held out"]] == means
    assert (ties["a"], ties["b"], ties["rank"], ties["seconds"]) == ("50", "25", "4", "1.00")


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
