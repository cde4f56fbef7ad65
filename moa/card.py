"""README.md of what is handed over: what it is, its base, what it was made of, how to prompt and to load it.

The front matter is that of the Hugging Face hub. What is unknown or was not measured is left out; the license is the
base's own. eval.py puts the scores of an export into its card.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.config import SourceConfig
from moa.backbones.fingerprint import base_fingerprint
from moa.config import RunConfig

CARD, REPORT_FILE = "README.md", "export_report.json"  # of an export
LICENSE_KEYS = ("license", "license_name", "license_link")
IMAGE_TEXT, DUAL = "AutoModelForImageTextToText", "AutoModel"
LOAD = {
    "adapter": """from peft import PeftModel
from transformers import AutoProcessor, {auto}

processor = AutoProcessor.from_pretrained({base!r})
model = {auto}.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, {folder!r})""",
    "checkpoint": """from transformers import AutoProcessor, {auto}

processor = AutoProcessor.from_pretrained({folder!r})
model = {auto}.from_pretrained({folder!r})""",
    "open_clip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + {folder!r})
tokenizer = open_clip.get_tokenizer("local-dir:" + {folder!r})""",
    "step": """from moa.checkpoint import load_model

model, collator, config = load_model({folder!r})""",
}
CHECKED = "Reloaded in a fresh process: the largest logit difference, and the share of equal greedy tokens,"
OF_RUN = "Of the run that this comes from, as its router mixes the experts. This export itself was not scored."
MIXES = ("expert", "version", "cosine", "crosstalk: on its samples", "on those of the other")
LIBRARY = {"adapter": "peft", "checkpoint": "transformers", "open_clip": "open_clip"}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a README.md says; `rows` are name, weight and origin of each expert or model."""

    name: str
    kind: str  # of LOAD
    about: str  # one sentence
    base: str | None
    fingerprint: str | None = None
    rows: Sequence[tuple[str, str, str]] = ()
    config: RunConfig | None = None  # of the run that it comes from
    sources: Sequence[SourceConfig] = ()  # that it was trained on
    checks: Sequence[str] = field(default_factory=list)
    gates: Sequence[Sequence[str]] = ()  # by task, the head first, of the run
    scores: Sequence[Sequence[str]] = ()  # of the run, as `with_scores` takes them
    license: Mapping[str, Any] | None = None  # keys of the front matter; None: the base's
    mixes: Sequence[Sequence[str]] = ()  # with the experts of a store

    def text(self) -> str:
        base = hub_name(self.base) if self.base else "BASE"
        known = f", fingerprint `{self.fingerprint}`" if self.fingerprint else ""
        data = [(s.name, s.task or "", s.split or "", s.path or s.format) for s in self.sources]
        checks = [f"- {line}" for line in self.checks]
        parts = [
            _front_matter(self.kind, self.base, self.license),
            f"# {self.name}\n\n{self.about}",
            f"## Base\n\n`{base}`{known}. Another base, or other weights of it, give other answers.",
            _table("experts", ("name", "weight", "from"), self.rows),
            _table("data", ("source", "task", "split", "from"), data),
            _table("gates of the run, by task", self.gates[0], self.gates[1:]) if self.gates else "",
            _prompt_lines(self.config) if self.config else "",
            "\n".join(["## Checked\n", CHECKED, "", *checks]) if checks else "",
            _table("beside other experts", MIXES, self.mixes),
            "## Load\n\n```python\n"
            + LOAD[self.kind].format(auto=auto_class(self.base), base=base, folder=self.name)
            + "\n```",
        ]
        text = "\n\n".join(filter(None, parts)) + "\n"
        return with_scores(text, OF_RUN, self.scores) if self.scores else text


def with_scores(card: str, whose: str, rows: Sequence[Sequence[str]]) -> str:
    """A card with these scores in place of those that it may have: data set, metric, score, questions."""
    head = ("data set", "metric", "per cent (95 % interval)", "questions")
    section = _table("scores", head, rows).replace("\n\n", f"\n\n{whose}\n\n", 1)
    rest = re.sub(r"^## Scores\n.*?(?=^## )", "", card, flags=re.M | re.S)
    return rest.replace("## Load\n", f"{section}\n\n## Load\n", 1)


def hub_name(base: str) -> str:
    """ORG/NAME where the path is a snapshot in the hub's cache, else the name as it is."""
    cached = re.search(r"models--(.+?)--([^/]+)/snapshots/", f"{base}/")
    return f"{cached[1]}/{cached[2]}" if cached else base


def local_fingerprint(base: str | Path | None) -> str | None:
    """Of a base in a folder here; None for one of the hub, which need not be here."""
    folder = Path(base).expanduser() if base else None
    return base_fingerprint(folder) if folder and (folder / "config.json").is_file() else None


def license_of(base: str | None) -> dict[str, Any]:
    """The license keys in the front matter of a local base's README.md; empty where there are none."""
    file = Path(base).expanduser() / CARD if base else None
    if file is None or not file.is_file():
        return {}
    matter = re.match(r"---\n(.*?)\n---\n", file.read_text(encoding="utf-8", errors="replace"), re.S)
    try:
        found = yaml.safe_load(matter[1]) if matter else None
    except yaml.YAMLError:
        found = None
    return {k: found[k] for k in LICENSE_KEYS if k in found} if isinstance(found, dict) else {}


def auto_class(base: str | None) -> str:
    file = Path(base).expanduser() / "config.json" if base else None
    known = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
    return DUAL if known.get("model_type") in ("clip", "siglip") else IMAGE_TEXT


def _front_matter(kind: str, base: str | None, given: Mapping[str, Any] | None) -> str:
    matter: dict[str, Any] = {"library_name": LIBRARY[kind]} if kind in LIBRARY else {}
    name = hub_name(base) if base else ""
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists():
        matter["base_model"] = name
    matter |= {"tags": ["lora", "merge"], **(license_of(base) if given is None else given)}
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    cells = ("| " + " | ".join(str(c).replace("|", r"\|") for c in line) + " |" for line in lines)
    return f"## {title.capitalize()}\n\n" + "\n".join(cells)


def _prompt_lines(config: RunConfig) -> str:
    """The question as the language model read it in training."""
    prompt = config.prompt
    tasks = config.data.tasks
    before = prompt.task_template.format(task="TASK") if prompt.task_in_prompt else ""
    after = prompt.ocr_template.format(words="WORDS") if prompt.ocr_in_prompt else ""
    lines = ["## Prompt\n", "In the base's chat template, the question as it was trained:\n"]
    lines += [f"```\n{before}QUESTION{after}\n```\n"]
    lines += [f"TASK is one of {', '.join(tasks)}."] if before and tasks else []
    lines += ["WORDS are what OCR reads in the image."] if after else []
    lines += [f"Boxes are written as `prompt.box_codec={prompt.box_codec}` does."]
    return "\n".join(lines)
