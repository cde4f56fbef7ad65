"""Sparse experts: what PEFT's SHiRA computes from the same file, the backbone untouched, and no LoRA of them."""

import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from torch import nn

from moa.backbones.opening import open_backbone
from moa.build import build_model
from moa.checkpoint import load_model, step_folder
from moa.experts.bank import ExpertBank
from moa.files.peft import read_header, read_tensors
from moa.merging.source import open_folders, open_run
from tests.support.families import tiny_family
from tests.support.tiny import tiny_batch
from tests.support.toy import read_log, toy_config
from tests.test_train import run_killed, run_once

SPARSE = {"kind": "sparse", "rank": 2}
DOWN, UP = (rf"model\.language_model\.layers\.\d+\.mlp\.{name}_proj" for name in ("down", "up"))


def sparse_bank(names: str = "xy") -> tuple[ExpertBank, nn.ModuleDict]:
    holder = nn.ModuleDict({"one": nn.Linear(7, 5)}).double().requires_grad_(False)
    bank = ExpertBank.attach(holder, ["one"], kinds={"sparse": ["all-linear"]})
    for name in names:
        bank.add(name, kind="sparse", rank=1)
    holder.double()
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return bank, holder


def test_sparse_experts_and_their_gradients_equal_a_loop_over_their_places():
    torch.manual_seed(0)
    bank, holder = sparse_bank()
    site = bank.sites["one"]
    x = torch.randn(2, 4, 7, dtype=torch.double, requires_grad=True)
    gates = torch.rand(2, 1, 2, dtype=torch.double, requires_grad=True)
    bank.set_gates(gates)
    expected = site.base_layer(x)
    for number, name in enumerate("xy"):
        (values,), places = site.own(name), site.places(name).tolist()
        assert len(places) == len(set(places)) == 1 * (7 + 5) and places == sorted(places)
        for value, place in zip(values, places, strict=True):
            row, column = divmod(place, 7)
            expected = expected + gates[..., number, None] * value * x[..., column, None] * torch.eye(5)[row]
    assert not torch.equal(site.places("x"), site.places("y"))
    torch.testing.assert_close(holder["one"](x), expected)
    leaves = [x, gates, *bank.parameters()]
    found, wanted = (torch.autograd.grad(out.square().sum(), leaves) for out in (holder["one"](x), expected))
    torch.testing.assert_close(found, wanted)


def test_an_expert_keeps_its_places_while_others_are_alone_and_frozen_ones_do_not_learn():
    bank, holder = sparse_bank()
    x = torch.randn(3, 2, 7, dtype=torch.double)
    bank.set_gates(torch.tensor([[[0.5, 2.0]]] * 3, dtype=torch.double))
    before = holder["one"](x)
    with bank.only(["y"]):
        assert bank.names == ["y"]
    bank.train({"x": ()})
    bank.set_gates(torch.tensor([[[0.5, 2.0]]] * 3, dtype=torch.double))
    assert torch.equal(holder["one"](x), before)
    assert [id(p) for p in bank.frozen_parameters()] == [id(p) for p in bank.parameters("x")]
    assert not next(bank.parameters("x")).requires_grad and next(bank.parameters("y")).requires_grad


def test_more_values_than_a_weight_has_and_layers_without_a_kind_are_refused():
    bank, _ = sparse_bank("")
    with pytest.raises(ValueError, match="experts.x.rank: 3 gives 36 values, and the weight of one has 35"):
        bank.add("x", kind="sparse", rank=3)
    with pytest.raises(ValueError, match="experts.x: no layer is left for one of kind=lora"):
        bank.add("x", rank=1, alpha=1)


