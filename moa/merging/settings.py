"""The settings of scripts.merge (of experts, of whole checkpoints, of stacked layers) and of scripts.distill."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from moa.cli.ranges import Count, CountOrZero, FilePath, NotNegative, Positive, Seed, ShareAboveZero, Size
from moa.cli.settings import Override, apply_override, expanded, load
from moa.cli.strict_yaml import read_yaml
from moa.merging.rank import parse_rank

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Metric = Literal["weights", "inputs"]
Norm = Literal["own", "mean"]


@dataclass(frozen=True, kw_only=True)
class SiteRule:
    """Other settings for the sites that `match`; what is null is the merge's own."""

    # regular expression, found anywhere in a site's path; the first rule that fits decides
    match: str
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # null method: on top of the merge's own
    weights: Any = None
    rank: Any = None
    space: str | None = None
    # of the result, along the depth: [0.2, 1] rises from the first layer to the last
    scale: list[float] = field(default_factory=lambda: [1.0])
    drop: bool = False  # leave the base as it is at these sites

    def __post_init__(self) -> None:
        if self.match:
            from moa.files.targets import fits

            fits(self.match, "", "sites.match")
        if self.rank is not None:
            parse_rank(self.rank)
        if not self.scale or not all(map(math.isfinite, self.scale)):
            rule = "must be one finite number, or several along the depth"
            raise ValueError(f"sites.scale: of {self.match!r} {rule}, got {self.scale}")


@dataclass(frozen=True, kw_only=True)
class MergeExperts:
    """LoRA experts, of folders or of a run, become one adapter or a whole checkpoint."""

    adapters: list[FilePath] = field(default_factory=list)  # PEFT folders; A/* means every one in A
    # instead of adapters: a run or step folder, whose experts are merged
    run: FilePath | None = None
    method: str = "linear"  # `method=list` prints all, with their options and papers
    options: dict[str, Any] = field(default_factory=dict)  # of the method: options.scale=0.3
    # other settings for some sites, the first match counts: [{match: mlp, method: ties, rank: 8}]
    sites: list[SiteRule] = field(default_factory=list)
    # [1,1] as adapters, {NAME: 1}, gates, gates:TASK: the router's mean, or FILE.json of
    # scripts.learn_weights; null: the method's own
    weights: Any = None
    routing: FilePath | None = None  # report that `gates` reads; null: the run's eval/routing.json
    approximate: bool = False  # a run that routes each token: merge by its mean gates all the same
    rank: Any = "sum"  # of the result: a number, sum (exact), or energy:0.99 (the least that does)
    # what a cut to the rank keeps most of: the weights' energy, or the outputs' on the experts' own inputs, which
    # needs their statistics (scripts.statistics)
    metric: Metric = "weights"
    # length of the result at each site: the method's own, or the mean of the experts', as their weights (Pico, 2026)
    norm: Norm = "own"
    # where the method works, null: its own; `method=list` prints the choices
    space: str | None = None
    # experts that are not merged but added to the result at their weight, such as one that is subtracted from it
    added: list[str] = field(default_factory=list)
    out: FilePath | None = None  # folder to write
    # trained projector for merged=true, such as PARTS/projector.safetensors of scripts.merge_parts
    projector: FilePath | None = None
    merged: bool = False  # write a whole checkpoint with the base's keys instead of an adapter
    base: FilePath | None = None  # base model; null: the one that run or adapters name
    other_base: bool = False  # allow a base that the experts were not trained on
    dtype: Dtype = "auto"  # auto: as the inputs
    max_shard_gb: Positive = 5.0  # largest file of a checkpoint
    verify: bool = True  # reload in a fresh process and compare
    num_probes: Count = 4  # prompts in that comparison
    new_tokens: Count = 8  # greedy tokens of each
    fidelity: bool = True  # write fidelity.json and fidelity.html

    def __post_init__(self) -> None:
        parse_rank(self.rank)
        if self.adapters and self.run:
            raise ValueError("adapters, run: give one of them")
        if self.adapters or self.run:
            self.check_effects()
        if self.projector is not None and self.run is not None:
            raise ValueError("projector: a run has its own; name its experts by adapters=")
        if self.projector is not None and not self.merged:
            raise ValueError("projector: no LoRA adapter can hold it; use merged=true")

    def check_effects(self) -> None:
        """ValueError for a setting that would change nothing beside the others."""
        unused = {}
        if not self.merged:
            unused["max_shard_gb"] = "on an adapter, which is one file; merged=true writes shards"
        if not self.verify:
            unused |= dict.fromkeys(("num_probes", "new_tokens"), "with verify=false")
        if not str(self.weights).startswith("gates"):
            unused["routing"] = "without weights=gates"
        for item in fields(self):
            if item.name in unused and getattr(self, item.name) != item.default:
                raise ValueError(f"{item.name}: has no effect {unused[item.name]}; leave it out")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What becomes of keys that not all models have alike."""

    # a model lacks a key of the base: error, or base (it changed nothing there)
    missing: Literal["error", "base"] = "error"
    extra: Literal["error", "drop"] = "error"  # a model has a key that the base lacks
    # a model has a key in another shape: error, or base (keep the base's)
    shape: Literal["error", "base"] = "error"
    # a model's config.json differs from the base's: error, or base (the result gets the base's)
    config: Literal["error", "base"] = "error"


@dataclass(frozen=True, kw_only=True)
class MergeModels:
    """Whole checkpoints of one base become one, tensor by tensor."""

    models: list[FilePath] = field(default_factory=list)  # checkpoint folders
    base: FilePath | None = None  # the checkpoint that they were trained from
    method: str = "linear"
    options: dict[str, Any] = field(default_factory=dict)
    weights: Any = None  # [1,1] as models, or {NAME: 1}; null: the method's own
    rules: Rules = field(default_factory=Rules)  # for what not all models have alike
    out: FilePath | None = None
    dtype: Dtype = "auto"
    max_shard_gb: Positive = 5.0


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Layers start to stop (not included) of a model's stack."""

    model: FilePath
    layers: list[CountOrZero]  # [start, stop]

    def __post_init__(self) -> None:
        if len(self.layers) != 2 or self.layers[0] >= self.layers[1]:
            raise ValueError(f"slices.layers: must be [start, stop], start below stop, got {self.layers}")


