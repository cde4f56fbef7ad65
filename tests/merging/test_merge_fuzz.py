"""Merge settings and adapter sets as people give them: the right result, or one line that names the key or file."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moa.files.peft import save_expert, site_keys
from moa.merging.adapters import expert_from_folder
from scripts import merge as script

SITES = ("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj")
NAMES = ("plain", "with space", "lr=0.1,rank=2", "a#b", "k: v", "{x}", "[y]", "it's", "ü", "1e3")
NUMBERS = st.one_of(st.floats(-2, 2, allow_nan=False).map(lambda x: round(x, 3)), st.sampled_from([0, 1, -1]))
ODD = st.sampled_from(["[]", "{}", "null", "true", "word", ".nan", ".inf", "[1]", "1e400", "'x'", "-3", "~", "{a: 1}"])
KEYS = ("method", "options", "options.scale", "options.density", "weights", "rank", "space", "sites", "rules.missing",
        "dtype", "merged", "base", "run", "models", "slices", "stack", "routing", "projector", "max_shard_gb",
        "verify", "num_probes", "fidelity", "adapters")  # fmt: skip
# A message names a setting or a file, and gives the rule; never only a value or an internal type.
NAMED = re.compile(r"error: .*?([\w.]+(\.\w+)*:|=|/)")
FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # an example runs the script: shrinking takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def make(folder: Path, seed: int, rank: int, sites: tuple[str, ...], alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in sites:
        a, b = site_keys(site)
        tensors[a] = torch.randn(rank, 6, generator=generator)
        tensors[b] = torch.randn(5, rank, generator=generator)
    save_expert(folder, tensors, {"r": rank, "lora_alpha": alpha, "target_modules": list(sites)})


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        make(folder / name, seed, 1 + seed % 3, SITES[: 1 + seed % 3], 1.0 + seed)
    return folder


def quoted(*folders: Path) -> str:
    return f"adapters={json.dumps([str(folder) for folder in folders])}"


def attempt(capsys, *arguments: str) -> str | None:
    """None where the script ran; its one line where it refused. Any other exception is a fault."""
    try:
        script.main(["fidelity=false", "verify=false", *arguments])
    except SystemExit as stop:
        assert stop.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        (message,) = [line for line in lines if line.startswith("error: ")]
        return message
    capsys.readouterr()
    return None


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_a_weighted_sum_of_any_adapters_is_the_sum_of_their_updates(data, adapters, tmp_path, capsys):
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    weights = [data.draw(NUMBERS) for _ in names]
    out = tmp_path / data.draw(st.sampled_from(NAMES))
    given_ = f"weights=[{', '.join(map(str, weights))}]"
    folders = [adapters / name for name in names]
    assert attempt(capsys, quoted(*folders), given_, f"out={json.dumps(str(out))}") is None
    merged = expert_from_folder(out)
    experts = [expert_from_folder(folder) for folder in folders]
    for site in SITES:
        parts = [
            float(weight) * (b @ a)
            for weight, expert in zip(weights, experts, strict=True)
            if site in expert.ranks
            for a, b in [expert.factors(site, torch.float64)]
        ]
        if parts:
            a, b = merged.factors(site, torch.float64)
            torch.testing.assert_close(b @ a, sum(parts), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@FUZZ
@given(key=st.sampled_from(KEYS), value=st.one_of(ODD, NUMBERS.map(str)))
def test_an_odd_setting_is_refused_in_a_line_that_names_it_or_gives_a_finite_adapter(
    key, value, adapters, tmp_path, capsys
):
    out = tmp_path / "out"
    message = attempt(capsys, quoted(adapters / "plain", adapters / "a#b"), f"out={out}", f"{key}={value}")
    if message is not None:
        assert NAMED.match(message) and "Traceback" not in message, message
        assert not list(tmp_path.glob(".*")), "litter"
    else:
        merged = expert_from_folder(out)
        for site in merged.ranks:
            assert all(math.isfinite(float(f.sum())) for f in merged.factors(site, torch.float64))


FAULTS = {
    "no config": lambda f: (f / "adapter_config.json").unlink(),
    "no weights": lambda f: (f / "adapter_model.safetensors").unlink(),
    "half the weights": lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:-40]
    ),
    "empty weights": lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
    "config is a list": lambda f: (f / "adapter_config.json").write_text("[]"),
    "config is cut": lambda f: (f / "adapter_config.json").write_text('{"r": 1,'),
    "config in another encoding": lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe{"),
    "other widths": lambda f: make_wide(f),
    "a folder for a file": lambda f: replace_by_folder(f / "adapter_config.json"),
}


def make_wide(folder: Path) -> None:
    a, b = site_keys(SITES[0])
    tensors = {a: torch.ones(1, 7), b: torch.ones(5, 1)}
    save_expert(folder, tensors, {"r": 1, "lora_alpha": 1, "target_modules": [SITES[0]]})


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_adapter_is_named_and_nothing_is_written(fault, adapters, tmp_path, capsys):
    make(tmp_path / "bad", 7, 2, SITES, 1.0)
    FAULTS[fault](tmp_path / "bad")
    out = tmp_path / "out"
    message = attempt(capsys, quoted(adapters / "plain", tmp_path / "bad"), f"out={out}")
    assert message is not None and "bad" in message, message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]
