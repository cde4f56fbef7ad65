"""A board as data: its rows, its columns of questions, and the claims that it decides.

configs/boards/NAME.yaml lists the rows. A row is a training run (`config`, `settings`), or the weights of another row
(`of`) answering in another way (`gates`, `at`, `withhold_task`), or what a command makes of other rows (`command`).
With `partitions` each row is a federation for each of them, ROW@PARTITION (scripts/demo/board/federated.py). With
`scale` a row that has `each` is one for each base and number of skills (or skill), ROW-NUMBER-BASE (scale.py). In
`settings` and `command` stand for folders of the same seed:

    {run:ROW}   {step:ROW}   {expert:ROW:NAME}   a run, its last checkpoint, the PEFT folder of an expert in it
    {made:ROW}   {out}                           what the command of another row wrote; what this row's is to write

ROW of another board is BOARD/ROW.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

from data.config import SourceConfig
from moa.cli.ranges import Count, FilePath, Positive, Seed, ShareAboveZero
from moa.cli.settings import Override, check, load
from moa.config import RunConfig
from moa.federated.config import FederateConfig
from scripts.demo.board.scale import ScaleConfig

ROOT = Path(__file__).resolve().parents[3]
BOARDS = ROOT / "configs/boards"
EXPORTS = ("exact", "approximate", "refused")
PRESETS, PRESET_SEEDS = Path("configs/presets"), 3
MEAN = "method=linear rank=sum out={out} verify=false fidelity=false"  # settings of scripts.merge
MADE = "made"  # what a command writes, in its row's folder
# Means over clients, see scripts/demo/board/federated.py; and no scores: megabytes sent, the global model by round.
VIEWS = ("personal", "worst_client", "unseen_task", "unseen_client", "kept")
FACTS = (SENT := "facts/megabytes", BY_ROUND := "facts/by_round")
BASE, CENTRAL = "base", "central"  # rows of such a board that others are measured by
MIXED, ROUTED = "mixed", "routed"  # the same, of a board with `scale`
PLACE = re.compile(r"\{(run|step|made|expert):([\w/-]+)(?::([\w-]+))?\}")


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    name: str = "row"  # its key
    about: str = ""  # what it is, in the table
    config: list[FilePath] = field(default_factory=list)  # YAML files laid over the board's
    # settings in place of those of the files, as on the command line of train.py: {data.expert: lora}
    settings: dict[str, Any] = field(default_factory=dict)
    command: str | None = None  # instead of training: a module and its settings, which write {out}
    of: str | None = None  # instead of training: the row whose weights answer
    at: Count | None = None  # the step whose checkpoint answers; null: the last one
    gates: str = "router"  # as eval.gates
    withhold_task: bool = False  # as eval.withhold_task
    unknown_task: Literal["mean", "none"] | None = None  # of the router in place of the run's own
    seeds: Count | None = None  # only so many of the command's seeds, the first ones; null: all
    tune_as: str | None = None  # the row whose learning rate it takes; null: its own
    scored: bool = True  # false: only other rows start from it
    # steps after which it is scored too, one for each of the board's `arrivals`
    arrivals: list[Count] | None = None
    pooled: bool = False  # of a board with `partitions`: one client has the data of all, so it trains once
    # of a board with `scale`: a row for each base, and for each skill, or each number of skills; null: one
    each: Literal["base", "skill", "count"] | None = None

    @property
    def trains(self) -> bool:
        return self.command is None and self.of is None

    def __post_init__(self) -> None:
        kinds = [k for k, v in (("command", self.command), ("of", self.of), ("settings", self.settings)) if v]
        check(len(kinds) <= 1, "", f"has {' and '.join(kinds)}; choose one")
        check(not self.config or self.trains, "config", f"has no effect beside {' '.join(kinds)}")
        check(self.arrivals is None or self.command is None, "arrivals", "has no effect beside command")
        check(self.tune_as is None or self.trains, "tune_as", "has no effect without training")


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The learning rate of each trained row: the one with the lowest validation loss after shorter runs."""

    rates: list[Positive] = field(default_factory=lambda: [1e-3, 3e-3, 6e-3])  # of the first stage with experts
    seed: Seed = 0
    steps: ShareAboveZero = 0.5  # of every stage's


