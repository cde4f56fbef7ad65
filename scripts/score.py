"""Score a file of answers, without a model: an old submission, a colleague's output, rows of eval.py.

    python -m scripts.score predictions=answers.json out=runs/scores \\
        source="{name: val, format: jsonl, path: textvqa/val.jsonl, benchmark: textvqa}"

The file is a JSON list or JSON lines. Rows have question_id, questionId, id, image_id or image, and answer,
prediction, caption, text or the like; of rows with two of these text_key= names the output, since the other
may be the reference. A box is predicted_box, in pixels. OUT gets the files that eval.py writes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from data.config import DataConfig, SourceConfig
from moa.cli.command import command
from moa.cli.ranges import FilePath


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    predictions: FilePath = ""  # file of answers
    text_key: str | None = None  # of its rows, the model's output; null: the only text they have
    source: SourceConfig | None = None  # data set with the references
    out: FilePath = "runs/scores"  # folder of the results
    # questions without an answer: stop, or count as ""
    missing: Literal["error", "empty"] = "error"
    # questions without references: stop, or count
    on_bad_sample: Literal["error", "skip"] = "error"
    progress: bool = True  # progress bar


def score(settings: ScoreSettings, console: Console) -> None:
    from data.sources import open_sources
    from moa.checkpoint import sha256, versions
    from moa.evaluation.answers import read_answers, score_answers
    from moa.evaluation.report import write_results
    from moa.evaluation.result import table
    from moa.evaluation.settings import benchmark_of, check_sources

    if settings.source is None or not settings.predictions:
        raise ValueError("predictions and source are needed; see --help")
    source = settings.source
    check_sources([source])
    answers = read_answers(settings.predictions, settings.text_key)
    dataset = open_sources([source], DataConfig(), None)[source.name]
    result = score_answers(
        source.name,
        dataset,
        answers,
        benchmark_of(source),
        missing=settings.missing,
        on_bad_sample=settings.on_bad_sample,
        progress=settings.progress,
    )
    about = {
        "predictions": settings.predictions,
        "weights": sha256(Path(settings.predictions)),  # of the answers, which stand for a model's
        "text_key": settings.text_key,
        "versions": versions(),
    }
    write_results(Path(settings.out), [result], [source], about)
    console.print(table([result], f"{settings.predictions}: scores"))
    console.print(f"scores: {settings.out}/{source.name}.json", soft_wrap=True)


main = command(ScoreSettings, score, __doc__)

if __name__ == "__main__":
    main()
