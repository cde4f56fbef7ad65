"""Every setting of a run, with its default, its choices and the rules between settings.

    defaults here  <  YAML file  <  key.sub=value on the command line

Nothing is changed after loading. The comment beside or above a field is its line in `--help`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from data.config import DataConfig, PromptConfig, SourceConfig, check_shares
from moa.cli.ranges import (
    OF_RUN,
    PATH,
    Count,
    CountOrZero,
    FilePath,
    NotNegative,
    Positive,
    Seed,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    Size,
)
from moa.cli.settings import Override, Wrong, check, load
from moa.routing import kinds
from moa.routing.losses import OF_EXPERTS, GateLosses
from moa.routing.roles import CHOSEN, LEFT_OVER, NONE, WITH, check_roles
from moa.routing.schedule import GateSchedule
from moa.routing.scores import ARROW, ATTENTION, SCORES

Precision = Literal["fp32", "bf16", "fp16"]
if TYPE_CHECKING:
    RouterKind = Score = str
else:
    RouterKind = Literal[tuple(kinds.KINDS)]
    Score = Literal[(*SCORES, kinds.TABLE, kinds.CLUSTER)]
RANK, ALPHA = 8, 16.0  # of a fresh expert whose config names none
ADAPTERS = ("adapter", "serial_adapter", "prompt")  # kinds of expert around a module


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: FilePath = "assets/demo_base"  # hub name or local folder of the base model
    dtype: Precision = "fp32"  # stored precision of the frozen base weights
    # bits of the frozen base's weights, by bitsandbytes on a CUDA device; null: as `dtype` says
    quantization: Literal["4bit", "8bit"] | None = None
    # linear layers that get experts: full module paths, regular expressions over the whole path, or
    # all-linear: all that learn and can be merged (neither lm_head nor layers that the model does not use)
    targets: list[str] = field(
        default_factory=lambda: [r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"]
    )
    exclude: list[str] = field(default_factory=list)  # of the targets: paths or expressions to omit
    # other settings of the base's image processor, such as {do_pad: true} of LLaVA-1.5
    image_processor: dict[str, Any] | None = None
    train_projector: bool = False  # also train the projector between vision tower and language
    # of the base's weights and config; null: the base's own, which the run's config.yaml then has. A base with
    # another one is refused
    fingerprint: str | None = None
    other_base: bool = False  # go on with weights and adapters that were trained on another base


# settings of an expert that are of its lora_A and lora_B
OF_FACTORS = ("alpha", "use_rslora", "share_a", "share_b", "init", "rank_gates", "dropout")


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    rank: Size | None = None  # rows of lora_A; null: 8, or with init_from that of the folder
    # scaling is alpha / rank, or alpha / sqrt(rank) with use_rslora; null: 16, or that of the folder
    alpha: Positive | None = None
    use_rslora: bool | None = None  # rank-stabilised scaling; null: false, or that of the folder
    # lora; adapter: a bottleneck with an activation, parallel to each of its `targets`, serial_adapter: behind it;
    # prompt: `rank` keys and values that each token attends to, parallel to each of its `targets`;
    # sparse: as many numbers of the weight as a LoRA of the rank has, at random places (SHiRA)
    kind: Literal["lora", "adapter", "serial_adapter", "prompt", "sparse"] = "lora"
    activation: Literal["gelu", "relu", "silu"] | None = None  # of an adapter; null: gelu
    # a subset of model.targets; null: all of them. Of an adapter: modules, such as MLPs or the projector
    targets: list[str] | None = None
    init_from: FilePath | None = None  # PEFT adapter folder that this expert starts from
    frozen: bool = False  # takes part in the mixture, is never trained
    # routed: by the router; always: 1, a shared expert; confidence: 1 - the largest gate; rest: 1 - their sum; joint:
    # in the router's softmax, exempt from top-k; with:NAME: the gate of another expert
    gate: str = "routed"
    # of router.granularity both and score attention: the evidence that the router of this expert's bank reads, which
    # chooses among experts of the same evidence; each token weighs the banks
    bank: list[Literal["image", "text", "ocr", "task"]] | None = None
    # experts that name the same group have one lora_A at each site (one lora_B); null: a factor of their own
    share_a: str | None = None
    share_b: str | None = None  # the same for lora_B
    # expressions over the whole path: the sites of one shape that one matches have one lora_A and one lora_B
    tie_layers: list[str] = field(default_factory=list)
    # how a fresh one starts: docs/experts.md; where lora_B is not zero, its start is subtracted from it
    init: Literal[
        "lora", "gaussian", "orthogonal", "null_space", "random_b", "svd_top", "svd_bottom", "svd_segments"
    ] = "lora"  # fmt: skip
    # of null_space: experts whose inputs lora_A is to leave alone, by the statistics beside them (scripts.statistics)
    init_statistics: list[FilePath] = field(default_factory=list)
    # and an expert, such as an earlier one of this skill, whose inputs it is to follow; null: random
    init_own_statistics: FilePath | None = None
    factors: list[Literal["A", "B"]] = field(default_factory=lambda: ["A", "B"])  # that are trained
    # gates of its single ranks beside its own, learned with the router. task: a factor for each task, rank and layer;
    # token: each token keeps some of the ranks at each layer; core: a matrix between lora_A and lora_B, so that experts
    # may have both in common
    rank_gates: Literal["none", "task", "token", "core"] = "none"
    active_ranks: Size | None = None  # that a token keeps, of rank_gates token; null: an eighth of them
    dropout: ShareBelowOne = 0.0  # in training, on what lora_A gives, for each expert by itself

    @property
    def owns_b(self) -> bool:
        """Whether its lora_B is its whole, and learns by itself."""
        own = self.share_b is None and not self.tie_layers and "B" in self.factors and self.kind != "sparse"
        return own and not self.init.startswith(("svd", "random"))

    @property
    def shape(self) -> tuple[Any, ...]:
        """What experts must have in common for one to become a copy of the other."""
        made = self.rank or RANK, self.alpha or ALPHA, bool(self.use_rslora), self.targets or None, self.init
        return *made, self.rank_gates, self.active_ranks, self.kind, self.activation

    def __post_init__(self) -> None:
        check(bool(self.factors), "factors", "names none; frozen: true trains neither")
        check(len(set(self.factors)) == len(self.factors), "factors", f"names one twice: {list(self.factors)}")
        rule = f"{list(self.factors)} has no effect with frozen: true"
        check(not self.frozen or len(self.factors) == 2, "factors", rule)
        check(self.init == "lora" or self.init_from is None, "init", f"{self.init} has no effect with init_from")
        given = bool(self.init_statistics)
        check(given == (self.init == "null_space"), "init_statistics", "and init: null_space need each other")
        check(given or self.init_own_statistics is None, "init_own_statistics", "needs init: null_space")
        rule = f"null_space holds as long as lora_A does not learn: set factors: [B]; got {list(self.factors)}"
        check(self.init != "null_space" or list(self.factors) == ["B"], "factors", rule)
        rule = f"{self.init} is of one layer's weight or inputs, and tie_layers gives layers one start"
        check(not self.init.startswith(("svd", "null")) or not self.tie_layers, "init", rule)
        fits = self.active_ranks is None or self.rank_gates == "token"
        check(fits, "active_ranks", f"has no effect with rank_gates={self.rank_gates}")
        is_adapter = self.kind in ADAPTERS
        activates = is_adapter and self.kind != "prompt"
        check(activates or self.activation is None, "activation", f"has no effect with kind={self.kind}")
        if self.kind == "sparse":
            for key in OF_FACTORS:
                unset = getattr(self, key) == type(self).__dataclass_fields__[key].default
                check(unset, key, "has no effect with kind=sparse, which has neither lora_A nor lora_B")
            check(not self.tie_layers, "tie_layers", "needs factors, and kind=sparse has none")
            check(len(self.factors) == 2, "factors", f"{list(self.factors)} has no effect with kind=sparse")
        check(not is_adapter or bool(self.targets), "targets", f"names no module, which kind={self.kind} is around")
        rule = f"{self.init} is of a layer's weight or inputs, and kind={self.kind} has none"
        check(not is_adapter or not self.init.startswith(("svd", "null")), "init", rule)
        rule = "random_b subtracts its start, which kind=prompt would have in its softmax"
        check(self.kind != "prompt" or self.init != "random_b", "init", rule)
        check(not self.frozen or not self.dropout, "dropout", "has no use with frozen: true, which learns nothing")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    # how logits become gates; one_hot: by the sample's expert, fixed: by weights, anchors, likeness:
    # untrained, by means of evidence
    kind: RouterKind = "softmax"
    # decided once per sample, at each token, or by both: their shares are mixed by a weight that each layer learns
    granularity: Literal["sample", "token", "both"] = "sample"
    # how features are compared with each expert's weights; table: no features, a learned logit per task and expert;
    # cluster: the same for each of the `clusters` of samples; arrow: of granularity token, weights that are computed
    # from the experts and do not learn; attention: of granularity token, a token's query with keys of experts' answers
    score: Score = "linear"
    # of granularity token and both: sites that one router serves, at the input of the first. input: q, k and v; gate
    # and up. module: an attention, an MLP, the projector. block: a layer
    share: Literal["site", "input", "module", "block"] = "site"
    # of granularity token: the prompt's tokens decide together for the whole sample, by their mean or by votes
    pool: Literal["none", "prompt_mean", "vote"] = "none"
    # what the router sees
    evidence: Annotated[list[Literal["image", "text", "ocr", "task"]], OF_RUN] = field(
        default_factory=lambda: ["image", "text", "ocr", "task"]
    )
    clusters: FilePath | None = None  # of score cluster: file that scripts.clusters wrote of this evidence
    top_k: Size = 2  # experts kept per decision by kind top_k
    # of softmax and top_k: one choice more, no expert at all, for samples of `expert: none`
    null_expert: bool = False
    temperature: Positive = 1.0  # divides the logits
    hidden: Annotated[Size, OF_RUN] = 64  # width inside the router, and of the queries and keys of score attention
    # over the tokens of one kind of evidence
    pooling: Annotated[Literal["attention", "mean"], OF_RUN] = "attention"
    per_site: bool = False  # a learned offset of the logits for each wrapped layer
    task_prior: bool = False  # a learned offset of the logits for each task, where the task is known
    # gates of a sample that names a task outside of data.tasks: route: by the other evidence, as without a task; mean:
    # all experts alike, as one merged adapter; none: no routed expert, the base answers
    unknown_task: Literal["route", "mean", "none"] = "route"
    # chance in training that one kind of evidence is hidden
    modality_dropout: Annotated[ShareBelowOne, OF_RUN] = 0.1
    # of granularity token and score linear: each task has routers of its own, a token the one of its sample's task
    per_task: bool = False
    weights: dict[str, float] | None = None  # of kind fixed: routed expert -> gate; null: all equal
    # of kind top_p: experts are kept until their probabilities reach it; null: 0.8
    top_p: ShareAboveZero | None = None
    # gates are what is above it (threshold), or those above it (sigmoid); null: learned, none
    threshold: ShareBelowOne | None = None
    normalize: bool = False  # of kind sigmoid: gates are divided by their sum
    # of top_k and top_p: gates that are kept are divided by their sum; false: they stay shares among all experts
    renormalize: bool = True
    # on the logits in training; gumbel: of softmax kinds, logistic: of sigmoid, learned: its scale, by the router
    noise: Literal["gaussian", "gumbel", "logistic", "learned"] | None = None
    # of kind top_k by token: a bias on the choice alone evens out the experts' use, by so much a step; null: none
    bias_rate: Positive | None = None
    root_gradient: bool = False  # experts learn by the square root of their gates, and answer by the gates
    # of granularity sample: paths or expressions of the sites where each routed expert has the gate 1, whatever the
    # router decides
    added_up: list[str] = field(default_factory=list)
    noise_scale: Positive | None = None  # of the noise that is not learned; null: 1
    straight_through: bool = False  # of top_k and top_p: the gradient of the softmax before the selection

    @property
    def learned_threshold(self) -> bool:
        return self.row.learned_threshold and self.threshold is None

    @property
    def learned_noise(self) -> bool:
        return self.noise == "learned"

    @property
    def row(self) -> kinds.Kind:
        """What the kind is and needs."""
        return kinds.KINDS[self.kind]

    def __post_init__(self) -> None:
        check(bool(self.evidence), "evidence", "names nothing; choose of image text ocr task")
        unique = len(set(self.evidence)) == len(self.evidence)
        check(unique, "evidence", f"names one kind twice: {list(self.evidence)}")
        by_token, got = self.granularity != "sample", f"got {self.kind}, {self.granularity}"
        able = kinds.names(lambda kind: kind.per_token)
        check(self.row.per_token or not by_token, "granularity", f"token needs kind {able}; {got}")
        rule = "has no effect with router.granularity=sample"
        check(by_token or self.share == "site", "share", rule)
        check(by_token or self.pool == "none", "pool", rule)
        if self.granularity == "both":  # shares are mixed, and nothing else of two routers
            able = kinds.names(lambda kind: kind.null_expert and not kind.learned_threshold)
            fits = self.row.null_expert and not self.learned_threshold and not self.learned_noise
            check(fits, "granularity", f"both needs kind {able} and no learned noise or threshold; got {self.kind}")
            for key, usual in (("pool", "none"), ("per_site", False), ("bias_rate", None)):
                check(getattr(self, key) == usual, key, "needs another granularity than both")
            check(
                self.score in SCORES and self.score != ARROW,
                "score",
                f"{self.score} needs another granularity than both",
            )
        able = kinds.names(lambda kind: kind.null_expert)
        # the logarithm of a share is a logit up to a constant, which other kinds would read
        voting = kinds.names(lambda kind: kind.null_expert and not kind.learned_threshold)
        fits = self.row.null_expert and not self.row.learned_threshold
        check(fits or self.pool != "vote", "pool", f"vote needs kind {voting}; got {self.kind}")
        fits = self.row.null_expert and not by_token
        rule = f"needs kind {able} and granularity sample; {got}"
        check(fits or not self.null_expert, "null_expert", rule)
        for key in ("weights", "top_p", "threshold", "normalize"):
            unset = getattr(self, key) is None or getattr(self, key) is False
            check(unset or key in self.row.options, key, f"has no effect with router.kind={self.kind}")
        fits = "top_k" in self.row.options and by_token and self.pool == "none" and self.score != ARROW
        rule = (
            f"needs kind top_k, granularity token, pool none and a score that learns; {got}, {self.pool}, {self.score}"
        )
        check(fits or self.bias_rate is None, "bias_rate", rule)
        rule = f"needs a kind whose gates learn; got {self.kind}"
        check(self.row.learns == "gradient" or not self.root_gradient, "root_gradient", rule)
        plain = self.granularity == "token" and self.score == "linear" and self.pool == "none"
        rule = f"needs granularity token, score linear and pool none; {got}, {self.score}, {self.pool}"
        check(plain or not self.per_task, "per_task", rule)
        learned = self.learned_threshold or self.learned_noise
        rule = "needs a threshold and a noise that are not learned"
        check(not (learned and self.per_task), "per_task", rule)
        check(not by_token or not self.added_up, "added_up", f"needs granularity sample; {got}")
        reads = self.row.router is not None and not by_token and "task" in self.evidence
        rule = f"{self.unknown_task} needs granularity sample and a router that sees the task; {got}, {self.evidence}"
        check(reads or self.unknown_task == "route", "unknown_task", rule)
        hard = kinds.names(lambda kind: kind.hard)
        check(self.renormalize or self.row.hard, "renormalize", f"false needs kind {hard}; got {self.kind}")
        self._check_noise()

    def _check_noise(self) -> None:
        fits = self.score == "linear" or self.row.learns == "gradient"
        check(fits, "score", f"has no effect with router.kind={self.kind}")
        if self.score == ATTENTION:
            check(self.share == "site", "share", "must be site: the answers of a layer's experts are its own")
            rule = "attention needs granularity token, or both with banks of experts"
            check(self.granularity != "sample", "score", rule)
        if self.score == ARROW:
            check(self.granularity == "token", "score", "arrow needs granularity token")
        if self.score in (kinds.TABLE, kinds.CLUSTER):
            check(self.granularity == "sample", "score", f"{self.score} needs granularity sample")
            fits = self.score == kinds.CLUSTER or self.evidence == ["task"]
            check(fits, "evidence", f"must be [task] with router.score=table; got {self.evidence}")
        if self.score in (kinds.TABLE, kinds.CLUSTER, ARROW, ATTENTION):
            rule = f"needs a number with router.score={self.score}, which learns none"
            check(not self.learned_threshold, "threshold", rule)
            check(not self.learned_noise, "noise", f"learned needs another score than {self.score}")
        given = self.clusters is not None
        check(given == (self.score == kinds.CLUSTER), "clusters", "and router.score=cluster need each other")
        fits = self.row.learns == "gradient" and self.granularity != "token"
        fits = fits and self.score in SCORES and self.score != ATTENTION
        rule = f"needs a learned router of samples that reads the task, and no score by a table; {self.score}, "
        rule += f"{self.kind}, {self.granularity}, {self.evidence}"
        check((fits and "task" in self.evidence) or not self.task_prior, "task_prior", rule)
        rule = f"must be one of {', '.join(self.row.noises) or 'none'} with router.kind={self.kind}, got {self.noise}"
        check(self.noise is None or self.noise in self.row.noises, "noise", rule)
        check(self.pool != "vote" or not self.learned_noise, "noise", "learned has no logits to vote by; pool=vote has")
        fits = self.noise_scale is None or (self.noise is not None and not self.learned_noise)
        check(fits, "noise_scale", f"has no effect with router.noise={self.noise}")
        able = kinds.names(lambda kind: kind.hard)
        check(self.row.hard or not self.straight_through, "straight_through", f"needs kind {able}; got {self.kind}")


@dataclass(frozen=True, kw_only=True)
class LossConfig(GateLosses):
    # what the language loss is a mean over: samples count alike, or answer tokens do
    reduction: Annotated[Literal["sample", "token"], OF_RUN] = "sample"
    # sites that crosstalk does not count: paths or expressions, as model.exclude; the projector's never count
    crosstalk_exclude: list[str] = field(default_factory=list)
    # of a CLIP: images against all texts, or against the frozen texts of the sample's choices
    pairs: Annotated[Literal["contrastive", "classification"], OF_RUN] = "contrastive"
    # contrastive: of the batch, or of one data set
    negatives: Annotated[Literal["all", "source"], OF_RUN] = "all"


@dataclass(frozen=True, kw_only=True)
class RateConfig:
    experts: NotNegative = 1e-3  # learning rate of lora_A and lora_B
    b_ratio: NotNegative = 1.0  # that of lora_B is so many times as large (LoRA+)
    router: NotNegative = 1e-3  # learning rate of the router
    projector: NotNegative = 1e-4  # learning rate of the projector


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    name: str = ""  # in logs: its key
    # experts: all at once, each on its samples; router: experts frozen; joint: both; null: as its key
    trains: Literal["experts", "router", "joint"] | None = None
    steps: Count  # optimiser steps
    lr: RateConfig = field(default_factory=RateConfig)
    warmup_steps: CountOrZero = 0  # linear from 0
    lr_end: Share = 0.0  # cosine down to this share of the learning rate
    # run folder, step folder, or mapping of experts to PEFT folders; null: what the last stage left
    init_from: Annotated[Any, PATH] = None
    # names of data.sources that the stage draws from, in their relative shares; null: all of them
    sources: list[str] | None = None
    # in a stage that trains experts: the one that every sample trains; null: each sample its own
    expert: str | None = None
    # of experts that train, those that learn in this stage; the others take part. null: all
    only: list[str] | None = None
    copy_of: str | None = None  # before the first step every other routed expert becomes a copy of this one
    # before the first step lora_B keeps so large a share of its numbers, the largest of all layers of an expert, and no
    # others learn; null: all
    kept_b: ShareAboveZero | None = None
    gates: GateSchedule = field(default_factory=GateSchedule)  # what training does to the gates

    @property
    def kind(self) -> str:
        return self.trains or self.name

    def __post_init__(self) -> None:
        rule = f"{self.name!r} is neither experts, router nor joint: set trains= to one of them"
        check(self.kind in ("experts", "router", "joint"), "", rule)
        inside = self.warmup_steps <= self.steps
        check(inside, "warmup_steps", f"must be in 0..{self.steps}, got {self.warmup_steps}")
        check(self.expert is None or self.kind == "experts", "expert", "needs trains=experts: a router decides here")
        check(self.kind != "router" or self.copy_of is None, "copy_of", "needs a stage that trains experts")
        check(self.kind != "router" or self.kept_b is None, "kept_b", "needs a stage that trains experts")
        check(self.kind != "router" or self.only is None, "only", "needs a stage that trains experts")
        for name in ("leak", "leak_end"):
            fits = not getattr(self.gates, name) or self.kind == "experts"
            check(fits, f"gates.{name}", "needs trains=experts: a router's gates reach other experts by themselves")
        known = self.init_from is None or isinstance(self.init_from, str | dict)
        check(known, "init_from", f"must be a folder or a mapping, got {self.init_from!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    batch_size: Size = 32  # samples per optimiser step, over all processes and accumulation steps
    micro_batch_size: Size | None = None  # samples per forward on one device; null: as many as fit
    # tokens of a row that several samples share, instead of padding; null: a row per sample
    pack_length: Count | None = None
    precision: Precision = "fp32"  # of the computation; gates and losses stay in fp32
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    clip_norm: NotNegative = 1.0  # largest norm of the whole gradient; 0: no clipping
    weight_decay: NotNegative = 0.0  # AdamW, on matrices only
    betas: list[ShareBelowOne] = field(default_factory=lambda: [0.9, 0.99])  # AdamW
    save_every: Count = 100  # steps between checkpoints; the end of a stage is always saved
    keep_last: Count = 2  # newest checkpoints kept, besides the best
    keep_best: Count = 1  # checkpoints kept of the stage's lowest validation losses
    # samples of each expert whose inputs are summed up in stats.safetensors beside it when training ends, for merges
    # that use statistics (docs/merging_learned.md); 0: none
    statistics: CountOrZero = 0
    # a loss or gradient that is not finite: stop the run, or update nothing at that step, and count
    on_non_finite: Literal["stop", "skip"] = "stop"
    max_non_finite_steps: Count = 10  # such steps in a whole run, with skip; one more stops it

    def __post_init__(self) -> None:
        micro = self.micro_batch_size
        fits = micro is None or self.batch_size % micro == 0
        check(fits, "micro_batch_size", f"{micro} must divide batch_size={self.batch_size}")
        check(len(self.betas) == 2, "betas", f"AdamW takes two, got {list(self.betas)}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    # steps between validations during training; 0: only at the end of a stage
    every: CountOrZero = 100
    batch_size: Size = 32  # samples per forward
    # data sets that eval.py scores, by name; empty: data.validation
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    only: list[str] | None = None  # names of the sources to score; null: all
    num_samples: Count | None = None  # at most so many of each source; null: all
    score: bool = True  # false: only write the answers, for splits whose references are secret
    # what decides the gates: router, oracle, uniform, off (the base), the name of one expert, or without:NAME;
    # ensemble: every expert answers alone, and each token is drawn from the mean of their probabilities
    gates: str = "router"
    # further gates that eval.py scores beside these, in one table
    compare: list[str] = field(default_factory=list)
    withhold_task: bool = False  # neither the prompt nor the router gets the task
    max_new_tokens: Size = 32  # of a generated answer
    num_beams: Size = 1  # 1: greedy
    on_bad_sample: Literal["error", "skip"] | None = None  # null: as data.on_bad_sample
    num_images: CountOrZero = 12  # samples in the gallery and on the run's page; 0: neither images nor page

    def __post_init__(self) -> None:
        check(self.only is None or bool(self.only), "only", "names no data set; null means all")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    every: Count = 10  # steps between console lines; log.jsonl and the trackers get every step
    progress: bool = True  # progress bar where the console is a terminal
    trackers: list[Literal["wandb", "tensorboard"]] = field(default_factory=list)  # of train.py and eval.py
    project: str = "moa"  # name at the trackers


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
    whole = not router.row.below_one and (router.renormalize or not router.row.hard)
    rest = [name for name in rest if gates[name] == "rest" and whole]
    rule = (
        f"rest would be 0, as gates of router.kind={router.kind} sum to 1; choose top_k with router.renormalize=false"
    )
    check(not rest, f"experts.{', '.join(rest)}.gate", rule)
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
        own = experts[stage.copy_of]
        for name, expert in experts.items():
            rule = f"{name} has another rank, alpha, targets, init or rank_gates, and so cannot be its copy"
            check(expert.shape == own.shape or expert.gate != "routed" or expert.frozen, f"{key}.copy_of", rule)
        rule = f"{stage.copy_of} is of kind=sparse, and each such expert has places of its own"
        check(own.kind != "sparse", f"{key}.copy_of", rule)
        rule = f"{stage.copy_of} has the gate {own.gate}, which is no share of 1: with it the copies are more than it"
        sharing = [name for name, expert in experts.items() if expert.gate in ("joint", *LEFT_OVER)]
        check(own.gate == "routed" or stage.copy_of in sharing, f"{key}.copy_of", rule)
        beside = [name for name in sharing if name != stage.copy_of]
        rule = f"{', '.join(beside)} has a share of the gates, and is no copy: together they are not {stage.copy_of}"
        check(not beside, f"{key}.copy_of", rule)
        rule = "would overwrite the lora_A that init: null_space holds for each expert"
        check(own.init != "null_space", f"{key}.copy_of", rule)
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
