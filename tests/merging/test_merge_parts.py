"""What stands beside the experts of several runs: a rule for each part, nothing silent."""

import pytest
import torch

from moa.build import build_model
from moa.checkpoint import TrainState, save_checkpoint
from moa.config import RunConfig
from moa.merging.checkpoints.parts import merge_parts, part_line, read_parts, split_router
from moa.parts import PARTS
from moa.sections import ExpertConfig, ModelConfig
from tests.support.families import tiny_family

LAYER = "model.multi_modal_projector.linear_1"


def make_run(seed, *, experts=3):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    projector = {f"{LAYER}.weight": random(4, 6), f"{LAYER}.bias": random(4)}
    router = {
        "router.encoders.ocr.word.weight": random(3, 5),
        "router.missing.ocr": random(3),
        "router.encoders.task.weight": random(2, 3),
        "router.encoders.text.project.weight": random(3, 5),
        "router.head.3.weight": random(experts, 3),
    }
    return split_router({"projector": projector, "router": router})


RUNS = {"a": make_run(0), "b": make_run(1)}
BESIDE = {run: parts["projector"] for run, parts in RUNS.items()}
RULES = {"projector": "mean", "ocr_encoder": "keep:b", "prefixes": "drop", "router": "mean"}


def test_every_tensor_belongs_to_one_part():
    assert {part: len(tensors) for part, tensors in RUNS["a"].items()} == {
        "projector": 2, "ocr_encoder": 2, "prefixes": 1, "router": 2
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_the_projector_of_any_family_is_its_part(tmp_path, family):
    base = tiny_family(family)
    base.model.save_pretrained(tmp_path / "base")
    base.processor.save_pretrained(tmp_path / "base")
    config = RunConfig(
        model=ModelConfig(name=str(tmp_path / "base"), targets=["all-linear"], train_projector=True),
        experts={"a": ExpertConfig(rank=1)},
    )
    model = build_model(config)
    save_checkpoint(tmp_path / "run", 1, model, config, TrainState(progress={"step": 1}))
    found = read_parts(tmp_path / "run")["projector"]
    assert found.keys() == PARTS["projector"].parameters(model).keys() and found
    assert all(name.startswith(model.backbone.family.projectors) for name in found)


def test_each_part_goes_by_its_rule_and_the_report_says_so():
    merged, reports = merge_parts(RUNS, RULES)
    mean = (BESIDE["a"][f"{LAYER}.bias"] + BESIDE["b"][f"{LAYER}.bias"]) / 2
    torch.testing.assert_close(merged["projector"][f"{LAYER}.bias"], mean)
    assert torch.equal(merged["ocr_encoder"]["router.missing.ocr"], RUNS["b"]["ocr_encoder"]["router.missing.ocr"])
    assert "prefixes" not in merged
    assert [part_line(*item) for item in reports.items()] == [
        "projector of a, b: mean, 2 tensors",
        "ocr_encoder of a, b: keep:b, 2 tensors",
        "prefixes of a, b: dropped",
        "router of a, b: mean, 2 tensors",
    ]


def test_regmean_is_the_least_squares_layer_on_every_runs_inputs():
    generator = torch.Generator().manual_seed(2)
    x = {run: torch.randn(400, 6, generator=generator, dtype=torch.float64) for run in RUNS}
    for inputs in x.values():  # orthogonal columns: nothing off the diagonal to shrink
        inputs.copy_(torch.linalg.qr(inputs).Q * torch.rand(6, generator=generator).double())
    grams = {run: {LAYER: inputs.T @ inputs} for run, inputs in x.items()}
    runs = {run: {"projector": BESIDE[run]} for run in RUNS}
    merged, _ = merge_parts(runs, {"projector": "regmean"}, grams)
    outputs = [x[run] @ BESIDE[run][f"{LAYER}.weight"].double().T for run in RUNS]
    expected = torch.linalg.lstsq(torch.cat([*x.values()]), torch.cat(outputs)).solution.T
    found = merged["projector"][f"{LAYER}.weight"].double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    mean = (BESIDE["a"][f"{LAYER}.bias"] + BESIDE["b"][f"{LAYER}.bias"]) / 2
    torch.testing.assert_close(merged["projector"][f"{LAYER}.bias"], mean)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": None}, r"parts.projector: a, b trained one; the rules are mean, regmean"),
        ({"router": "keep:c"}, r"parts.router: keep:c: no such run; choices: a, b"),
        ({"router": "median"}, r"parts.router: no such rule 'median'; the rules are mean"),
        ({"routr": "mean"}, r"parts.routr: no such part; choices: projector"),
        ({"projector": "regmean"}, r"parts.projector: regmean needs inputs"),
    ],
)
def test_a_part_without_a_fitting_rule_is_refused(changes, message):
    rules = {part: rule for part, rule in (RULES | changes).items() if rule}
    with pytest.raises(ValueError, match=message):
        merge_parts(RUNS, rules)


def test_routers_of_different_experts_have_no_mean():
    runs = {"a": RUNS["a"], "b": make_run(1, experts=2)}
    with pytest.raises(ValueError, match=r"router.head.3.weight is \(3, 3\) in a and \(2, 3\) in b"):
        merge_parts(runs, RULES)
    merged, _ = merge_parts(runs, RULES | {"router": "keep:a"})
    assert merged["router"]["router.head.3.weight"].shape == (3, 3)