@dataclass(frozen=True, kw_only=True)
class StackLayers:
    """Layers of whole checkpoints, one slice on the other, become a checkpoint of another depth."""

    # [{model: FOLDER, layers: [start, stop]}, ...]
    slices: list[Slice] = field(default_factory=list)
    # path of these layers (model.layers), where a model has several stacks
    stack: str | None = None
    method: Literal["passthrough"] = "passthrough"
    out: FilePath | None = None
    max_shard_gb: Positive = 5.0


ZERO = "zero"  # where a student starts: from an update of zero


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A run's routed mixture is taught to one LoRA."""

    run: FilePath | None = None  # run or step folder: the teacher
    out: FilePath | None = None  # folder of the adapter; OUT.steps beside it holds what is not finished
    rank: Size = 8  # of the student
    alpha: Positive | None = None  # scaling is alpha / rank; null: rank
    start: FilePath = ZERO  # zero, or a PEFT folder of at most this rank, such as one of scripts.merge
    # what decides the teacher's gates: router, oracle (each sample's own expert), or another of eval.gates
    gates: str = "router"
    sources: list[str] | None = None  # names of the run's data.sources whose prompts are used; null: all
    # the answers whose tokens are compared: the teacher's own, or those of the data
    answers: Literal["teacher", "data"] = "teacher"
    # kl: divergence from the teacher's probabilities; labels: cross-entropy of the answers' tokens
    loss: Literal["kl", "labels"] = "kl"
    temperature: Positive = 1.0  # of both probabilities in kl
    hidden: NotNegative = 0.0  # weight of the distance between hidden states, mean over the blocks with experts
    reduction: Literal["mean", "worst"] = "mean"  # over the tasks of a step
    steps: CountOrZero = 100
    batch_size: Size = 24  # samples of a step
    micro_batch_size: Size | None = None  # samples per forward; null: all of a step
    lr: Positive = 1e-3  # of Adam; cosine down to 0
    warmup_steps: CountOrZero = 0  # linear from 0
    max_new_tokens: Size | None = None  # of the teacher's answers; null: the run's eval.max_new_tokens
    num_samples: Count = 32  # of each validation set, on which student and teacher are compared before and after
    seed: Seed = 0  # of the student's initialisation and of the order of the prompts
    save_every: Count = 50  # steps; the same command again continues there
    overwrite: bool = False  # start anew what an earlier command did not finish
    device: str = "auto"  # cpu, cuda, cuda:1; auto: a GPU where there is one
    verify: bool = True  # reload in a fresh process and compare
    num_probes: Count = 4  # prompts in that comparison
    new_tokens: Count = 8  # greedy tokens of each

    def __post_init__(self) -> None:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps: must be in 0..{self.steps}, got {self.warmup_steps}")
        if self.micro_batch_size is not None and self.reduction == "worst":
            raise ValueError("micro_batch_size: reduction=worst needs all samples of a step in one forward")
        if self.loss == "labels" and self.temperature != 1:
            raise ValueError("temperature: has no effect with loss=labels; leave it out")


