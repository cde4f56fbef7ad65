"""Imports point down only, and each outside library has its rooms."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests import ROOT

# The rooms, lowest first; a module may import from its own level and below. The longest prefix decides.
LEVELS = (
    ("moa.cli", "moa.metrics", "moa.packing", "moa.contrastive", "moa.routing"),
    ("data.sample", "data.batch", "data.readers.names"),
    ("data.config", "moa.sections", "moa.config", "moa.files"),
    ("moa.statistics.moments", "moa.statistics.stored"),
    ("moa.experts",),
    ("data",),
    ("moa.backbones", "moa.benchmarks", "moa.analysis"),
    ("moa.model",),
    ("moa.clip_model", "moa.parts"),
    ("moa.build",),
    ("moa.card", "moa.checkpoint", "moa.statistics"),
    ("moa.training", "moa.evaluation"),
    ("moa.merging", "moa.planning", "moa.federated"),
    ("moa.loaded", "moa.evaluation.lmms_eval", "moa.playground"),
    ("train", "eval", "federate", "scripts", "bench"),
)  # fmt: skip
# Library -> the only modules that may import it; whatever else must work without it.
ROOMS = {
    "transformers": ("moa.backbones", "scripts", "bench"),
    "open_clip": ("moa.backbones", "scripts", "bench"),
    "accelerate": ("moa.training", "moa.checkpoint", "train", "eval"),
    "peft": ("bench",),
    "deepspeed": ("moa.training.distributed.zero",),
    "flwr": ("moa.federated",),
    "dp_accounting": ("moa.federated.privacy",),
    "pycocoevalcap": ("moa.metrics.captions",),
    "lmms_eval": ("moa.evaluation.lmms_eval",),
    "nicegui": ("moa.playground.page",),
    "multiprocessing": ("data.workers", "bench"),  # there a worker ends with its parent
}
# Rooms of tensors, strings and numbers alone: no settings, no paths, no console.
MATH = (
    *("moa.routing", "moa.experts", "moa.metrics", "moa.packing", "moa.contrastive"),
    *("moa.merging.methods", "moa.merging.core", "moa.statistics.moments"),
    *(
        f"moa.federated.{name}"
        for name in ("role", "pieces", "rules", "aggregate", "partition", "assignment", "groups")
    ),
)
NOT_IN_MATH = (
    "moa.config",
    "moa.sections",
    "moa.cli.settings",
    "moa.cli.command",
    "logging",
    "accelerate",
    "omegaconf",
    "rich",
)


@cache
def sources() -> dict[str, Path]:
    """Module name -> file, for everything but tests."""
    folders = ("moa", "data", "scripts", "bench")
    files = [*ROOT.glob("*.py"), *(f for folder in folders for f in (ROOT / folder).rglob("*.py"))]
    names = {file: file.relative_to(ROOT).with_suffix("").as_posix() for file in files}
    return {name.replace("/", ".").removesuffix(".__init__"): f for f, name in names.items()}


@cache
def imports(module: str) -> frozenset[str]:
    """Every module that a module imports, inside functions too."""
    return frozenset(_imports(ast.parse(sources()[module].read_text())))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute here"
            yield node.module
            # `from moa import losses` means the module moa.routing.losses
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(module: str, *prefixes: str) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def level(module: str) -> int | None:
    """The level of the longest prefix that names the module."""
    found = [(len(prefix), i) for i, row in enumerate(LEVELS) for prefix in row if inside(module, prefix)]
    return max(found)[1] if found else None


def test_every_module_has_a_level():
    packages = ("moa", "data", "scripts", "bench")
    lost = [name for name in sources() if level(name) is None and name not in packages]
    assert not lost, f"{lost} stand in no row of LEVELS"


@pytest.mark.slow
def test_imports_point_down():
    upwards = [
        f"{module} (level {level(module)}) imports {other} (level {level(other)})"
        for module in sources()
        for other in sorted(imports(module) & sources().keys())
        if level(module) is not None and level(other) is not None and level(other) > level(module)
    ]
    assert not upwards, "\n".join(upwards)


def test_no_modules_import_each_other_in_a_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module in done:
            return
        for other in sorted(imports(module) & sources().keys()):
            visit(other, (*path, module))
        done.add(module)

    for module in sources():
        visit(module, ())


@pytest.mark.parametrize("library", ROOMS)
def test_a_library_stays_in_its_rooms(library):
    strays = [
        module
        for module in sources()
        if any(inside(name, library) for name in imports(module)) and not inside(module, *ROOMS[library])
    ]
    assert not strays, f"{strays} import {library}; only {ROOMS[library]} may"


@pytest.mark.parametrize("module", [name for name in sources() if inside(name, *MATH)])
def test_the_mathematics_takes_tensors_strings_and_numbers(module):
    found = [name for name in imports(module) if inside(name, *NOT_IN_MATH)]
    assert not found, f"{module} imports {found}"


def test_data_knows_no_model():
    strays = [
        f"{module} imports {other}"
        for module in sources()
        if inside(module, "data")
        for other in imports(module)
        if inside(other, "moa") and not inside(other, "moa.config", "moa.sections", "moa.files.atomic", "moa.cli")
        if other in sources() and other != "moa"
    ]
    assert not strays, "\n".join(strays)