@dataclass(frozen=True, kw_only=True)
class ClaimConfig:
    """first - second, or first / second, each a mean over columns; in points or per cent. Forgetting: what `first` has
    lost of its skills by the last arrival, the last one left out."""

    name: str = "claim"  # its key
    kind: Literal["difference", "ratio", "forgetting"] = "difference"
    first: str | None = None  # row
    second: str | None = None  # row
    over: str | None = None  # name of a mean or column
    at: str | None = None  # partition of a board that has some
    pairs: list[list[str]] = field(default_factory=list)  # instead of the three: [first, second, column] each

    def __post_init__(self) -> None:
        whole = None not in (self.first, self.second, self.over)
        alone = self.first is not None and (self.second, self.over, self.pairs) == (None, None, [])
        if self.kind == "forgetting":
            return check(alone, "", "needs first alone with kind=forgetting")
        check(whole != bool(self.pairs), "", "needs either first, second and over, or pairs")
        check(all(len(pair) == 3 for pair in self.pairs), "pairs", "each is [first row, second row, column]")


@dataclass(frozen=True, kw_only=True)
class BoardConfig:
    title: str  # above table and picture
    file: str | None = None  # of its results, without ending; null: board_NAME
    config: list[FilePath]  # of every row's run
    settings: dict[str, Any] = field(default_factory=dict)  # of every row's run, below the row's own
    partitions: dict[str, dict[str, Any]] = field(default_factory=dict)  # each a whole `federated.partition`
    columns: dict[str, SourceConfig]  # what every row is scored on, by name
    withhold_task: list[str] = field(default_factory=list)  # columns where no row gets the task
    means: dict[str, list[str]]  # of columns, by name; the first is what rows are ordered by
    reference: str  # the row that others are compared with, and whose size is the measure
    tune: TuneConfig | None = None
    scale: ScaleConfig | None = None
    arrivals: list[str] = field(default_factory=list)  # columns of the skills that rows learn one after another
    # rows that are a file of configs/presets over `config`, and whether one LoRA can hold each: exact, approximate or
    # refused; behind a row that is not refused stands ROW@merged, the mean of its experts as one LoRA, at one seed
    presets: dict[str, str] = field(default_factory=dict)
    rows: dict[str, RowConfig]
    claims: dict[str, ClaimConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {row.partition("-" if self.scale else "@")[0] for row in self.rows}
        check(self.reference in names, "reference", f"no row {self.reference!r}; choices: {sorted(names)}")
        for name, export in self.presets.items():
            check(export in EXPORTS, f"presets.{name}", f"no {export!r}; choices: {', '.join(EXPORTS)}")
        for name, columns in self.means.items():
            check(name not in self.columns, f"means.{name}", "is a column")
            unknown = [column for column in columns if column not in self.scored]
            check(not unknown, f"means.{name}", f"no column {unknown}; choices: {[*self.columns]}")
        fits = not self.partitions or not (self.tune or self.arrivals or self.withhold_task)
        check(fits, "partitions", "has no effect on tune, arrivals and withhold_task; leave them out")
        unknown = [column for column in self.arrivals if column not in self.columns]
        check(not unknown, "arrivals", f"no column {unknown}; choices: {[*self.columns]}")
        for row in self.rows.values():
            check(row.each is None or self.scale is not None, f"rows.{row.name}.each", "has no effect without scale")
            fits = row.arrivals is None or len(row.arrivals) == len(self.arrivals)
            check(fits, f"rows.{row.name}.arrivals", f"needs a step for each of {self.arrivals}, got {row.arrivals}")
        unknown = [column for column in self.withhold_task if column not in self.columns]
        check(not unknown, "withhold_task", f"no column {unknown}; choices: {[*self.columns]}")
        for claim in self.claims.values():
            if claim.kind == "forgetting":
                fits = claim.first in self.rows and self.rows[claim.first].arrivals is not None
                check(fits, f"claims.{claim.name}.first", f"no row with arrivals {claim.first!r}")
                continue
            fits = claim.at in self.partitions if self.partitions else claim.at is None
            check(fits, f"claims.{claim.name}.at", f"no partition {claim.at!r}; choices: {[*self.partitions]}")
            for first, second, column in self.pairs(claim):
                for name in (first.partition("@")[0], second.partition("@")[0]):
                    check(name in names, f"claims.{claim.name}", f"no row {name!r}; choices: {sorted(names)}")
                known = column in self.scored
                check(known, f"claims.{claim.name}", f"no column {column!r}; choices: {[*self.columns]}")
        known_rates = {row.name for row in self.rows.values() if row.trains and row.tune_as is None}
        for row in self.rows.values():
            other = row.tune_as is None or row.tune_as in known_rates
            check(other, f"rows.{row.name}.tune_as", f"no row {row.tune_as!r} is tuned; choices: {sorted(known_rates)}")

    def forgetting(self, row: str) -> list[tuple[str, str, str]]:
        """(row after its arrival, row at the end, skill) for every skill but the last."""
        return [(arrived(row, skill), row, skill) for skill in self.arrivals[:-1]]

    @property
    def views(self) -> dict[str, list[str]]:
        """The columns of each mean over clients, which have the models that they have, of a board with partitions."""
        return {view: [f"{view}/{c}" for c in self.columns] for view in VIEWS} if self.partitions else {}

    @property
    def scored(self) -> list[str]:
        """All columns of a row's scores."""
        own = [column for columns in self.views.values() for column in columns]
        return [*self.columns, *own, *(FACTS if self.partitions else ())]

    def beside(self, row: str) -> str:
        """The reference of a row: that of its partition, or of its number of skills and base, if it has one."""
        if self.scale:
            return f"{self.reference}-{row.partition('-')[2]}"
        return f"{self.reference}@{row.partition('@')[2]}" if self.partitions else self.reference

    def columns_of(self, name: str) -> list[str]:
        """The columns of a mean, or the one of this name."""
        return (self.means | self.views).get(name, [name])

    def pairs(self, claim: ClaimConfig) -> list[tuple[str, str, str]]:
        """(first row, second row, column) of everything that a claim is a mean over."""
        if claim.kind == "forgetting":
            return self.forgetting(str(claim.first))
        if claim.pairs:
            return [(first, second, column) for first, second, column in claim.pairs]
        assert claim.first and claim.second and claim.over  # checked by ClaimConfig
        rows = [f"{row}@{claim.at}" if claim.at else row for row in (claim.first, claim.second)]
        return [(rows[0], rows[1], column) for column in self.columns_of(claim.over)]


@dataclass(frozen=True)
class Cell:
    """One row of one board at one seed, or its tuning: what is trained or scored at a time."""

    board: str
    row: str
    seed: int

    def __str__(self) -> str:
        return f"{self.board}/{self.row} seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where everything lies, and what changes every run."""

    out: Path
    steps: float = 1.0  # share of every stage's steps
    num_samples: int | None = None  # of every column, and most of every validation set; None: their own
    overrides: tuple[str, ...] = ()

    @property
    def ocr_file(self) -> Path:
        return self.out / "ocr.parquet"

    def folder(self, cell: Cell) -> Path:
        """Of a run, or of what a command wrote; its weights are another row's where the row is `of` one."""
        row = read_board(cell.board).rows[cell.row]
        if row.of is not None:
            return self.folder(cell_at(row.of, cell))
        return self.out / cell.board / cell.row / f"seed-{cell.seed}"

    def record(self, cell: Cell) -> Path:
        """Of which scores are this row's."""
        return self.out / cell.board / cell.row / f"scores-{cell.seed}.json"

    def columns(self, board: str) -> dict[str, SourceConfig]:
        found = read_board(board).columns
        if self.num_samples is None:
            return found
        return {name: replace(column, num_samples=self.num_samples) for name, column in found.items()}

    def filled(self, text: str, cell: Cell) -> str:
        """The text with folders in its places."""
        return PLACE.sub(lambda found: str(self._place(found, cell)), text)

    def settings(self, cell: Cell) -> dict[str, Any]:
        """The row's own, with folders in their places."""
        return json.loads(self.filled(json.dumps(read_board(cell.board).rows[cell.row].settings), cell))

    def _place(self, found: re.Match[str], cell: Cell) -> Path:
        kind, row, expert = found.groups()
        run = self.folder(cell_at(row, cell))
        if kind == "made":
            return run / MADE
        step = run if kind == "run" else run / "checkpoints" / (run / "checkpoints/last").read_text().strip()
        return step / "experts" / expert if kind == "expert" else step


def cell_at(row: str, beside: Cell) -> Cell:
    """The cell of ROW or BOARD/ROW at the same seed."""
    *board, name = row.split("/")
    found = Cell(board[0] if board else beside.board, name, beside.seed)
    if name not in read_board(found.board).rows:
        raise ValueError(f"{BOARDS / beside.board}.yaml: rows.{beside.row}: no row {row!r}")
    return found


def needed(cell: Cell) -> list[Cell]:
    """The cells whose weights a row starts from, in the order in which it names them."""
    row = read_board(cell.board).rows[cell.row]
    named = [row.of] if row.of else []
    for text in (json.dumps(row.settings), row.command or ""):
        named += [found[2] for found in PLACE.finditer(text)]
    return [cell_at(name, cell) for name in dict.fromkeys(named)]


def with_needed(cells: list[Cell]) -> Iterator[Cell]:
    """Each cell after those that it needs, once."""
    seen: set[Cell] = set()

    def walk(cell: Cell) -> Iterator[Cell]:
        if cell not in seen:
            seen.add(cell)
            for other in needed(cell):
                yield from walk(other)
            yield cell

    for cell in cells:
        yield from walk(cell)


def board_names() -> list[str]:
    return sorted(file.stem for file in BOARDS.glob("*.yaml"))


def results_file(results: Path, board: str, ending: str) -> Path:
    own = read_board(board).file if board in board_names() else None
    return results / f"{own or f'board_{board}'}.{ending}"


def arrived(row: str, skill: str) -> str:
    """The name of a row as it is when a skill has just been learned."""
    return f"{row}@{skill}"


def merged(row: str) -> str:
    """The name of a preset's row as one LoRA."""
    return f"{row}@merged"


@cache
def read_board(name: str) -> BoardConfig:
    """The board with the rows of its presets, one for each of their merges, and one for every arrival of a row that has
    `arrivals`; its last one is the row itself."""
    if name not in board_names():
        raise ValueError(f"board: no {name!r}; choices: all, {', '.join(board_names())}")
    board, rows = load(BoardConfig, BOARDS / f"{name}.yaml"), dict[str, RowConfig]()
    if board.partitions:
        return replace(board, rows=by_partition(board), means=board.means | board.views)
    if board.scale:
        means = {f"first {count}": [*board.columns][:count] for count in board.scale.counts}
        return replace(board, rows=by_scale(board, board.scale), means=means)
    for row in board.rows.values():
        rows[row.name] = replace(row, settings=board.settings | row.settings) if row.trains else row
        for skill, step in [*zip(board.arrivals, row.arrivals or (), strict=False)][:-1]:
            same: dict[str, Any] = {"of": row.of or row.name, "gates": row.gates, "withhold_task": row.withhold_task}
            rows[arrived(row.name, skill)] = RowConfig(name=arrived(row.name, skill), at=step, **same)
    for key, export in board.presets.items():
        rows[key] = RowConfig(name=key, config=[str(PRESETS / f"{key}.yaml")], seeds=PRESET_SEEDS)
        if export != "refused":
            command = f"scripts.merge run={{run:{key}}} approximate={export == 'approximate'} {MEAN}"
            rows[merged(key)] = RowConfig(name=merged(key), command=command, seeds=1)
    return replace(board, rows=rows)


def by_partition(board: BoardConfig) -> dict[str, RowConfig]:
    """A row for each partition; a pooled one trains for the first, and its weights are scored for the others."""
    rows, first = dict[str, RowConfig](), next(iter(board.partitions))
    for partition, recipe in board.partitions.items():
        for row in board.rows.values():
            own: dict[str, Any] = {"name": f"{row.name}@{partition}"}
            if row.of is not None:
                own["of"] = f"{row.of}@{partition}"
            elif row.pooled and partition != first:
                own |= {"of": f"{row.name}@{first}", "config": [], "settings": {}}
            else:
                own["settings"] = board.settings | row.settings | {"federated.partition": recipe}
            rows[own["name"]] = replace(row, **own)
    return rows


def by_scale(board: BoardConfig, scale: ScaleConfig) -> dict[str, RowConfig]:
    rows, skills = dict[str, RowConfig](), [*board.columns]
    parts = {
        "base": {"": skills},
        "skill": {skill: [skill] for skill in skills},
        "count": {str(count): skills[:count] for count in scale.counts},
    }
    for row in board.rows.values():
        if row.each is None:
            rows[row.name] = row
            continue
        for size, (part, own) in product(scale.bases, parts[row.each].items()):
            text = json.dumps({"settings": row.settings, "command": row.command, "of": row.of})
            for place, filling in (scale.places(board.columns, own, size) | {"{part}": part}).items():
                text = text.replace(place, filling)
            name = "-".join(filter(None, (row.name, part, size)))
            rows[name] = replace(row, name=name, **json.loads(text))
    return rows


def load_run(board: BoardConfig, row: RowConfig | None = None, changes: Sequence[Override] = ()) -> RunConfig:
    """The settings of a row's run, a federation's on a board with partitions; without a row what all have in common."""
    files, own = (row.config, row.settings) if row else ([], board.settings)
    kind = FederateConfig if board.partitions else RunConfig
    return load(kind, [*board.config, *files], [*own.items(), *changes])
