"""Small faults in the mathematics that the tests must notice: `python -m tests.mutants`, outside CI.

    python -m tests.mutants [--only X07 E08] [--jobs 2] [--table tests/mutants.toml]

A row of the table replaces one text in one file. Each runs alone in a temporary copy of the tree, with the fast tests
of its file: it is killed where a test fails, and survives where all pass. Rows with a `reason` change no result and
must survive. Every set of tests first runs without a mutant. Ctrl-C prints what was found so far.

Exit status: 0 all as expected, 1 an unexpected result, 2 a row whose text is not exactly once in its file.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from tests import ROOT

TABLE = Path(__file__).with_suffix(".toml")
OWN = {"data", "moa", "scripts", "tests"}  # packages that a copy brings itself
# Imported once, before the processes of the tests are forked: this takes longer than most tests.
PRELOAD = [
    "pytest",
    "hypothesis",
    "peft",
    "transformers.models.llava.modeling_llava",
    "scipy.cluster.vq",
]
LIMIT = 600  # seconds
ENDINGS = {0: "survived", 1: "killed", 2: "killed"}  # by pytest's exit status; 2: an import fails


@dataclass(frozen=True)
class Mutant:
    id: str
    file: str
    tests: tuple[str, ...]
    old: str
    new: str
    reason: str | None = None  # why it changes nothing

    @property
    def expected(self) -> str:
        return "killed" if self.reason is None else "survived"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="ID", help="these rows alone")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args()
    try:
        mutants = read_table(options.table, options.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.exit(run_all(mutants, options.jobs))


def read_table(table: Path, only: list[str] | None = None) -> list[Mutant]:
    """The rows, or those named; ValueError naming the row that does not apply or whose id is not its own."""
    with table.open("rb") as file:
        content = tomllib.load(file)
    mutants = [
        Mutant(row["id"], name, tuple(row.get("tests", entry["tests"])), row["from"], row["to"], row.get("reason"))
        for name, entry in content.items()
        for row in entry["mutants"]
    ]  # fmt: skip
    for key, count in Counter(mutant.id for mutant in mutants).items():
        if count > 1:
            raise ValueError(f"{table}: {count} rows have the id {key}")
    unknown = set(only or ()) - {mutant.id for mutant in mutants}
    if unknown:
        raise ValueError(f"--only: {table} has no row {', '.join(sorted(unknown))}")
    for mutant in mutants:
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        if (count := text.count(mutant.old)) != 1:
            raise ValueError(f"{table}: {mutant.id}: its text is {count} times in {mutant.file}, not once")
        compile(text.replace(mutant.old, mutant.new), f"{mutant.id}: {mutant.file}", "exec")
    return [mutant for mutant in mutants if only is None or mutant.id in only]


def run_all(mutants: list[Mutant], jobs: int) -> int:
    """Run and report; the exit status."""
    counts: Counter[str] = Counter()
    odd: list[str] = []
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with copies(jobs) as trees, ThreadPoolExecutor(jobs) as pool, Progress(*columns) as progress:
        controls = [Mutant("no mutant", m.file, m.tests, "", "", "") for m in mutants]
        todo = [*{m.tests: m for m in controls}.values(), *mutants]
        bar = progress.add_task("", total=len(todo))
        try:
            for mutant, ending in zip(todo, pool.map(partial(run_one, trees), todo), strict=True):
                line = f"{mutant.id:12} {ending:9} {mutant.file}"
                progress.update(bar, advance=1, description=mutant.id)
                counts[ending] += mutant.id != "no mutant"
                if ending != mutant.expected:
                    odd.append(line + "".join(f"\n    {t}" for t in (mutant.old, mutant.new) if t))
                    progress.print(line, markup=False, highlight=False)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            odd.append(f"interrupted after {counts.total()} of {len(mutants)}")
    print(", ".join(f"{count} {ending}" for ending, count in counts.items() if count))
    print("\n".join(["unexpected:", *odd]) if odd else "all as expected")
    return bool(odd)


@contextmanager
def copies(count: int):
    """As many copies of the tracked and new files, as a queue of free ones."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    trees: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for number in range(count):
            tree = Path(folder) / str(number)
            for name in names.splitlines():
                if (ROOT / name).is_file():
                    (tree / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / name, tree / name)
            trees.put(tree)
        yield trees


def run_one(trees: SimpleQueue, mutant: Mutant) -> str:
    tree = trees.get()
    file = tree / mutant.file
    before = file.read_text(encoding="utf-8")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the server, which starts with the first process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=run_tests, args=(tree, mutant.tests))
    try:
        if mutant.old:
            file.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            return f"over {LIMIT} s"
        return ENDINGS.get(process.exitcode, f"pytest ended with {process.exitcode}")
    finally:
        file.write_text(before, encoding="utf-8")
        trees.put(tree)


def run_tests(tree: Path, tests: tuple[str, ...]) -> None:
    """Run tests of the copy in this process, which imported nothing of the project but this module."""
    import pytest

    os.chdir(tree)
    for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
        del sys.modules[name]
    sys.path = [str(tree), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    sys.dont_write_bytecode = True  # a mutant may have the size and second of the text before it
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
    sys.exit(pytest.main([*options, *tests]))


if __name__ == "__main__":
    main()
