"""All settings of a run, and the rules between its sections (moa/sections.py).

    defaults there  <  YAML file  <  key.sub=value on the command line

Nothing is changed after loading.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.config import DataConfig, PromptConfig, SourceConfig, check_shares
from moa.cli.ranges import FilePath, Seed
from moa.cli.settings import Override, Wrong, check, load
from moa.routing.losses import OF_EXPERTS
from moa.routing.roles import CHOSEN, LEFT_OVER, NONE, WITH, check_roles
from moa.routing.scores import ARROW, ATTENTION
from moa.sections import (
    GATE_RULES,
    EvalConfig,
    ExpertConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    RouterConfig,
    StageConfig,
    TrainConfig,
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    out: FilePath = "runs/run"  # run folder
    # folder of the relative paths in this file; null: the working directory, which a run stores here
    root: FilePath | None = None
    seed: Seed = 0  # of initialisation, data order and dropout
    model: ModelConfig = field(default_factory=ModelConfig)
    experts: dict[str, ExpertConfig] = field(default_factory=dict)  # by name
    router: RouterConfig = field(default_factory=RouterConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)  # of the training, in order

    @property
    def choices(self) -> list[str]:
        """The experts that the router chooses among."""
        return [name for name, expert in self.experts.items() if expert.gate in CHOSEN]

    @property
    def banks(self) -> list[list[str]]:
        """The evidence of the bank of each choice; empty without banks."""
        own = [self.experts[name].bank for name in self.choices]
        return [list(bank) for bank in own if bank is not None]

    @property
    def routes(self) -> list[str]:
        """What a sample may be meant for: an expert, or none of them with a null expert."""
        return [*self.experts, *([NONE] if self.router.null_expert else [])]

    def __post_init__(self) -> None:
        check_experts(self)
        check_sources(self)
        check_stages(self)
        longest, pack = self.prompt.max_length, self.train.pack_length
        rule = f"{pack} must be prompt.max_length={longest} or more: a row holds whole samples"
        check(pack is None or pack >= longest, "train.pack_length", rule)


def check_experts(config: RunConfig) -> None:
    names, router = list(config.experts), config.router
    check(bool(names), "experts", "names none; write experts: {vqa: {rank: 8}}")
    for name in names:
        check(re.fullmatch(r"\w[\w-]*", name) is not None, f"experts.{name}", "is no folder name")
        check(name != NONE, f"experts.{name}", "means no expert (router.null_expert)")
        check(name not in GATE_RULES, f"experts.{name}", "means other gates in eval.gates; choose another name")
    check_ties(config)
    bits = config.model.quantization
    for name, expert in config.experts.items():
        rule = f"{expert.init} reads weights as they are, and model.quantization={bits} packs them"
        check(bits is None or not expert.init.startswith("svd"), f"experts.{name}.init", rule)
    gates = {name: expert.gate for name, expert in config.experts.items()}
    if broken := check_roles(gates):
        raise Wrong(f"experts.{broken[0]}.gate", broken[1])
    rest = [name for name, gate in gates.items() if gate in LEFT_OVER]
    rule = f"experts.{', '.join(rest)} takes what the router leaves, and so would no expert"
    check(not (rest and router.null_expert), "router.null_expert", rule)
    check(not (rest and router.added_up), "router.added_up", f"experts.{', '.join(rest)} takes what the router leaves")
    ranked = [name for name, expert in config.experts.items() if expert.rank_gates != "none"]
    rule = f"experts.{', '.join(ranked)}.rank_gates may be below 0, and has no square root"
    check(not (ranked and router.root_gradient), "router.root_gradient", rule)
    dropped = [name for name, expert in config.experts.items() if expert.dropout]
    rule = f"experts.{', '.join(dropped)}.dropout is a factor of the gates, and the root would be of the product"
    check(not (dropped and router.root_gradient), "router.root_gradient", rule)
    adapters = [name for name, expert in config.experts.items() if expert.kind != "lora"]
    rule = f"is for updates B A, and experts.{', '.join(adapters)} is none"
    check(not (adapters and router.root_gradient), "router.root_gradient", rule)
    bent = [*adapters, *(name for name in ranked if name not in adapters)]
    rule = f"{ARROW} is for updates B A, and experts.{', '.join(bent)} is none"
    check(not (bent and router.score == ARROW), "router.score", rule)
    hidden = [*ranked, *(name for name, expert in config.experts.items() if expert.kind == "sparse")]
    rule = f"{router.score} has keys of answers B A x, and experts.{', '.join(hidden)} has others"
    check(not (hidden and router.score == ATTENTION), "router.score", rule)
    check_banks(config)
    whole, over = router.sums[0] >= 1, router.sums[1] > 1
    rest = [name for name in rest if gates[name] == "rest" and (whole or over)]
    sums = f"gates of router.kind={router.kind} {'may sum to more than' if over else 'sum to'} 1"
    rule = f"rest would be {'below 0' if over else '0'}, as {sums}; choose top_k with router.renormalize=false"
    check(not rest, f"experts.{', '.join(rest)}.gate", rule)
    unsure = [name for name, gate in gates.items() if gate == "confidence"]
    rule = f"mean makes experts alike, and experts.{', '.join(unsure)} of gate confidence would have more than all; "
    check(not unsure or router.unknown_task != "mean", "router.unknown_task", f"{rule}choose none or route")
    choices = config.choices
    joint = [name for name in names if gates[name] == "joint"]
    one = len(choices) == 1 and router.kind not in ("sigmoid", "fixed")
    one = one or router.row.by_expert or ("top_k" in router.row.options and router.top_k == 1)
    doubtful = [name for name, gate in gates.items() if gate == "confidence" and one and whole and not joint]
    rule = f"confidence would be 0, as one gate of router.kind={router.kind} is always 1"
    check(not doubtful, f"experts.{', '.join(doubtful)}.gate", rule)
    rule = f"joint is a logit that learns, and router.kind={router.kind} has means of each expert's own samples"
    check(not joint or router.row.learns != "means", f"experts.{', '.join(joint)}.gate", rule)
    wants = bool(choices) or router.row.learns is None
    check(wants, "router.kind", f"{router.kind} has nothing to choose: no expert is routed; use router.kind=fixed")
    routed = [name for name in names if gates[name] == "routed"]
    possible = "top_k" not in router.row.options or router.top_k <= len(routed)
    check(possible, "router.top_k", f"is {router.top_k}, but there are {len(routed)} routed experts")
    votes = (router.pool == "vote" or router.granularity == "both") and config.losses.z > 0
    smooth = router.kind == "top_k" and router.noise == "gaussian"
    rule = "needs router.kind=top_k and router.noise=gaussian, whose scale makes the number of uses smooth"
    check(smooth or not config.losses.load, "losses.load", rule)
    rule = "has no effect with router.pool=vote and router.granularity=both: logits are logarithms of shares"
    check(not votes, "losses.z", rule)
    tasks = len(config.data.tasks) > 1 or not router.per_task
    check(tasks, "router.per_task", f"has no effect, it needs two tasks; data.tasks is {config.data.tasks}")
    by_task = [f"experts.{name}.rank_gates" for name, expert in config.experts.items() if expert.rank_gates == "task"]
    by_task += ["router.evidence"] if router.reads_task else []
    rule = f"names none, and {', '.join(by_task)} has task; name tasks, or leave it out there"
    check(bool(config.data.tasks) or not by_task, "data.tasks", rule)
    for name in router.weights or {}:
        rule = "no such routed expert"
        check(name in choices, f"router.weights.{name}", f"{rule}; choices: {choices}")


def check_banks(config: RunConfig) -> None:
    experts, router = config.experts, config.router
    own = {name: expert.bank for name, expert in experts.items() if expert.bank is not None}
    wanted = router.granularity == "both" and router.score == ATTENTION
    first = next(iter(own or experts))
    rule = f"and router.granularity=both with router.score={ATTENTION} need each other; "
    check(wanted == bool(own), f"experts.{first}.bank", f"{rule}{router.granularity}, {router.score}")
    if not own:
        return
    routed = [name for name, expert in experts.items() if expert.gate == "routed"]
    check([*own] == routed == config.choices, f"experts.{first}.bank", f"is for all routed experts, {routed}, or none")
    alike = all(experts[name].targets == experts[first].targets for name in own)
    check(alike, f"experts.{first}.targets", "must be the same for all experts of banks")
    kinds_of = {frozenset(bank or ()) for bank in own.values()}
    check(len(kinds_of) > 1, f"experts.{first}.bank", "is the only one: nothing is to be weighed")
    rule = f"must be what the banks read, {sorted(set().union(*kinds_of))}; got {router.evidence}"
    check(set(router.evidence) == set().union(*kinds_of), "router.evidence", rule)
    smallest = min(sum(set(bank or ()) == kind for bank in own.values()) for kind in kinds_of)
    fits = "top_k" not in router.row.options or router.top_k <= smallest
    check(fits, "router.top_k", f"is {router.top_k}, and the smallest bank has {smallest} experts")
    guided = config.losses.guidance > 0 or config.losses.guidance_end > 0
    check(
        not guided, "losses.guidance", "must be 0 with banks of experts, as must guidance_end: a sample has one expert"
    )


def check_ties(config: RunConfig) -> None:
    experts = config.experts
    groups = {key: dict[str, list[str]]() for key in ("share_a", "share_b")}
    for name, expert in experts.items():
        for key, group in (("share_a", expert.share_a), ("share_b", expert.share_b)):
            if group is not None:
                groups[key].setdefault(group, []).append(name)
        given = expert.init_from or any(stage.init_from for stage in config.stages.values())
        given = given or expert.init not in ("lora", "gaussian", "orthogonal")
        rule = "[A] trains nothing: lora_B starts at zero; give it another init or init_from, or train B"
        check(expert.factors != ["A"] or bool(given), f"experts.{name}.factors", rule)
    for key, named in groups.items():
        for group, members in named.items():
            check(len(members) > 1, f"experts.{members[0]}.{key}", f"no other expert has the group {group!r}")
            rule = f"must be the same for all experts of {key} {group!r}: {', '.join(members)}"
            layers = {tuple(experts[name].tie_layers) for name in members}
            check(len(layers) == 1, f"experts.{members[0]}.tie_layers", rule)
            inits = {experts[name].init for name in members if experts[name].init_from is None}
            check(len(inits) < 2, f"experts.{members[0]}.init", rule)
    seen = set[tuple[str, str]]()
    for name, expert in experts.items():
        if expert.share_a is not None and expert.share_b is not None:
            rule = "another expert has this lora_A and this lora_B too, so that they are one; share one of the two, or "
            rule += "give them rank_gates: core"
            alone = (expert.share_a, expert.share_b) not in seen or expert.rank_gates == "core"
            check(alone, f"experts.{name}.share_b", rule)
            seen.add((expert.share_a, expert.share_b))


def check_sources(config: RunConfig) -> None:
    data, names = config.data, config.routes
    used = [(f"data.sources.{n}.expert", s.expert) for n, s in data.sources.items()]
    used += [(f"data.validation.{n}.expert", s.expert) for n, s in data.validation.items()]
    used += [(f"eval.sources.{n}.expert", s.expert) for n, s in config.eval.sources.items()]
    used = [("data.expert", data.expert)] if data.expert else used
    for key, expert in used:
        hint = " (none: with router.null_expert=true)" if expert == NONE else ""
        rule = f"no such expert {expert!r}; choices: {names}{hint}"
        check(expert is None or expert in names, key, rule)
    for key, sources in (("data.sources", data.sources), ("data.validation", data.validation)):
        for name, source in sources.items():
            known = source.task is None or source.task in data.tasks
            choices = f"not in data.tasks; choices: {list(data.tasks)}"
            check(known, f"{key}.{name}.task", f"{source.task!r} is {choices}")
    check_shares(data.sources.values())
    engine = not data.ocr_engine or data.ocr_cache is not None
    check(engine, "data.ocr_engine", "needs data.ocr_cache, the file that its words go to")


def check_stages(config: RunConfig) -> None:
    gated = [name for name, expert in config.experts.items() if expert.rank_gates != "none"]
    learning = [name for name in gated if not config.experts[name].frozen]
    rule = "are learned with the router: no stage is router or joint"
    learned = any(stage.kind != "experts" for stage in config.stages.values()) or not config.stages
    check(learned or not learning, f"experts.{', '.join(learning)}.rank_gates", rule)
    penalised = config.losses.crosstalk > 0 or config.losses.crosstalk_end is not None
    rule = f"measures whole updates, and experts.{', '.join(gated)}.rank_gates has gates of single ranks"
    check(not (penalised and gated), "losses.crosstalk", rule)
    adapters = [name for name, expert in config.experts.items() if expert.kind != "lora"]
    rule = f"reads updates B A, and these experts are none: {', '.join(adapters)}"
    check(not (penalised and adapters), "losses.crosstalk", rule)
    check(not (config.train.statistics and adapters), "train.statistics", rule)
    trained = any(stage.kind != "router" for stage in config.stages.values()) or not config.stages
    check(trained or not penalised, "losses.crosstalk", "no stage trains experts")
    routed = [name for name, expert in config.experts.items() if expert.gate == "routed"]
    key = "losses.crosstalk" if config.losses.crosstalk else "losses.crosstalk_end"
    rule = f"has no effect, it needs two routed experts; got {routed}"
    check(len(routed) > 1 or not (config.losses.crosstalk or config.losses.crosstalk_end), key, rule)
    reads = any("A" in config.experts[name].factors and not config.experts[name].frozen for name in routed)
    rule = f"is of lora_A, which no routed expert trains (factors, frozen): {routed}"
    check(reads or not config.losses.orthogonality, "losses.orthogonality", rule)
    for loss in OF_EXPERTS:
        if getattr(config.losses, loss):
            check(trained, f"losses.{loss}", "no stage trains experts")
            pair = loss == "alignment" or len(routed) > 1
            check(pair, f"losses.{loss}", f"has no effect, it needs two routed experts; got {routed}")
            tasks = loss != "alignment" or len(config.data.tasks) > 1
            check(tasks, f"losses.{loss}", f"has no effect, it needs two tasks; data.tasks is {config.data.tasks}")
    bent = sorted({*gated, *adapters})
    rule = f"is of outputs B A x, and these experts have others: {', '.join(bent)}"
    check(not (bent and config.losses.difference), "losses.difference", rule)
    for stage in config.stages.values():
        key = f"stages.{stage.name}"
        sources = stage_sources(config, stage)
        check(bool(sources), "data.sources", f"names none, and {key} has {stage.steps} steps")
        if stage.kind == "router":
            learns = config.router.row.learns is not None and config.router.score != ARROW
            what = f"score={ARROW}" if config.router.score == ARROW else f"kind={config.router.kind}"
            check(learns, key, f"router.{what} learns nothing")
        check_gates_of_stage(config, stage, key)
        one = stage.expert or config.data.expert
        if stage.kind == "experts" and one is None:
            nobody = [s.name for s in sources if s.expert is None and s.format != "scenes"]
            rule = f"{key} trains each expert on its own samples, and these name none"
            check(not nobody, f"data.sources.{', '.join(nobody)}.expert", rule)
        if stage.kind == "experts":
            reached = {one or s.expert for s in sources} - {NONE}
            reached |= {name for name, expert in config.experts.items() if expert.gate in ("always", "joint")}
            check_reached(config, stage, reached)
            frozen = all(name in config.experts and config.experts[name].frozen for name in reached)
            rule = f"its samples are of frozen experts alone: {sorted(map(str, reached))}"
            learns = config.model.train_projector or not (reached and frozen)
            check(learns, key, rule)
        if isinstance(stage.init_from, dict):
            for name in stage.init_from:
                check(name in config.experts, f"{key}.init_from.{name}", "no such expert")


def check_reached(config: RunConfig, stage: StageConfig, reached: set[str | None]) -> None:
    """ValueError where no sample of the stage reaches one of `only`, by its gate or by a factor that it shares."""
    gates, own = stage.gates, {name: config.experts[name] for name in stage.only or ()}
    if None in reached or gates.leak or gates.leak_end or gates.blend or gates.blend_end:
        return  # samples that name their experts by themselves, and gates that reach all
    learns = any(n in reached or e.gate.removeprefix(WITH) in reached or e.share_a or e.share_b for n, e in own.items())
    rule = f"{[*own]} learns nothing: the stage's samples are of {sorted(map(str, reached))}"
    check(learns or not own, f"stages.{stage.name}.only", rule)


def check_gates_of_stage(config: RunConfig, stage: StageConfig, key: str) -> None:
    experts, gates = config.experts, stage.gates
    for setting in ("expert", "copy_of"):
        name = getattr(stage, setting)
        known = name is None or name in experts
        check(known, f"{key}.{setting}", f"no such expert {name!r}; choices: {list(experts)}")
    if stage.copy_of is not None:
        check_copies(config, stage, stage.copy_of)
    learn = [name for name, expert in experts.items() if not expert.frozen]
    for name in stage.only or ():
        check(name in learn, f"{key}.only", f"no expert that learns is called {name!r}; choices: {learn}")
    check(stage.only is None or bool(stage.only), f"{key}.only", f"names none; choices: {learn}")
    bound = [name for name in stage.only or learn if not experts[name].owns_b]
    rule = f"needs a lora_B of each expert's own that starts at zero and is trained; not so: {', '.join(bound)}"
    check(stage.kept_b is None or not bound, f"{key}.kept_b", rule)
    blends = gates.blend or gates.blend_end or gates.blend_to == "mean"
    check(bool(blends), f"{key}.gates.blend_to", f"{gates.blend_to} has no effect without {key}.gates.blend")
    granularity = config.router.granularity
    rule = f"have no effect with router.granularity={granularity}"
    check(gates.is_empty or granularity == "sample", f"{key}.gates", rule)
    counts = stage.kind == "router" and config.router.row.learns == "means"
    rule = f"have no effect with router.kind={config.router.kind}, which learns from evidence alone"
    check(gates.is_empty or not counts, f"{key}.gates", rule)
    shared = any(expert.gate in ("always", *LEFT_OVER) for expert in experts.values())
    rule = "leaves samples without any expert: none is shared (experts.NAME.gate=always)"
    check(shared or not (gates.dropout or gates.dropout_end), f"{key}.gates.dropout", rule)
    starves = [name for name in learn if experts[name].gate in LEFT_OVER and name in (stage.only or learn)]
    several = stage.kind != "experts" and len(config.choices) > 1
    rule = "needs a stage where a router decides, among two experts or more"
    check(several or not gates.expert_dropout, f"{key}.gates.expert_dropout", rule)
    fed = stage.kind != "experts" or stage.expert in starves or gates.leak or gates.blend or not starves
    rule = f"experts.{', '.join(starves)} has the gate 0 here, because one gate is 1: set {key}.gates.leak above 0"
    check(bool(fed), f"{key}.gates.leak", rule)


def check_copies(config: RunConfig, stage: StageConfig, copied: str) -> None:
    """ValueError where experts cannot be copies of `copied`, or would not answer as it does at the router's gates."""
    experts, own, key = config.experts, config.experts[copied], f"stages.{stage.name}.copy_of"
    for name, expert in experts.items():
        rule = f"{name} has another rank, alpha, targets, init or rank_gates, and so cannot be its copy"
        check(expert.shape == own.shape or expert.gate != "routed" or expert.frozen, key, rule)
    check(own.kind != "sparse", key, f"{copied} is of kind=sparse, and each such expert has places of its own")
    rule = f"{copied} has the gate {own.gate}, which is no share of 1: with it the copies are more than it"
    sharing = [name for name, expert in experts.items() if expert.gate in ("joint", *LEFT_OVER)]
    check(own.gate == "routed" or copied in sharing, key, rule)
    beside = [name for name in sharing if name != copied]
    rule = f"{', '.join(beside)} has a share of the gates, and is no copy: together they are not {copied}"
    check(not beside, key, rule)
    check(own.init != "null_space", key, "would overwrite the lora_A that init: null_space holds for each expert")
    router = config.router
    # of E shares of a softmax, one is always above a threshold below 1/E
    above = router.row.learned_threshold and (router.threshold or 0) * len(config.choices) < 1
    fits = own.gate == "rest" or ((router.sums == (1, 1) or above) and not router.added_up)
    causes = {"added_up": bool(router.added_up), f"weights of sum {router.sums[0]:g}": bool(router.weights)}
    causes |= {f"threshold={router.threshold}": router.threshold is not None and router.sums[1] == 1}
    causes |= {"renormalize=false": not router.renormalize}
    cause = next((name for name, found in causes.items() if found), f"kind={router.kind}")
    rule = f"router.{cause}: gates may sum to another number than 1, so that the mixture would not begin as {copied}; "
    rule += "choose gates of sum 1 (softmax, renormalize=true, sigmoid with normalize=true), or trains: experts"
    check(stage.kind == "experts" or fits, key, rule)


def stage_sources(config: RunConfig, stage: StageConfig) -> list[SourceConfig]:
    """What the stage draws from; ValueError for a name that is not in data.sources."""
    if stage.sources is None:
        return [*config.data.sources.values()]
    key, known = f"stages.{stage.name}.sources", [*config.data.sources]
    check(bool(stage.sources), key, "names none; null draws from all of data.sources")
    for name in stage.sources:
        check(name in known, key, f"no such source {name!r}; choices: {known}")
        check(stage.sources.count(name) == 1, key, f"names {name!r} twice")
    return [s for name, s in config.data.sources.items() if name in stage.sources]


def load_config(path: str | Path | Sequence[str | Path] | None, overrides: Sequence[Override] = ()) -> RunConfig:
    """The run's config from YAML files and `key.sub=value` overrides; see `moa.cli.settings.load`."""
    return load(RunConfig, path, overrides)
