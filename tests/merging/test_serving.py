"""A routed run as plain PEFT folders: what an engine computes from them is what the live model answers."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console

from data.config import DataConfig, SourceConfig
from moa.build import build_model
from moa.checkpoint import TrainState, load_model, save_checkpoint, step_folder
from moa.config import RunConfig
from moa.merging import serving
from moa.merging.learn.calibration import read_calibration
from moa.merging.serving import frequent_vectors, vllm_command
from moa.merging.settings import ServingConfig
from moa.merging.source import open_run
from moa.sections import EvalConfig, ExpertConfig, ModelConfig, RouterConfig
from scripts import serving as script
from tests.support.tiny import save_tiny_llava, tiny_llava

NAMES = ("vqa", "caption", "line")
TARGETS = [r"model\.language_model\.layers\.0\.self_attn\.(q|v)_proj"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_tiny_llava(folder / "base")
    sets = {n: SourceConfig(name=n, split="validation", task=n, expert=n, num_samples=4) for n in NAMES[:2]}
    config = RunConfig(
        model=ModelConfig(name=str(folder / "base"), targets=TARGETS),
        router=RouterConfig(kind="top_k", top_k=2),
        experts={name: ExpertConfig(rank=2, alpha=4.0) for name in NAMES},
        data=DataConfig(validation=sets),
        eval=EvalConfig(max_new_tokens=2),
    )
    mixture = build_model(config)
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        for parameter in mixture.bank.parameters(name):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    save_checkpoint(folder / "run", 1, mixture, config, TrainState(progress={"step": 1}))
    return folder / "run"


def test_gates_that_round_alike_share_a_vector_the_most_frequent_first():
    rows = [[0.9, 0.1], [0.0, 1.0], [0.88, 0.12], [0.92, 0.08], [0.02, 0.98], [0.5, 0.5]]
    gates = torch.tensor(rows, dtype=torch.float64)[:, None]
    first, second = frequent_vectors(gates, 0.1, 2)
    assert (list(first.members), list(second.members)) == ([0, 2, 3], [1, 4])
    torch.testing.assert_close(first.gates, torch.tensor([[0.9, 0.1]]).double())
    assert first.spread == pytest.approx(0.02) and second.spread == pytest.approx(0.01)


@pytest.mark.slow
def test_both_ways_of_serving_through_plain_peft_are_the_live_model(run, tmp_path):
    out = tmp_path / "out"
    script.main([f"run={run}", f"out={out}", "num_samples=3", "precision=0.001", "max_vectors=2", "verify=false"])
    record = json.loads((out / "serving.json").read_text())
    lines = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in record["vectors"]] == [4, 4]  # two experts of rank 2
    assert len(lines) == 6 and all(len(line["weights"]) == 2 for line in lines)
    model, _, config = load_model(run, "cpu")
    data = read_calibration(config, model, num_samples=3, seed=0, ocr=None)
    [batches, _] = data.by_source(1).values()
    seen = set()
    for batch, line in zip(batches, lines, strict=False):
        with torch.no_grad():
            live = model(batch)
            inputs = {"input_ids": batch.input_ids, "pixel_values": batch.pixel_values}
            inputs["attention_mask"] = batch.attention_mask
            rows = batch.labels[0].roll(-1) != -100  # positions whose next token is of the answer
            found = scaled_experts(out, line["weights"])(**inputs).logits[0][rows]
            torch.testing.assert_close(found, live.logits[0], rtol=1e-4, atol=1e-4)
            if line["vector"] is not None:
                [own] = [vector for vector in record["vectors"] if vector["name"] == line["vector"]]
                assert own["spread"] <= 0.001  # then the vector's own gates are nearly the sample's
                one = PeftModel.from_pretrained(tiny_llava()[0], out / own["adapter"]).eval()
                at = model(batch, torch.tensor([[own["weights"][name] for name in NAMES]])).logits[0]
                torch.testing.assert_close(one(**inputs).logits[0][rows], at, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(at, live.logits[0], rtol=1e-2, atol=1e-2)
                seen.add(line["vector"])
    assert seen


def test_the_command_for_vllm_has_the_next_rank_that_it_takes_and_leaves_out_the_base(tmp_path):
    rows = [{"name": "v0", "adapter": "vectors/v0", "rank": 40}, {"name": "v1", "adapter": None, "rank": 0}]
    rows.append({"name": "v2", "adapter": "vectors/v2", "rank": 8})
    options = "--enable-lora --enable-tower-connector-lora --max-lora-rank 64 --max-loras 2"
    adapters = f"v0={tmp_path}/vectors/v0 v2={tmp_path}/vectors/v2"
    assert vllm_command("BASE", tmp_path, rows, True) == f"vllm serve BASE {options} --lora-modules {adapters}"


@pytest.mark.parametrize("granularity", ["token", "both"])
def test_a_run_that_gates_tokens_is_refused_before_it_is_loaded(run, tmp_path, granularity, monkeypatch):
    source = open_run(step_folder(str(run)))
    router = replace(source.config.router, granularity=granularity)
    source = replace(source, config=replace(source.config, router=router))
    monkeypatch.setattr(serving, "open_run", lambda step: source)
    monkeypatch.delattr(serving, "load_model")
    with pytest.raises(ValueError, match="gates every token by itself"):
        serving.write_serving(ServingConfig(run=str(run), out=str(tmp_path / "out")), Console())


def scaled_experts(out, weights):
    """As an engine that takes static scales of several adapters: PEFT with all of them active."""
    model = None
    for name in weights:
        if model is None:
            model = PeftModel.from_pretrained(tiny_llava()[0], out / "experts" / name, adapter_name=name)
        else:
            model.load_adapter(out / "experts" / name, adapter_name=name)
    model.base_model.set_adapter(list(weights))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in weights.items():
                module.scaling[name] *= weight
    return model.eval()
