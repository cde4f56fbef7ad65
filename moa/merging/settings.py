"""What scripts.merge can be told."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from moa.cli.ranges import Count, FilePath, Positive
from moa.merging.checkpoints.full import Rules
from moa.merging.core import parse_rank
from moa.merging.plan import SiteRule


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    method: str = "linear"  # `method=list` prints all, with their options and papers
    options: dict[str, Any] = field(default_factory=dict)  # of the method: options.scale=0.3
    adapters: list[FilePath] = field(default_factory=list)  # PEFT folders; A/* means every one in A
    # instead of adapters: a run or step folder, whose experts are merged
    run: FilePath | None = None
    models: list[FilePath] = field(default_factory=list)  # or whole checkpoints, with base=
    rules: Rules = field(default_factory=Rules)  # for keys that not all models have alike
    # other settings for some sites, the first match counts: [{match: mlp, method: ties, rank: 8}]
    sites: list[SiteRule] = field(default_factory=list)
    # method=passthrough: [{model: FOLDER, layers: [start, stop]}, ...], stacked into one checkpoint
    slices: list[dict[str, Any]] = field(default_factory=list)
    # path of these layers (model.layers), where a model has several stacks
    stack: str | None = None
    # [1,1] as adapters, {NAME: 1}, gates, gates:TASK: the router's mean, or FILE.json of
    # scripts.learn_weights; null: the method's own
    weights: Any = None
    routing: FilePath | None = None  # report that `gates` reads; null: the run's eval/routing.json
    rank: Any = "sum"  # of the result: a number, sum (exact), or energy:0.99 (the least that does)
    # where the method works, null: its own; `method=list` prints the choices
    space: str | None = None
    out: FilePath | None = None  # folder to write
    # trained projector for merged=true, such as PARTS/projector.safetensors of scripts.merge_parts
    projector: FilePath | None = None
    merged: bool = False  # write a whole checkpoint with the base's keys instead of an adapter
    base: FilePath | None = None  # base model; null: the one that run or adapters name
    other_base: bool = False  # go on with a base that the experts were not trained on
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as the inputs
    max_shard_gb: Positive = 5.0  # largest file of a checkpoint
    verify: bool = True  # reload in a fresh process and compare
    num_probes: Count = 4  # prompts in that comparison
    new_tokens: Count = 8  # greedy tokens of each
    fidelity: bool = True  # write fidelity.json and fidelity.html

    def __post_init__(self) -> None:
        parse_rank(self.rank)
        check_effects(self)


INPUTS = ("adapters", "run", "models", "slices")
# What is merged -> the settings, beside method and out, that have no effect on it.
WITHOUT_EFFECT = {
    "adapters": {"rules", "stack"},
    "run": {"rules", "stack"},
    "models": {
        *("stack", "sites", "rank", "space", "routing", "projector", "merged", "verify"),
        "other_base",
        *("num_probes", "new_tokens", "fidelity"),
    },
}
WITHOUT_EFFECT["slices"] = (WITHOUT_EFFECT["models"] - {"stack"}) | {
    *("options", "rules", "weights", "base", "dtype"),
}


def check_effects(config: MergeConfig) -> None:
    """ValueError for two kinds of input at once, and for a setting that would change nothing."""
    given = [key for key in INPUTS if getattr(config, key)]
    if len(given) > 1:
        raise ValueError(f"{', '.join(given)}: give one of them")
    changed = [item.name for item in fields(config) if getattr(config, item.name) != _default(item)]
    unused = dict.fromkeys(WITHOUT_EFFECT[given[0]], f"with {given[0]}=") if given else {}
    if given and given[0] in ("adapters", "run"):
        if not config.merged:
            unused["max_shard_gb"] = "on an adapter, which is one file; merged=true writes shards"
        if not config.verify:
            unused |= dict.fromkeys(("num_probes", "new_tokens"), "with verify=false")
        if not str(config.weights).startswith("gates"):
            unused["routing"] = "without weights=gates"
    for key in changed:
        if key in unused:
            raise ValueError(f"{key}: has no effect {unused[key]}; leave it out")


def _default(item: Any) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()
