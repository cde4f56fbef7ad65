"""Score one row at one seed on every column: a file of per-question scores for each weights, gates and questions.

Rows that answer with the same weights and gates share the file, in whatever board they are.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from data.config import SourceConfig
from data.ocr import OcrCache, build_cache
from data.ocr_engines import RapidOcr
from data.sources import open_source
from moa.checkpoint import git_commit, step_name
from moa.clip_model import ClipMixture
from moa.config import RunConfig
from moa.evaluation.dual_encoder import evaluate_pairs
from moa.evaluation.fingerprints import digest
from moa.evaluation.models import EvaluatedModel, find_models, open_model
from moa.evaluation.predict import prompt_collator
from moa.evaluation.run import evaluate
from moa.evaluation.settings import benchmark_of
from moa.federated.config import FederateConfig
from moa.files.atomic import write_file, write_json
from moa.model import MixtureModel
from moa.parts import PARTS
from moa.sections import EvalConfig
from scripts.demo.board.plan import MADE, ROOT, Cell, Plan, cell_at, load_run, needed, read_board
from scripts.demo.board.scale import given
from scripts.demo.board.training import DONE, config_of

BATCH = 64


def score(plan: Plan, cell: Cell) -> None:
    """Score what was not scored before, and write which files hold the row's scores."""
    board, row = read_board(cell.board), read_board(cell.board).rows[cell.row]
    evaluated, columns, files = model_of(plan, cell), plan.columns(cell.board), score_files(plan, cell)
    model = open_model(evaluated, "cpu")
    model.routing.unknown_task = row.unknown_task or model.routing.unknown_task
    for name, file in files.items():
        if read_scores(plan.out / "scores" / file) is None:
            withheld = row.withhold_task or name in board.withhold_task
            found = score_column(plan, model, evaluated.config, columns[name], row.gates, withheld)
            write_json(plan.out / "scores" / file, found)
    record = {"files": files, "commit": git_commit()} | sizes(model, row.gates)
    write_json(plan.record(cell), record | (costs(plan.folder(cell)) if row.trains else {}))


def is_scored(plan: Plan, cell: Cell) -> bool:
    """Whether the row's record is of these weights, gates and questions, and whole."""
    record = read_scores(plan.record(cell))
    try:
        if record is None or record.get("files") != score_files(plan, cell):
            return False
    except FileNotFoundError:  # the weights are gone, and nothing says whose scores these are
        return False
    return all((plan.out / "scores" / file).is_file() for file in record["files"].values())


@cache  # the weights of a row that is trained do not change
def score_files(plan: Plan, cell: Cell) -> dict[str, str]:
    """The file of each column, named by all that its scores belong to; of a federation one file."""
    if read_board(cell.board).partitions:
        config, row = federation_of(plan, cell), read_board(cell.board).rows[cell.row]
        made, columns = (plan.folder(cell) / DONE).read_text(), {n: given(c) for n, c in config.eval.sources.items()}
        asked = [config.federated.partition, config.federated.num_questions]
        return {"all": f"{digest(repr([made, row.gates, columns, asked]))}.json"}
    board, row, evaluated = read_board(cell.board), read_board(cell.board).rows[cell.row], model_of(plan, cell)
    weights = evaluated.config.model.fingerprint if row.gates == "off" else evaluated.fingerprint()
    files = {}
    for name, column in plan.columns(cell.board).items():
        withheld = row.withhold_task or name in board.withhold_task
        about = [weights, row.gates, withheld, given(column), prompt_of(evaluated.config)]
        about += [row.unknown_task] if row.unknown_task else []
        files[name] = f"{digest(json.dumps(about))}.json"
    return files


def federation_of(plan: Plan, cell: Cell) -> FederateConfig:
    """The settings of the federation that answers, with the partition of the row and the board's data sets."""
    board, own = read_board(cell.board), cell
    while (of := board.rows[own.row].of) is not None:
        own = cell_at(of, own)
    changes = [("seed", cell.seed), ("out", str(plan.folder(cell))), ("data.ocr_cache", str(plan.ocr_file))]
    partition = ("federated.partition", board.partitions[cell.row.partition("@")[2]])
    config = load_run(board, board.rows[own.row], [*changes, *plan.overrides, partition])
    assert isinstance(config, FederateConfig)
    number = min(config.federated.num_questions, plan.num_samples or config.federated.num_questions)
    federated = replace(config.federated, num_questions=number)
    return replace(config, federated=federated, eval=replace(config.eval, sources=plan.columns(cell.board)))


