"""The runs for real backbones: each trains, on a tiny model of its class and rows of ours, as it stands."""

import json

import pytest
from accelerate.state import AcceleratorState

from moa.config import RunConfig, load_config
from moa.planning.plan import FakeRun
from moa.training.setup import make_accelerator, open_run
from tests.planning.test_plan import real_step
from tests.support.families import tiny_family
from tests.support.toy import read_log, toy_rows, write_rows
from train import train

FAMILY = {"llava_1_5_7b": "llava", "qwen2_5_vl_3b": "qwen2_5_vl"}  # config -> model class


def on_tiny(name: str, folder) -> RunConfig:
    """A shipped config with its base and files exchanged for tiny ones; all else as it stands."""
    backbone = tiny_family(FAMILY[name])
    backbone.model.save_pretrained(folder / "base")
    backbone.processor.save_pretrained(folder / "base")
    shipped, sources = load_config(f"configs/{name}.yaml"), {}
    for key, source in shipped.data.sources.items():
        path = write_rows(folder / f"{key}.jsonl", toy_rows(folder, key, 12))
        sources[key] = {"format": "jsonl", "path": str(path),
                        "expert": source.expert, "weight": source.weight}  # fmt: skip
    changes = {
        "out": str(folder / "run"), "model.name": str(folder / "base"), "data.sources": sources,
        "eval.sources": {},
        **{f"stages.{stage}": {"steps": 1} for stage in shipped.stages}, "train.batch_size": 8,
        "train.micro_batch_size": 4, "data.num_workers": 0, "logging.progress": False,
    }  # fmt: skip
    if name == "qwen2_5_vl_3b":  # whose patches are smaller too
        changes["model.image_processor"] = {"size": {"shortest_edge": 784, "longest_edge": 3136}}
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    return load_config(f"configs/{name}.yaml", overrides)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_a_run_for_a_real_backbone_is_planned_and_trains_on_a_tiny_one(name, tmp_path):
    config = on_tiny(name, tmp_path)
    planned = FakeRun(config, config.model.name)
    lengths = planned.lengths(tokens=64, answer=8, images=2 if name == "qwen2_5_vl_3b" else 1)
    assert planned.measure(lengths, 3) == real_step(config, lengths, 3)
    AcceleratorState._reset_state(reset_partial_state=True)
    run, state = open_run(config, make_accelerator(config))
    train(run, state)
    steps = [line for line in read_log(config.out) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
