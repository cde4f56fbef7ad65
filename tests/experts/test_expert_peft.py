"""Experts as PEFT folders: what PEFT computes with them, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moa.experts.bank import ExpertBank
from moa.files.peft import save_expert, site_keys
from moa.files.peft_config import site_rank, site_scaling
from tests.support.banks import LANGUAGE, SITE, fill, inputs, make_bank
from tests.support.peft import read_expert
from tests.support.tiny import tiny_llava


@pytest.mark.parametrize("use_rslora", [False, True])
def test_plain_peft_loads_an_exported_expert_and_gives_the_same_logits(tmp_path, use_rslora):
    from peft import PeftModel

    model, processor = tiny_llava()
    bank = make_bank(model, vqa=4)
    bank.add("caption", rank=3, alpha=5, use_rslora=use_rslora)
    fill(bank)
    save_expert(tmp_path / "caption", bank.state("caption"), bank.peft_config("caption"))
    bank.set_gates(torch.tensor([[[0.0, 1.0]]]).expand(4, 1, 2), torch.arange(4))
    ours = model(**inputs(processor)).logits
    plain = PeftModel.from_pretrained(tiny_llava()[0], tmp_path / "caption").eval()
    theirs = plain(**inputs(processor)).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_round_trip_through_a_peft_folder_is_exact(tmp_path):
    first, second = (make_bank(tiny_llava()[0], vqa=4) for _ in range(2))
    fill(first)
    save_expert(tmp_path / "vqa", first.state("vqa"), first.peft_config("vqa"))
    second.import_expert("again", *read_expert(tmp_path / "vqa"))
    before, after = first.state("vqa"), second.state("again")
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)
    assert second.peft_config("again") == first.peft_config("vqa")


def test_a_peft_adapter_with_patterns_is_imported_as_peft_computes_it(tmp_path):
    from peft import LoraConfig, get_peft_model

    q, k, v = (SITE.replace("q_proj", f"{letter}_proj") for letter in "qkv")
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[q, k, v],
        rank_pattern={"v_proj": 2},
        alpha_pattern={f"^{v}": 3, f"^{k}": 11},  # k differs by alpha alone
        use_rslora=True,
    )
    plain, processor = tiny_llava()
    peft_model = get_peft_model(plain, config).eval()
    torch.manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    peft_model.save_pretrained(tmp_path)

    model, _ = tiny_llava()
    bank = make_bank(model, targets=(LANGUAGE,), vqa=2)
    bank.import_expert("theirs", *read_expert(tmp_path))
    bank.set_gates(torch.tensor([[[0.0, 1.0]]]).expand(4, 1, 2))
    torch.testing.assert_close(
        model(**inputs(processor)).logits,
        peft_model(**inputs(processor)).logits,
        atol=1e-5,
        rtol=1e-4,
    )
    save_expert(tmp_path / "again", bank.state("theirs"), bank.peft_config("theirs"))
    again = make_bank(tiny_llava()[0], targets=(LANGUAGE,), vqa=2)
    again.import_expert("theirs", *read_expert(tmp_path / "again"))
    for site in (q, k, v):
        assert again.sites[site].scalings == pytest.approx(bank.sites[site].scalings)


def test_a_site_whose_path_ends_like_anothers_keeps_its_own_rank_and_alpha():
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "m": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    bank = ExpertBank.attach(model, ["q", "m.q"])
    config = {"r": 3, "lora_alpha": 6, "rank_pattern": {"^q": 2}, "alpha_pattern": {"^q": 5}}
    ranks = {"q": 2, "m.q": 3}
    factors = [(torch.ones(r, 4), torch.ones(4, r)) for r in ranks.values()]
    pairs = zip(ranks, factors, strict=True)
    tensors = {k: t for site, own in pairs for k, t in zip(site_keys(site), own, strict=True)}
    bank.import_expert("theirs", tensors, config)
    exported = bank.peft_config("theirs")
    assert {site: site_rank(exported, site) for site in ranks} == ranks
    assert {site: site_scaling(exported, site) for site in ranks} == {"q": 2.5, "m.q": 2.0}


def test_an_adapter_with_tensors_that_no_site_consumes_is_refused():
    bank, other = make_bank(tiny_llava()[0], targets=(SITE,)), make_bank(tiny_llava()[0])
    with pytest.raises(ValueError, match="belong to no site"):
        bank.import_expert("new", other.state("vqa"), other.peft_config("vqa"))
    state = other.state("vqa")
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="belong to no site"):
        other.import_expert("new", state, other.peft_config("vqa"))
    with pytest.raises(ValueError, match="1 keys missing"):
        other.load_states({"vqa": state})
    with pytest.raises(ValueError, match="1 keys unknown"):
        other.load_states({"vqa": {**other.state("vqa"), "more": torch.ones(1, 1)}})
    assert other.names == ["vqa", "caption", "grounding"]


def test_an_adapter_of_another_width_or_with_nan_is_refused():
    bank = make_bank(tiny_llava()[0], targets=(SITE,))
    other = make_bank(tiny_llava(hidden=64)[0], targets=(SITE,))
    with pytest.raises(ValueError, match=r"another base: .*\[64, 64\].*\[32, 32\]"):
        bank.import_expert("new", other.state("vqa"), other.peft_config("vqa"))
    wide = {k: F.pad(t, (0, int("lora_A" in k))) for k, t in bank.state("vqa").items()}
    with pytest.raises(ValueError, match=r"another base: .*\[32, 33\].*\[32, 32\]"):
        bank.import_expert("new", wide, bank.peft_config("vqa"))
    broken = {key: tensor.clone() for key, tensor in bank.state("vqa").items()}
    broken[next(iter(broken))][0, 0] = float("nan")
    for act in (
        lambda: bank.import_expert("new", broken, bank.peft_config("vqa")),
        lambda: bank.load_states({"vqa": broken}),
    ):
        with pytest.raises(ValueError, match="NaN"):
            act()


def test_loading_a_state_of_other_ranks_is_refused():
    bank = make_bank(tiny_llava()[0], targets=(SITE,), vqa=4, caption=2)
    with pytest.raises(ValueError, match=r"is \[2, 32\], expected \[4, 32\]"):
        bank.load_states({"vqa": bank.state("caption")})
