"""A PEFT folder is read and written without loss, and every way it can be wrong is named."""

import errno
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from moa import peft_io
from moa.peft_io import read_expert, save_expert, site_keys, site_rank, site_scaling
from tests.tiny import tiny_llava

SITES = ["model.language_model.layers.0.self_attn.q_proj", "model.multi_modal_projector.linear_1"]
LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"


def factors(sites=SITES, rank=2, size=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for site in sites:
        for key, shape in zip(site_keys(site), [(rank, size), (size, rank)], strict=True):
            tensors[key] = torch.randn(shape, generator=generator).to(dtype)
    return tensors


def config(**changes):
    return {"r": 2, "lora_alpha": 4, "target_modules": list(SITES), **changes}


@pytest.fixture
def folder(tmp_path):
    save_expert(tmp_path / "expert", factors(), config())
    return tmp_path / "expert"


def rewrite_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, dtype):
    tensors = factors(dtype=dtype)
    save_expert(tmp_path / "expert", tensors, config(use_rslora=True))
    read, settings = read_expert(tmp_path / "expert")
    assert set(read) == set(tensors) and settings["use_rslora"]
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_a_folder_written_by_peft_is_read_and_written_back_for_peft(tmp_path):
    model, _ = tiny_llava()
    settings = LoraConfig(r=3, lora_alpha=5, target_modules=LANGUAGE, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path / "theirs")
    tensors, read = read_expert(tmp_path / "theirs")
    save_expert(tmp_path / "ours", tensors, read)
    ids = torch.arange(5, 12)[None]
    again = PeftModel.from_pretrained(tiny_llava()[0], tmp_path / "ours").eval()
    with torch.no_grad():
        expected = wrapped.eval()(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, expected)


def test_scaling_and_rank_follow_pefts_patterns(tmp_path):
    """The reference is what PEFT itself computes for each layer."""
    model, _ = tiny_llava()
    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=LANGUAGE,
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 2, "down_proj": 3},
        alpha_pattern={"layers.1.self_attn.v_proj": 10, ".*layers.0.mlp.*": 7},
    )
    wrapped = get_peft_model(model, settings)
    wrapped.save_pretrained(tmp_path / "expert")
    _, read = read_expert(tmp_path / "expert")
    for name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            assert site_rank(read, name) == module.r["default"]
            assert site_scaling(read, name) == pytest.approx(module.scaling["default"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported: DoRA rescales"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*whole modules"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
        ({"kasa_config": {"a": 1}}, "unknown settings may change what it computes.*kasa_config"),
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": 3}, "has rank 2, but its config says 3"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": [*SITES, "model.lm.layers.9.q_proj"]}, "lack tensors.*layers.9"),
        ({"target_modules": ["q_proj"]}, "sites are not in target_modules: .*linear_1"),
        ({"target_modules": ".*q_proj"}, "sites are not in target_modules: .*linear_1"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused_with_the_reason(folder, changes, message):
    rewrite_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_expert(folder)
    assert str(folder) in str(error.value)


def test_a_nan_is_named_with_its_key(folder):
    key = site_keys(SITES[0])[1]
    rewrite_tensors(folder, lambda tensors: tensors[key].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.lora_B.weight has 8 NaN"):
        read_expert(folder)


def test_a_missing_partner_and_a_stray_key_are_named(folder):
    rewrite_tensors(folder, lambda tensors: tensors.pop(site_keys(SITES[0])[1]))
    with pytest.raises(ValueError, match=r"q_proj.lora_B.weight is missing"):
        read_expert(folder)
    rewrite_tensors(folder, lambda tensors: tensors.update(x=torch.ones(1)))
    with pytest.raises(ValueError, match=r"1 keys are no factors of a linear layer, first x"):
        read_expert(folder)


@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_truncated_file_is_named(folder, size):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: not readable as safetensors"):
        read_expert(folder)


def test_a_missing_file_is_named_and_a_pickle_is_not_opened(folder):
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"missing; adapter_model.bin is a pickle"):
        read_expert(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config.json: missing"):
        read_expert(folder)


def test_an_adapter_of_another_base_is_refused(folder):
    with pytest.raises(ValueError, match=r"another base: site .*q_proj is .*\[4, 4\].*\[8, 4\] th"):
        read_expert(folder, base_shapes={SITES[0]: (8, 4), SITES[1]: (4, 4)})
    with pytest.raises(ValueError, match="another base: site .*linear_1 .* is not there"):
        read_expert(folder, base_shapes={SITES[0]: (4, 4)})
    read_expert(folder, base_shapes=dict.fromkeys(SITES, (4, 4)))


def test_what_could_not_be_read_is_not_written(tmp_path):
    tensors = factors()
    tensors[site_keys(SITES[0])[0]][0, 0] = torch.inf
    with pytest.raises(
        ValueError, match="q_proj.lora_A.weight has NaN or infinite values; nothing was"
    ):
        save_expert(tmp_path / "expert", tensors, config())
    with pytest.raises(ValueError, match="has rank 2, but its config says 5"):
        save_expert(tmp_path / "expert", factors(), config(r=5))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_folder_as_it_was(folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(peft_io, "save_file", full)
    with pytest.raises(OSError, match="expert: not written, nothing was changed.*No space left"):
        save_expert(folder, factors(), config(lora_alpha=99))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["expert"]


def test_a_second_write_replaces_the_folder_whole(folder):
    (folder / "stale.txt").write_text("old")
    save_expert(folder, factors(SITES[:1]), config(target_modules=SITES[:1]))
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert set(read_expert(folder)[0]) == set(site_keys(SITES[0]))
