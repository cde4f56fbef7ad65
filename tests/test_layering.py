"""Imports point down only, and each outside library has its rooms."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first; a module may import from its own level and below. The longest prefix decides.
LEVELS = (
    (
        "moa.ranges",
        "moa.strict_yaml",
        "moa.settings",
        "moa.command",
        "moa.atomic",
        "moa.processes",
        "moa.gating",
        "moa.spelling",
        "moa.metrics",
        "data.sample",
        "data.batch",
    ),
    (
        "moa.config",
        "moa.peft_io",
        "moa.mixing",
        "moa.losses",
        "moa.contrastive",
        "moa.packing",
        "moa.targets",
    ),
    ("moa.expert_linear", "moa.expert_state", "moa.experts", "moa.router", "moa.decisions", "data"),
    ("moa.backbones",),
    ("moa.model",),
    ("moa.clip_model",),
    ("moa.build", "moa.fingerprint", "moa.checkpoint", "moa.merging", "moa.analysis"),
    ("moa.training", "moa.benchmarks", "moa.federated"),
    ("moa.planning",),
    ("train", "eval", "scripts", "benchmarks"),
)
# Library -> the only modules that may import it; whatever else must work without it.
ROOMS = {
    "transformers": ("moa.backbones", "scripts", "benchmarks"),
    "open_clip": ("moa.backbones", "scripts", "benchmarks"),
    "accelerate": ("moa.training", "moa.checkpoint", "train", "eval"),
    "peft": ("benchmarks",),
    "deepspeed": ("moa.training.zero",),
    "flwr": ("moa.federated",),
    "pycocoevalcap": ("moa.metrics.captions",),
    "lmms_eval": ("moa.benchmarks.harness",),
    "multiprocessing": ("data.workers", "benchmarks"),  # there a worker ends with its parent
}
# Modules and packages of tensors, strings and numbers alone.
MATH = (
    *("moa.gating", "moa.losses", "moa.contrastive", "moa.mixing", "moa.decisions", "moa.router"),
    *("moa.metrics", "moa.packing", "moa.expert_linear", "moa.expert_state", "moa.experts"),
    *("moa.targets",),
    *("moa.merging.core", "moa.merging.linear"),
)
NOT_IN_MATH = ("moa.config", "moa.settings", "logging", "accelerate", "omegaconf")


@cache
def sources() -> dict[str, Path]:
    """Module name -> file, for everything but tests."""
    folders = ("moa", "data", "scripts", "benchmarks")
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
            # `from moa import losses` means the module moa.losses
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(module: str, *prefixes: str) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def level(module: str) -> int | None:
    """The level of the longest prefix that names the module."""
    found = [
        (len(prefix), i) for i, row in enumerate(LEVELS) for prefix in row if inside(module, prefix)
    ]
    return max(found)[1] if found else None


def test_every_module_has_a_level():
    packages = ("moa", "data", "scripts", "benchmarks")
    lost = [name for name in sources() if level(name) is None and name not in packages]
    assert not lost, f"{lost} stand in no row of LEVELS"


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
        if any(inside(name, library) for name in imports(module))
        and not inside(module, *ROOMS[library])
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
        if inside(other, "moa") and not inside(other, "moa.config", "moa.atomic", "moa.settings")
        if other in sources() and other != "moa"
    ]
    assert not strays, "\n".join(strays)
