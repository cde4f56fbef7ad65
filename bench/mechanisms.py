"""What each mechanism of experts and routers costs: a training step's time and memory, over one LoRA by PEFT.

    python -m bench.mechanisms [size=small] [experts=[8]] [rank=4] [device=cpu|cuda] [only=[sample,block]]

A mechanism is settings of a run, built as train.py builds it, on the random LLaVA, the batch and the loss of
bench.mixture. All take turns. `plain` is one LoRA by our layers. Writes results/bench_mechanisms_<size>.json.
"""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bench.settings import SIZES, Setting, Sized, run_bench, write_results
from moa.cli.ranges import Count
from moa.cli.settings import check

if TYPE_CHECKING:
    from bench.contenders import Contender


@dataclass(frozen=True)
class Mechanism:
    """Settings of a run's router, of each of its experts, and of its losses."""

    router: dict[str, Any] = field(default_factory=dict)
    expert: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    one: bool = False  # one expert of all experts' rank


TOKEN = {"granularity": "token"}
BLOCK = TOKEN | {"share": "block"}
TOP = {"kind": "top_k"} | BLOCK
MLP = {"targets": [r"model\.language_model\.layers\.\d+\.mlp"]}
ATTENTION = {"targets": [r"model\.language_model\.layers\.\d+\.self_attn"]}
MECHANISMS = {
    "plain": Mechanism(router={"kind": "fixed"}, one=True),
    "sample": Mechanism(),
    "sample, by site": Mechanism(router={"per_site": True}),
    "sample, top 2": Mechanism(router={"kind": "top_k"}),
    "token": Mechanism(router=TOKEN),
    "token, by input": Mechanism(router=TOKEN | {"share": "input"}),
    "token, by module": Mechanism(router=TOKEN | {"share": "module"}),
    "token, by block": Mechanism(router=BLOCK),
    "top 2": Mechanism(router=TOP),
    "threshold": Mechanism(router=BLOCK | {"kind": "threshold"}),
    "sigmoid": Mechanism(router=BLOCK | {"kind": "sigmoid"}),
    "mean of the prompt": Mechanism(router=BLOCK | {"pool": "prompt_mean"}),
    "votes of the prompt": Mechanism(router=TOP | {"pool": "vote"}),
    "layer-norm cosine": Mechanism(router=BLOCK | {"score": "ln_cosine"}),
    "arrow": Mechanism(router=TOP | {"score": "arrow"}),
    "attention to experts": Mechanism(router=TOKEN | {"score": "attention"}),
    "sample and token": Mechanism(router=BLOCK | {"granularity": "both"}),
    "learned noise": Mechanism(router=TOP | {"noise": "learned"}),
    "bias": Mechanism(router=TOP | {"bias_rate": 0.001}),
    "root gradient": Mechanism(router=TOP | {"root_gradient": True}),
    "losses on balance": Mechanism(router=BLOCK, losses={"load_balancing": 0.01, "z": 0.01}),
    "one A": Mechanism(expert={"share_a": "all"}),
    "one A and B, cores": Mechanism(expert={"share_a": "all", "share_b": "all", "rank_gates": "core"}),
    "ranks by token": Mechanism(expert={"rank_gates": "token", "active_ranks": 1}),
    "ranks by task": Mechanism(expert={"share_a": "all", "rank_gates": "task"}),
    "dropout of experts": Mechanism(expert={"dropout": 0.1}),
    "adapters": Mechanism(expert=MLP | {"kind": "adapter"}),
    "serial adapters": Mechanism(expert=MLP | {"kind": "serial_adapter"}),
    "prompts": Mechanism(expert=ATTENTION | {"kind": "prompt"}),
    "sparse": Mechanism(expert={"kind": "sparse", "alpha": None}),
}


@dataclass(frozen=True, kw_only=True)
class Settings(Sized):
    rounds: Count = 8  # turns of each mechanism
    only: list[str] | None = None  # mechanisms, beside plain; null: all

    def __post_init__(self) -> None:
        unknown = {*(self.only or ())} - {*MECHANISMS}
        check(not unknown, "only", f"no {sorted(unknown)}; choices: {', '.join(MECHANISMS)}")


def contender(setting: Setting, mechanism: Mechanism) -> "Contender":
    """The model of a run with these settings around the benchmark's backbone, and the loss of its training step."""
    from bench.bench_model import make_batch
    from bench.contenders import Contender, backbone_of
    from moa.build import build_mixture
    from moa.config import load_config

    ranks = [setting.rank * setting.num_experts] if mechanism.one else [setting.rank] * setting.num_experts
    experts = {f"e{n}": {"rank": rank, "alpha": rank} | mechanism.expert for n, rank in enumerate(ranks)}
    own: dict[str, Any] = {"experts": experts, "data.expert": "e0", "stages": {"joint": {"steps": 1}}}
    own["router"] = {"kind": "softmax"} | mechanism.router
    own["losses"] = {"guidance": 0, "guidance_end": 0} | mechanism.losses
    is_adapter = str(mechanism.expert.get("kind")).endswith(("adapter", "prompt"))
    own["model.targets"] = [] if is_adapter else [setting.targets]
    config = load_config("configs/demo.yaml", [*own.items()])
    model = build_mixture(config, backbone_of(setting), {}).to(setting.device).train()
    batch = make_batch(setting.size, setting.device)

    def loss() -> Any:
        output, weights = model(batch), asdict(config.losses)
        return output.loss_per_sample.mean() + sum(weights[name] * value for name, value in output.aux.items())

    return Contender(model=model, loss=loss, setting=setting)


def run(settings: Settings, console: Console) -> None:
    from bench.bench_model import race, ratio, saved_bytes
    from bench.contenders import lora

    found: dict[int, dict[str, dict[str, float]]] = {}
    for count in settings.experts:
        setting = settings.at(SIZES[settings.size], count)
        chosen = ["plain", *(name for name in settings.only or MECHANISMS if name != "plain")]
        runs = {"lora": lora(setting)} | {name: contender(setting, MECHANISMS[name]) for name in chosen}
        seconds = race({name: run.stepper() for name, run in runs.items()}, settings.rounds, setting.device)
        kept = {name: saved_bytes(run.forward, run.model.parameters()) for name, run in runs.items()}
        found[count] = {
            name: {"time": ratio(seconds, name, "lora"), "memory": kept[name] / kept["lora"]} for name in chosen
        }
        for name, row in found[count].items():
            print(f"{count} experts, {name:22s} time {row['time']:6.3f}   memory {row['memory']:6.3f}")
    figures = {"where": settings.where(settings.size), "over_lora": found}
    write_results(f"mechanisms_{settings.size}", figures)


if __name__ == "__main__":
    run_bench(Settings, run, __doc__)