@dataclass(frozen=True, kw_only=True)
class TransplantConfig:
    """A text model's update is put on the language model of a VLM."""

    vlm: FilePath | None = None  # checkpoint of the VLM
    adapter: FilePath | None = None  # PEFT LoRA of a text model
    model: FilePath | None = None  # or a whole text model, such as a tuned or a reward model
    # the text model's base; of an adapter null: the one that it names, where that is a folder
    text: FilePath | None = None
    out: FilePath | None = None  # folder to write: an adapter, or of a whole model a checkpoint
    weight: float = 1.0  # of the update; below 0 subtracts it
    # regular expressions: layers (of an adapter) or weights (of a model) that stay behind, such as score or lm_head
    drop: list[str] = field(default_factory=list)
    # of an adapter whose text base is another one of the family than the VLM's: by what both do on the same texts, or
    # by the singular vectors of their weights
    carry: Literal["activations", "frames"] | None = None
    texts: FilePath | None = None  # of carry=activations: file with a text in each line, hundreds of them
    # of carry: the largest mean of the layers' errors; of a model: the largest error of its rows of tokens
    max_error: ShareAboveZero = 0.5
    other_base: bool = False  # allow another config or other ids of tokens than the VLM's language model has
    dtype: Dtype = "auto"  # auto: as the adapter, or the VLM
    max_shard_gb: Positive = 5.0  # largest file of a checkpoint
    verify: bool = True  # of an adapter: reload in a fresh process and compare
    num_probes: Count = 4  # prompts in that comparison
    new_tokens: Count = 8  # greedy tokens of each

    def __post_init__(self) -> None:
        if self.weight == 0:
            raise ValueError("weight: 0 moves nothing")
        if self.carry and self.model:
            raise ValueError("carry: is of an adapter; a whole model's difference has a place in its own base alone")
        if (self.carry == "activations") != (self.texts is not None):
            raise ValueError("texts: and carry=activations need each other")
        if self.carry is None and self.model is None and self.max_error != type(self).max_error:
            raise ValueError("max_error: has no effect without carry or model; leave it out")


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """A run's mixture for engines that take a LoRA, or scales, per request."""

    run: FilePath | None = None  # run or step folder
    out: FilePath | None = None  # folder to write
    num_samples: Count = 64  # of each validation set, which the router sees
    precision: ShareAboveZero = 0.1  # gates that are alike when rounded to it share an adapter
    max_vectors: Count = 8  # adapters at most, the most frequent first
    batch_size: Size = 16  # samples that are routed at once
    seed: Seed = 0  # of the choice of samples
    dtype: Dtype = "auto"  # of the adapters; auto: as the experts
    verify: bool = True  # reload each adapter in a fresh process and compare
    num_probes: Count = 4  # prompts in that comparison
    new_tokens: Count = 8  # greedy tokens of each


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """A store of experts; which action reads which setting: scripts/store.py."""

    store: FilePath = "store"  # folder, or hf:ORG/NAME, a repository of the hub
    run: FilePath | None = None  # run or step folder: to publish its experts, or to equip a copy of it with one more
    adapters: list[FilePath] = field(default_factory=list)  # to publish instead: PEFT folders; A/* means all in A
    # NAME or NAME@VERSION of an expert; publish: of a single one, null: its folder's
    name: str | None = None
    license: str | None = None  # of what is published, as the hub calls it (apache-2.0); null: the base's
    update: bool = False  # publish: other weights of a name become its next version
    text: str | None = None  # find: in the name, a task or a data set
    # find: experts of this base alone; compose: the base, null: the one that the experts name
    base: FilePath | None = None
    # equip: whose samples the expert gets, of a run whose router learned by gradient; null: those of its own task
    task: str | None = None
    expression: str | None = None  # compose: "caption + 2 * ocr_vqa - toxic"
    method: str | None = None  # compose: one of scripts.merge, the signed numbers its weights; null: by what is known
    rank: Any = "sum"  # compose: as in scripts.merge
    verify: bool = True  # compose: reload in a fresh process and compare
    out: FilePath | None = None  # folder to write

    def __post_init__(self) -> None:
        parse_rank(self.rank)


Verified = MergeExperts | DistillConfig | TransplantConfig | ServingConfig  # whose exports are compared

# What is merged -> the settings of that command.
COMMANDS: Mapping[str, type] = {
    "adapters": MergeExperts,
    "run": MergeExperts,
    "models": MergeModels,
    "slices": StackLayers,
}


def load_command(paths: Sequence[str] | None, overrides: Sequence[Override]) -> Any:
    """The settings of the command that the inputs choose; ValueError for a setting of another one, which it ignores."""
    raw = {key: value for path in paths or () for key, value in read_yaml(expanded(path)).items()}
    for override in overrides:
        apply_override(raw, override)
    given = [key for key in COMMANDS if raw.get(key)]
    if len(given) > 1:
        raise ValueError(f"{', '.join(given)}: give one of them")
    chosen = given[0] if given else "slices" if raw.get("method") == "passthrough" else "adapters"
    for key in raw.keys() - _keys(COMMANDS[chosen]):
        if others := [f"{name}=" for name, cls in COMMANDS.items() if key in _keys(cls)]:
            raise ValueError(f"{key}: has no effect with {chosen}=; it belongs to {' and '.join(others)}")
    return load(COMMANDS[chosen], paths, overrides)


def _keys(cls: Any) -> set[str]:
    return {item.name for item in fields(cls)}