@pytest.mark.slow
def test_a_run_resumes_exactly_and_plain_peft_computes_its_experts_from_their_files(tmp_path, monkeypatch):
    experts = {
        "vqa": {**SPARSE, "targets": [UP]},
        "grounding": {**SPARSE, "targets": [UP]},
        "common": {"rank": 2, "gate": "always"},
    }
    stages = {"experts": {"steps": 1}, "joint": {"steps": 3}}
    changes = {"experts": experts, "stages": stages, "train__save_every": 1, "train__gradient_checkpointing": True}
    whole = toy_config(tmp_path, out=str(tmp_path / "whole"), **changes)
    broken = toy_config(tmp_path, out=str(tmp_path / "broken"), **changes)
    batch = tiny_batch(tiny_family("llava").processor, tasks=[0, 1, 0, 1], experts=[0, 1, 0, 1])
    model = build_model(whole).eval()
    with torch.no_grad():
        with model.bank.context.disabled():
            base = model(batch).logits
        assert torch.equal(model(batch).logits, base)
    run_once(whole)
    run_killed(broken, 3, monkeypatch)
    assert read_log(broken.out) == read_log(whole.out)
    model, folder = load_model(whole.out)[0], step_folder(whole.out) / "experts"
    assert all(values.any() for values in model.bank.state("grounding").values())
    with torch.no_grad():
        ours = model(batch, gates=torch.tensor([[0.0, 1.0, 0.0]]).repeat(4, 1)).logits
        peft = PeftModel.from_pretrained(open_backbone(whole.model.name).model, folder / "grounding")
        inputs = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "pixel_values")}
        answers = batch.labels[:, 1:] != -100
        for theirs in (peft, peft.merge_and_unload()):
            torch.testing.assert_close(theirs(**inputs).logits[:, :-1][answers], ours[model(batch).labels != -100])
        both, sums = (
            model(batch, gates=torch.tensor([[1.0, 1.0, 0.0]]).repeat(4, 1)),
            open_backbone(whole.model.name).model,
        )
        for name in ("vqa", "grounding"):
            sums = PeftModel.from_pretrained(sums, folder / name).merge_and_unload()
        torch.testing.assert_close(sums(**inputs).logits[:, :-1][answers], both.logits[model(batch).labels != -100])
    with pytest.raises(
        ValueError, match=r"experts\.vqa\.kind=sparse: it is a sparse update of full rank.*merge_and_un"
    ):
        open_run(whole.out)
    moved = folder.rename(tmp_path / "alone")
    with pytest.raises(ValueError, match="peft_type must be LORA, got 'SHIRA': it is a sparse update"):
        open_folders([str(moved / "vqa")])
    other = toy_config(
        tmp_path, seed=1, experts=experts, stages={"joint": {"steps": 1, "init_from": {"vqa": str(moved / "vqa")}}}
    )
    with pytest.raises(ValueError, match="the values are at other places than those of the model"):
        run_once(other)


def test_an_adapter_that_peft_made_is_imported_as_peft_computes_it(tmp_path):
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).requires_grad_(False)
    x = torch.randn(3, 6)
    peft = get_peft_model(base, ShiraConfig(r=1, target_modules=["1"], random_seed=3, init_weights=False))
    expected = peft(x)
    peft.save_pretrained(tmp_path)
    plain = peft.unload()
    header = read_header(tmp_path, "SHIRA")
    bank = ExpertBank.attach(plain, ["1"], kinds={"sparse": ["1"]})
    bank.import_expert("x", read_tensors(header), header.config, kind="sparse")
    bank.set_gates(torch.ones(1, 1, 1))
    torch.testing.assert_close(plain(x), expected)
    bank.detach(plain)
    with pytest.raises(ValueError, match=r"made for another base: 0: its 9 values are not 1 x 11 different places"):
        tensors = {key.replace(".1.", ".0."): value for key, value in read_tensors(header).items()}
        ExpertBank.attach(base, ["0"], kinds={"sparse": ["0"]}).import_expert(
            "x", tensors, header.config, kind="sparse"
        )


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ({"alpha": 4}, "experts.vqa.alpha: has no effect with kind=sparse"),
        ({"share_a": "x"}, "experts.vqa.share_a: has no effect with kind=sparse"),
        ({"tie_layers": [UP]}, "experts.vqa.tie_layers: needs factors"),
        ({"factors": ["B"]}, "experts.vqa.factors: ['B'] has no effect with kind=sparse"),
    ],
)
def test_settings_of_factors_are_refused_by_their_key(tmp_path, expert, message):
    with pytest.raises(ValueError) as caught:
        toy_config(tmp_path, experts__vqa={**SPARSE, **expert})
    assert message in str(caught.value)


def test_a_sparse_expert_is_copied_to_no_other(tmp_path):
    stages = {"joint": {"steps": 1, "copy_of": "vqa"}}
    with pytest.raises(ValueError, match="stages.joint.copy_of: vqa is of kind=sparse, and each such expert has pl"):
        toy_config(tmp_path, experts={"vqa": SPARSE, "grounding": SPARSE}, stages=stages)
