"""Answer a folder of images with one question, or a file of questions: a JSON line each, with box and gates.

    python -m scripts.predict run=runs/demo input=photos question="what is this?" out=answers.jsonl
    python -m scripts.predict run=runs/demo input=questions.csv task=vqa out=answers.jsonl
    python -m scripts.predict run=runs/demo source="{format: docvqa, path: test.json, images: docs}" out=answers.jsonl
    torchrun --nproc_per_node 8 -m scripts.predict ...

A .jsonl file has rows as in docs/data.md; a table (.csv, .tsv, .json, .parquet) has columns image, question and
perhaps id and task, with images named from its folder. Any other format or columns: source=, as in a run's config.
The command goes on where it was killed: a row that is answered by the same model, prompt and question is kept.
OUT has a line a row (id, answer, predicted_box, gates), which scripts.score reads; OUT.report.json counts by file
what was skipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from data.config import SourceConfig
from moa.cli.command import settings_parser
from moa.cli.ranges import FilePath, Size
from moa.cli.settings import load

if TYPE_CHECKING:
    from moa.evaluation.processes import Processes

SHOWN = 20  # files with errors


@dataclass(frozen=True, kw_only=True)
class PredictSettings:
    run: FilePath = ""  # run or step folder; or an adapter, a checkpoint, ORG/MODEL with `like`
    like: FilePath | None = None  # run or YAML file with the prompt of a model that is not a run
    input: FilePath | None = None  # folder of images, or file of questions
    source: SourceConfig | None = None  # in place of `input`: a file of any format
    out: FilePath = ""  # .jsonl file of the answers
    question: str | None = None  # about every image of a folder
    # of every row; null: each row's own, or its format's; images of a folder are asked without one
    task: str | None = None
    withhold_task: bool = False  # neither the prompt nor the router gets the task
    gates: str = "router"  # router, uniform, ensemble, off (the base), the name of one expert, without:NAME or with:RUN
    batch_size: Size | None = None  # questions per forward; null: as in the run's eval
    max_new_tokens: Size | None = None  # of an answer; null: as in the run's eval
    num_beams: Size | None = None  # 1: greedy; null: as in the run's eval
    # rows that cannot be answered: stop, or count by file and go on
    on_bad_sample: Literal["error", "skip"] = "skip"
    device: str = "auto"  # cpu, cuda, cuda:1; auto: a GPU where there is one
    progress: bool = True  # progress bar


def predict(settings: PredictSettings, console: Console, processes: "Processes") -> None:
    source = chosen_source(settings)
    from moa.evaluation.models import find_models, open_model, pick_device
    from moa.evaluation.predictions import answer_questions, open_questions, report_of
    from moa.evaluation.settings import check_gates, with_eval

    (model,) = find_models([settings.run], settings.like)
    own = {key: getattr(settings, key) for key in ("batch_size", "max_new_tokens", "num_beams")}
    given = {key: value for key, value in own.items() if value is not None}
    withhold = settings.withhold_task or (isinstance(source, Path) and settings.task is None)
    given |= {"gates": settings.gates, "withhold_task": withhold, "on_bad_sample": settings.on_bad_sample}
    config = with_eval(model.config, **given)
    check_gates(settings.gates, [*config.experts], config.router.granularity)
    if settings.task is not None and settings.task not in config.data.tasks:
        raise ValueError(f"task={settings.task}: unknown; choices: {', '.join(config.data.tasks)}")
    questions = open_questions(source, settings.question, settings.task, config)
    network = open_model(model, pick_device(settings.device, processes.local_rank))
    network.answering()  # refuses a CLIP
    out = Path(settings.out)
    done = answer_questions(network, model, config, questions, out, progress=settings.progress, processes=processes)
    if processes.is_main:
        console.print(f"answers: {out}: {done['num_answered']} new, {done['num_kept']} kept", soft_wrap=True)
        if done["num_skipped"]:
            rules = ", ".join(f"{rule} {count}" for rule, count in done["skipped"].items())
            console.print(f"skipped: {done['num_skipped']} ({rules}): {report_of(out)}", soft_wrap=True)
        for row in done["skipped_files"][:SHOWN]:
            console.print(f"  {row['count']} x {row['file']}: {row['reason']}", soft_wrap=True, markup=False)


def chosen_source(settings: PredictSettings) -> SourceConfig | Path:
    """The file of questions as a source, or the folder of images; ValueError for settings without effect."""
    if not settings.run or not settings.out or (settings.input is None) == (settings.source is None):
        raise ValueError("run, out, and one of input and source are needed; see --help")
    if Path(settings.out).suffix != ".jsonl":
        raise ValueError(f"out: must be a .jsonl file, got {settings.out}")
    if settings.gates == "oracle":
        raise ValueError("gates=oracle: a question alone names no expert; name one: gates=NAME")
    if settings.withhold_task and settings.task is not None:
        raise ValueError("task: has no effect with withhold_task=true")
    path = None if settings.input is None else Path(settings.input)
    if path is not None and path.is_dir():
        if not (settings.question or "").strip():
            raise ValueError("question: missing, and a folder of images has none of its own")
        return path
    if settings.question is not None:
        raise ValueError("question: has no effect on a file, whose rows have their own")
    if path is None:
        source = settings.source
        assert source is not None
    elif not path.is_file():
        raise ValueError(f"input: no such file or folder: {path}")
    elif path.suffix == ".jsonl":
        source = SourceConfig(name="input", format="jsonl", path=str(path))
    else:
        source = SourceConfig(name="input", format="table", path=str(path), images=str(path.parent))
    if source.path is not None and Path(source.path).resolve() == Path(settings.out).resolve():
        raise ValueError(f"out: {settings.out} is the file of the questions")
    return source if settings.task is None else replace(source, task=settings.task)


def main(argv: Sequence[str] | None = None) -> None:
    args = settings_parser(PredictSettings, __doc__).parse_intermixed_args(argv)
    from moa.evaluation.processes import join_processes, one_error_of_all

    processes = join_processes()
    with one_error_of_all(processes), processes:
        predict(load(PredictSettings, args.config, args.overrides), Console(), processes)


if __name__ == "__main__":
    main()