def model_of(plan: Plan, cell: Cell) -> EvaluatedModel:
    """What answers: a step of a run, or what a command wrote with the prompt of the first run that it names."""
    row, folder = read_board(cell.board).rows[cell.row], plan.folder(cell)
    if (folder / MADE).exists():
        run = next(plan.folder(c) for c in runs_before(cell) if (plan.folder(c) / "checkpoints/last").is_file())
        return find_models([str(folder / MADE)], str(run))[0]
    step = step_name(row.at) if row.at else (folder / "checkpoints/last").read_text().strip()
    return find_models([str(folder / "checkpoints" / step)], None)[0]


def runs_before(cell: Cell) -> Sequence[Cell]:
    """Everything that a row comes from, the nearest first."""
    found = needed(cell)
    return [*found, *(deeper for other in found for deeper in runs_before(other))]


def prompt_of(config: RunConfig) -> list[Any]:
    return [asdict(config.prompt), list(config.data.tasks), config.eval.max_new_tokens]


def read_scores(file: Path) -> dict[str, Any] | None:
    """None where there is none, or one that was cut off."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and found else None


def score_column(
    plan: Plan, model: MixtureModel, config: RunConfig, column: SourceConfig, gates: str, withheld: bool
) -> dict[str, Any]:
    ocr = ocr_of(plan, config) if config.data.ocr_cache else None
    dataset = open_source(column, column.expert, ocr)
    collator = prompt_collator(model, config, withhold_task=withheld)
    settings = EvalConfig(gates=gates, batch_size=BATCH, max_new_tokens=config.eval.max_new_tokens, num_images=0)
    began = time.process_time()
    if isinstance(model, ClipMixture):
        result = evaluate_pairs(model, dataset, collator, settings, name=column.name)
    else:
        result = evaluate(model, dataset, collator, settings, name=column.name, benchmark=benchmark_of(column))
    seconds = time.process_time() - began
    scores = [round(value, 6) for value in result.sample_scores]
    return {"column": column.name, "scores": scores, "num_tokens": result.num_tokens, "cpu_seconds": seconds}


def sizes(model: MixtureModel, gates: str) -> dict[str, int]:
    """Parameters of the experts and of the router that the answers need."""
    parts = {part: count(PARTS[part].parameters(model).values()) for part in ("experts", "router")}
    used = {"off": (), "router": ("experts", "router")}.get(gates, ("experts",))
    return {part: number if part in used else 0 for part, number in parts.items()}


def costs(run: Path) -> dict[str, float]:
    """Seconds of a training step, the median, and the most memory of its process."""
    steps = [line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "step_s" in line]
    return {"step_s": median(line["step_s"] for line in steps), "memory_gib": max(line["memory_gib"] for line in steps)}


def count(parameters: Any) -> int:
    """A parameter that several sites share counts once."""
    return sum({id(p): p.numel() for p in parameters}.values())


_OCR: dict[Path, OcrCache] = {}


def ocr_of(plan: Plan, config: RunConfig) -> OcrCache:
    """Every row of a process reads the same words."""
    if plan.ocr_file not in _OCR:
        _OCR[plan.ocr_file] = OcrCache(plan.ocr_file, engine=engine_of(config))
    return _OCR[plan.ocr_file]


def engine_of(config: RunConfig) -> RapidOcr:
    return RapidOcr(min_confidence=config.data.ocr_min_confidence)


def read_images(plan: Plan, boards: Sequence[str], num_workers: int) -> None:
    """Read the words of every image of columns and training once, before the rows share the cache."""
    boards = [board for board in boards if load_run(read_board(board)).data.ocr_engine]
    if not boards:
        return
    config = load_run(read_board(boards[0]))
    sources = {json.dumps(given(source)): source for board in boards for source in sources_of(plan, board)}
    wanted = digest(json.dumps(sorted(sources)))
    marker = plan.out / "images_read" / wanted
    if marker.is_file():
        return
    if not plan.ocr_file.is_file() and config.data.ocr_cache:
        plan.ocr_file.parent.mkdir(parents=True, exist_ok=True)
        write_file(plan.ocr_file, (ROOT / config.data.ocr_cache).read_bytes())
    images: dict[str, Any] = {}
    for source in sources.values():
        dataset = open_source(source, None, None)
        for sample in (dataset[index] for index in range(len(dataset))):
            images.setdefault(sample.image_id, sample.image)
    engine = engine_of(config)
    build_cache([*images.values()], plan.ocr_file, engine=engine, num_workers=num_workers)
    marker.parent.mkdir(exist_ok=True)
    marker.touch()


def sources_of(plan: Plan, name: str) -> Iterator[SourceConfig]:
    """All that the rows of a board are scored on, trained on and validated on."""
    board = read_board(name)
    yield from plan.columns(name).values()
    for row in board.rows.values():
        if row.trains:
            config = config_of(name, row.name, plan.overrides)
            yield from (*config.data.sources.values(), *config.data.validation.values())
