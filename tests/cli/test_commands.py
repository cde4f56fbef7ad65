"""Every command: its help comes at once, without the libraries of its work; what is not installed is named."""

import os
import subprocess
import sys

import pytest

from moa.cli.settings import expanded
from tests import ROOT

COMMANDS = ["train", "eval", "federate"] + sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for folder in ("scripts", "bench")
    for file in (ROOT / folder).rglob("*.py")
    if "__main__" in file.read_text()
)
# Prints the help of a module as `python -m` does, then what was imported for it and the memory taken.
HELP = """
import re, runpy, sys
from pathlib import Path
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    heavy = {"torch", "transformers", "accelerate", "datasets", "matplotlib", "scipy"} & set(sys.modules)
    peak = re.search("VmHWM: *(\\d+)", Path("/proc/self/status").read_text().replace("\t", " "))[1]
    print("ENDED", end.code, sorted(heavy), int(peak) < 150 * 1024)  # kiB; getrusage counts the parent's, too
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_without_the_libraries_of_the_work(command):
    done = subprocess.run([sys.executable, "-c", HELP, command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("ENDED 0 [] True"), done.stdout[-300:] + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) > 5


def test_a_library_of_an_extra_that_is_absent_is_named_with_its_extra():
    code = "import sys; sys.modules['nevergrad'] = None\nfrom moa.cli.command import mistakes_in_one_line\n"
    code += "with mistakes_in_one_line():\n    import nevergrad"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2, "error: nevergrad is not installed: pip install 'moa[merging]'\n"
    )  # fmt: skip


def test_the_installed_assets_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.path.samefile(expanded("assets/demo_base"), ROOT / "assets" / "demo_base")
    assert expanded("assets/mine") == "assets/mine"
    (tmp_path / "assets" / "demo_base").mkdir(parents=True)
    assert expanded("assets/demo_base") == "assets/demo_base"
