"""The commands on the pages: modules, configs and settings that are there."""

import dataclasses
import importlib
import inspect
import re
import shlex
from types import ModuleType

import pytest

from moa.cli.settings import load
from moa.config import RunConfig, load_config
from moa.evaluation.settings import EvalCommand
from moa.federated.config import FederateConfig
from tests import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[list[str]]:
    """The commands of this project in the bash blocks of a page, as words."""
    found = []
    for block in re.findall(r"^ *```bash\n(.*?)```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            start = next((n for n, w in enumerate(words) if w in ("train.py", "eval.py", "federate.py")), None)
            if start is None and "-m" in words and words[(at := words.index("-m")) + 1 :]:
                start = at + 1 if words[at + 1].startswith(("scripts.", "bench.")) else None
            if start is not None:
                found.append([w for w in words[start:] if w not in ("&", "\\")])
    return found


def settings_of(name: str) -> list[type]:
    """The settings that a command may take: a dataclass of its module, or of the run."""
    own = {"train.py": [RunConfig], "eval.py": [EvalCommand], "federate.py": [FederateConfig]}
    if name in own:
        return own[name]
    values = vars(module_of(name)).values()
    return [value for value in values if dataclasses.is_dataclass(value) and isinstance(value, type)]


def module_of(name: str) -> ModuleType:
    return importlib.import_module(name.removesuffix(".py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_modules_configs_and_settings_that_are_there(page):
    for name, *words in commands(page.read_text()):
        known = {field.name for cls in [*settings_of(name), RunConfig] for field in dataclasses.fields(cls)}
        for word in words:
            if re.match(r"[a-z_]+[.=]", word) and "=" in word:
                key = re.split(r"[.=]", word)[0]
                assert key in known or f" {key}=" in (inspect.getdoc(module_of(name)) or ""), f"{name} has no {word}"
            elif word.startswith("configs/") and not re.search(r"NAME|mine|\*", word):
                assert (ROOT / word).exists(), f"{name} {word}: no such file"


def test_the_files_of_the_tutorials_are_configs_that_lie_over_each_other(tmp_path):
    blocks = re.findall(r"```yaml\n# (\w+\.yaml)\n(.*?)```", (ROOT / "docs" / "tutorials.md").read_text(), re.S)
    files = {name: tmp_path / name for name, _ in blocks}
    for name, text in blocks:
        files[name].write_text(text)
    assert [*files] == ["mixture.yaml", "skill.yaml", "parties.yaml"]
    assert load_config(files["mixture.yaml"]).experts["vqa"].frozen
    grown = load_config([files["mixture.yaml"], files["skill.yaml"]])
    assert [*grown.experts] == ["vqa", "grounding", "count"] and [*grown.stages] == ["experts", "all_tasks"]
    parties = load(FederateConfig, [files["mixture.yaml"], files["parties.yaml"]])
    assert [*parties.run().stages] == ["joint"] and not parties.run().experts["vqa"].frozen
