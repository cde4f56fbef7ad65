"""The sections of a run's settings, with their defaults and choices, and the rules within each.

The comment beside or above a field is its line in `--help`. What rules hold between sections is moa/config.py.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from data.config import SourceConfig
from moa.cli.ranges import (
    OF_RUN,
    PATH,
    Count,
    CountOrZero,
    FilePath,
    NotNegative,
    Positive,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    Size,
)
from moa.cli.settings import check
from moa.routing import kinds
from moa.routing.losses import GateLosses
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
    # all routed experts alike, as one merged adapter; none: no expert, be it shared, the base answers
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
    def reads_task(self) -> bool:
        """Whether samples are routed by evidence that has their task."""
        return self.row.router is not None and self.granularity != "token" and "task" in self.evidence

    @property
    def sums(self) -> tuple[float, float]:
        """The smallest and the largest sum that the gates of a decision may have, without a null expert."""
        if self.weights:
            return (round(sum(self.weights.values()), 3),) * 2
        if "normalize" in self.row.options and not self.normalize:
            return 0.0, float("inf")
        cut = self.row.below_one or not self.renormalize or (self.normalize and self.threshold is not None)
        return 0.0 if cut else 1.0, 1.0

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
        reads = self.reads_task and not by_token
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


GATE_RULES = ("router", "oracle", "uniform", "ensemble", "off")  # of eval.gates, beside the names of experts


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
    # ensemble: every expert answers alone, and each token is drawn from the mean of their probabilities;
    # with:RUN or with:0.3*RUN: from the mean with another run's, which may have other tokens
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
