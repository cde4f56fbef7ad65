"""A merge is the weighted sum of the dense updates, whatever the factors, ranks, scales and order."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from moa.files.peft import save_expert, site_keys
from moa.merging.adapters import Expert, check_base_names, expert_from_folder, expert_from_tensors
from moa.merging.core import choose_rank, compress_dense, to_core
from moa.merging.merge import merge
from moa.merging.rank import parse_rank
from moa.merging.report.fidelity import summarise
from moa.merging.site_plan import layer_of
from tests.support.tiny import tiny_llava

SITES = {"a.layers.0.q": (6, 5), "a.layers.0.v": (4, 5), "a.layers.1.q": (6, 5), "head": (3, 7)}


def make_expert(name="one", seed=0, rank=2, sites=tuple(SITES), **config) -> Expert:
    tensors = random_factors(seed, {site: rank for site in sites})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "target_modules": list(sites)}
    return expert_from_tensors(name, tensors, {**settings, **config})


def random_factors(seed, ranks):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site, rank in ranks.items():
        out, columns = SITES[site]
        key_a, key_b = site_keys(site)
        tensors[key_a] = torch.randn(rank, columns, generator=generator)
        tensors[key_b] = torch.randn(out, rank, generator=generator)
    return tensors


def dense(expert, site, scaling):
    lora_a, lora_b = expert.read(site)
    return scaling * lora_b.double() @ lora_a.double()


def update(merged, site):
    return merged[site].lora_b @ merged[site].lora_a


def assert_same(merged, expected):
    assert set(merged) == set(expected)
    for site, value in expected.items():
        torch.testing.assert_close(update(merged, site), value, rtol=0, atol=1e-12)


def test_the_sum_is_the_dense_weighted_sum_with_every_scale_folded_in():
    plain = make_expert("plain", 0)
    stable = make_expert("stable", 1, rank=4, lora_alpha=6, use_rslora=True)
    merged = merge([plain, stable], weights={"plain": 0.3, "stable": -1.7})
    expected = {s: 0.3 * dense(plain, s, 3 / 2) - 1.7 * dense(stable, s, 6 / 2) for s in SITES}
    assert_same(merged, expected)


def test_ranks_and_alphas_may_differ_per_site():
    ranks = {"a.layers.0.q": 1, "a.layers.0.v": 3, "a.layers.1.q": 2, "head": 2}
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 8,
        "target_modules": list(SITES),
        "rank_pattern": {"layers.0.q": 1, "v": 3},
        "alpha_pattern": {"head": 5},
    }
    expert = expert_from_tensors("patterned", random_factors(0, ranks), config)
    scaling = {"a.layers.0.q": 8, "a.layers.0.v": 8 / 3, "a.layers.1.q": 4, "head": 5 / 2}
    expected = {site: dense(expert, site, scaling[site]) for site in SITES}
    assert_same(merge([expert], weights={"patterned": 1}), expected)


@pytest.mark.parametrize("rank", ["sum", 2, "energy:0.8"])
def test_the_order_of_the_experts_does_not_matter(rank):
    experts = [make_expert(str(seed), seed) for seed in range(3)]
    weights = {"0": 1.0, "1": -0.5, "2": 0.2}
    forward = merge(experts, weights=weights, rank=rank)
    backward = merge(experts[::-1], weights=weights, rank=rank)
    assert_same(backward, {site: update(forward, site) for site in SITES})


@pytest.mark.parametrize("rank", ["sum", 1])
def test_how_an_expert_is_factored_does_not_matter(rank):
    """(B R, R^-1 A) is the same expert; the factors of the result are the same too."""
    expert, other = make_expert("one", 0), make_expert("two", 1)
    mix = torch.tensor([[3.0, 1.0], [-2.0, 0.5]], dtype=torch.float64)

    def mixed(site):
        lora_a, lora_b = expert.read(site)
        return torch.linalg.solve(mix, lora_a.double()), lora_b.double() @ mix

    rewritten = Expert(**{**vars(expert), "read": mixed})
    expected = merge([expert, other], rank=rank)
    merged = merge([rewritten, other], rank=rank)
    assert_same(merged, {site: update(expected, site) for site in SITES})
    if rank == 1:  # at rank "sum" a singular value may be zero, whose vectors are free
        torch.testing.assert_close(merged["head"].lora_a, expected["head"].lora_a)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_one_expert_merges_to_itself(method):
    expert = make_expert()
    assert_same(merge([expert], method=method), {s: dense(expert, s, 3 / 2) for s in SITES})


def test_weights_one_and_zero_give_the_first_expert():
    first, second = make_expert("first", 0), make_expert("second", 1, rank=3)
    merged = merge([first, second], weights={"first": 1, "second": 0}, rank=2)
    assert_same(merged, {site: dense(first, site, 3 / 2) for site in SITES})


@pytest.mark.parametrize("rank", ["sum", 2, "energy:0.99"])
def test_adding_and_subtracting_an_expert_gives_the_base(rank):
    expert, twin = make_expert("one", 0), make_expert("twin", 0)
    merged = merge([expert, twin], weights={"one": 0.7, "twin": -0.7}, rank=rank)
    assert_same(merged, {site: torch.zeros(*SITES[site]).double() for site in SITES})


def test_an_expert_without_a_site_adds_nothing_there():
    whole, part = make_expert("whole", 0), make_expert("part", 1, sites=("head", "a.layers.0.q"))
    merged = merge([whole, part], weights={"whole": 1, "part": 1})
    expected = {site: dense(whole, site, 3 / 2) for site in SITES}
    for site in part.ranks:
        expected[site] = expected[site] + dense(part, site, 3 / 2)
    assert_same(merged, expected)
    assert {site: result.lora_a.shape[0] for site, result in merged.items()} == {
        "a.layers.0.q": 4,
        "a.layers.0.v": 2,
        "a.layers.1.q": 2,
        "head": 3,  # the sum of the ranks, but no more than the layer has outputs
    }


def test_weights_may_differ_per_site():
    one, two = make_expert("one", 0), make_expert("two", 1)
    weights = {site: {"one": i, "two": 1 - i} for i, site in enumerate(SITES)}
    expected = {site: i * dense(one, site, 3 / 2) + (1 - i) * dense(two, site, 3 / 2) for i, site in enumerate(SITES)}
    assert_same(merge([one, two], weights=weights), expected)


def test_the_defaults_are_the_mean_and_the_scaled_sum():
    experts = [make_expert(str(seed), seed) for seed in range(4)]
    total = {site: sum(dense(e, site, 3 / 2) for e in experts) for site in SITES}
    assert_same(merge(experts), {site: value / 4 for site, value in total.items()})
    merged = merge(experts, method="task_arithmetic", options={"scale": 0.3})
    assert_same(merged, {site: 0.3 * value for site, value in total.items()})


def test_a_fixed_rank_is_the_best_one_with_balanced_factors():
    experts = [make_expert(str(seed), seed) for seed in range(3)]
    merged = merge(experts, rank=2)
    for site in SITES:
        u, s, v = torch.linalg.svd(sum(dense(e, site, 1 / 2) for e in experts))
        torch.testing.assert_close(update(merged, site), (u[:, :2] * s[:2]) @ v[:2])
        norms = merged[site].lora_a.square().sum(1), merged[site].lora_b.square().sum(0)
        torch.testing.assert_close(norms[0], s[:2])
        torch.testing.assert_close(norms[1], s[:2])
        torch.testing.assert_close(torch.tensor(merged[site].lost).double(), (s[2:] ** 2).sum())


@pytest.mark.parametrize("apart", [1e-3, 1e-6, 1e-7, 0.0])
def test_the_common_axes_of_nearly_parallel_experts_are_orthonormal_and_hold_them(apart):
    """Columns that differ by a share of 1e-7 are far from well conditioned, and their Gram matrix is far worse."""
    one, other = make_expert("one", 0), make_expert("two", 1)
    pairs = zip(one.factors("head", torch.float64), other.factors("head", torch.float64), strict=True)
    factors = [one.factors("head", torch.float64), tuple(own + apart * noise for own, noise in pairs)]
    core = to_core(factors)
    for axes in (core.q_a, core.q_b):
        torch.testing.assert_close(axes.T @ axes, torch.eye(axes.shape[1]).double(), rtol=0, atol=1e-9)
    for (a, b), own in zip(factors, core.cores, strict=True):
        torch.testing.assert_close(core.q_b @ own @ core.q_a.T, b @ a, rtol=0, atol=1e-12)


@pytest.mark.parametrize("exact", [1, 1000])
def test_a_dense_update_is_cut_to_a_rank_as_well_as_its_svd_can(exact, monkeypatch):
    """Singular values that fall by a tenth each: by iteration (above `EXACT_SVD` rows) as by the full SVD."""
    monkeypatch.setattr("moa.merging.core.EXACT_SVD", exact)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 60, generator=generator).double())[0] for n in (90, 70))
    s = 0.9 ** torch.arange(60).double()
    low = compress_dense((u * s) @ v.T, 8, total_rank=99)
    torch.testing.assert_close(low.lora_b @ low.lora_a, (u[:, :8] * s[:8]) @ v[:, :8].T)
    torch.testing.assert_close(low.singular_values, s[:8])
    assert low.lost == pytest.approx(float(s[8:].square().sum()))
    assert compress_dense((u * s) @ v.T, "sum", 5).lora_a.shape[0] == 5


@pytest.mark.parametrize("settings", [{}, {"method": "magnitude_prune", "space": "dense", "options": {"density": 1.0}}])
def test_an_expert_lies_in_the_span_of_what_the_merge_has_and_not_of_empty_directions(settings):
    first, second = make_expert("first", 0), make_expert("second", 1, rank=1)
    merged = merge([first, second], weights={"first": 1, "second": 0}, **settings)
    for site, result in merged.items():
        assert result.lora_a.shape[0] == 3  # one of them is empty
        u, _, v = torch.linalg.svd(dense(first, site, 1.5))
        other = dense(second, site, 3.0)
        inside = (u[:, :2].T @ other @ v[:2].T).square().sum()
        torch.testing.assert_close(result.experts.span_energy[1], inside)
        torch.testing.assert_close(result.experts.energy[1], other.square().sum())
        torch.testing.assert_close(result.experts.overlap[1], (dense(first, site, 1.5) * other).sum())


def test_an_energy_keeps_the_smallest_sufficient_rank():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)  # energies 9, 4, 1, 0 of 14
    ranks = {"energy:0.6": 1, "energy:0.65": 2, "energy:0.99": 3, "energy:1": 3}
    assert {rank: choose_rank(values, rank, 9) for rank in ranks} == ranks
    assert choose_rank(torch.zeros(3), "energy:0.99", 9) == 1
    assert choose_rank(values, "sum", 9) == 9 and choose_rank(values, 2, 9) == 2


@pytest.mark.parametrize("rank", [0, -1, "all", "energy:", "energy:1.5", "energy:x", 1.5, "1e3"])
def test_an_impossible_rank_is_refused_with_the_choices(rank):
    with pytest.raises(ValueError, match="^rank: "):
        parse_rank(rank)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "tise"}, r"method: no such method 'tise'; near: \['ties'"),
        ({"space": "dense"}, r"space: method linear is not defined in 'dense'; choices: \['core', 'factor'\]"),
        ({"options": {"scale": 1.0}}, "options.scale: method linear has no such option; .* none"),
        ({"weights": {"one": 1}}, "weights.two: missing"),
        ({"weights": {"one": 1, "two": 1, "vqa": 1}}, r"weights.vqa: no such expert; .*'two'"),
        ({"weights": {"one": 1, "two": float("nan")}}, "weights: must be finite"),
        ({"weights": {"head": {"one": 1, "two": 1}}}, "weights.a.layers.0.q: missing"),
    ],
)
def test_a_mistake_is_named_by_its_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        merge([make_expert("one", 0), make_expert("two", 1)], **arguments)


def test_an_option_of_another_type_is_refused():
    with pytest.raises(ValueError, match="options.scale: must be a float, got 'big'"):
        merge([make_expert()], method="task_arithmetic", options={"scale": "big"})


@pytest.mark.parametrize(
    ("name", "is_same"),
    [
        ("hub/llava", True),
        ("/disk/llava/", True),
        ("/cache/hub/models--hub--llava/snapshots/8f4d9a3c/", True),
        ("/cache/hub/models--hub--llava/snapshots/8f4d9a3c", True),
        ("hub/bunny", False),
        ("hub/llava-bnb-4bit", False),
        ("/cache/hub/models--hub--bunny/snapshots/8f4d9a3c", False),
    ],
)
def test_bases_are_told_apart_by_their_names(name, is_same):
    one = make_expert("one", base_model_name_or_path="hub/llava")
    other = make_expert("other", base_model_name_or_path=name)
    if is_same:
        check_base_names([one, other])
    else:
        with pytest.raises(ValueError, match=f"different bases: .*'{name}'.*give base=FOLDER"):
            check_base_names([one, other])


def test_experts_of_different_bases_are_refused():
    one = make_expert("one")
    wide = expert_from_tensors(
        "wide",
        {key: torch.ones(1, 9) if "lora_A" in key else torch.ones(9, 1) for key in site_keys("head")},
        {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["head"]},
    )
    with pytest.raises(ValueError, match=r"different bases: head is .*'wide': \(9, 9\)"):
        merge([one, wide])
    with pytest.raises(ValueError, match="two experts are called 'one'"):
        merge([one, one])
    with pytest.raises(ValueError, match="fan_in_fan_out differs"):
        merge([one, make_expert("conv", fan_in_fan_out=True)])


def test_the_report_says_what_was_kept_of_each_expert():
    experts = [make_expert("one", 0), make_expert("two", 1, sites=("head",))]
    merged = merge(experts, weights={"one": 1, "two": 0.5}, rank=1)
    report = summarise(experts, merged)
    assert set(report["layers"]) == {"a.layers.0", "a.layers.1", "head"}
    ours = torch.cat([update(merged, site).flatten() for site in SITES])
    own = torch.cat([dense(experts[0], site, 3 / 2).flatten() for site in SITES])
    row = report["total"]["experts"]["one"]
    assert row["retention"] == pytest.approx(float(ours @ own / (own @ own)))
    assert row["norm"] == pytest.approx(float(own.norm()))
    assert row["weight"] == 1.0 and row["sites"] == 4
    assert report["total"]["experts"]["two"]["sites"] == 1
    assert report["layers"]["a.layers.1"]["experts"]["two"]["retention"] is None
    exact = dense(experts[0], "a.layers.1.q", 3 / 2)
    values = torch.linalg.svdvals(exact) ** 2
    kept = report["layers"]["a.layers.1"]["energy_kept"]
    assert kept == pytest.approx(float(values[0] / values.sum()))
    inside = report["layers"]["a.layers.1"]["experts"]["one"]["energy_in_span"]
    assert inside == pytest.approx(kept)  # alone at its site, the expert is what was cut


def test_layers_are_the_numbered_blocks():
    assert layer_of("model.language_model.layers.3.self_attn.q_proj") == ("model.language_model.layers.3")
    assert layer_of("model.multi_modal_projector.linear_1") == "model.multi_modal_projector"
    assert layer_of("lm_head") == "lm_head"


def peft_adapter(path, seed, **config):
    model, _ = tiny_llava()
    target = r".*language_model.*\.(q_proj|down_proj)"
    wrapped = get_peft_model(model, LoraConfig(target_modules=target, **config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(path)
    return expert_from_folder(path)


def test_the_merge_equals_pefts_cat_where_peft_is_right(tmp_path):
    """PEFT's `cat` is exact without rsLoRA; unequal ranks and alphas included."""
    experts = [
        peft_adapter(tmp_path / "one", 1, r=2, lora_alpha=7),
        peft_adapter(tmp_path / "two", 2, r=3, lora_alpha=2),
    ]
    merged = merge(experts, weights={"one": 0.6, "two": 1.3})
    theirs = PeftModel.from_pretrained(tiny_llava()[0], tmp_path / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "two", "two")
    theirs.add_weighted_adapter(["one", "two"], [0.6, 1.3], "both", combination_type="cat")
    for site in merged:
        layer = theirs.base_model.model.get_submodule(site)
        expected = layer.get_delta_weight("both").double()
        torch.testing.assert_close(update(merged, site), expected, rtol=0, atol=1e-7)


def test_an_adapter_is_read_as_peft_computes_it(tmp_path):
    expert = peft_adapter(tmp_path / "rs", 3, r=4, lora_alpha=6, use_rslora=True, rank_pattern={"down_proj": 2})
    merged = merge([expert])
    theirs = PeftModel.from_pretrained(tiny_llava()[0], tmp_path / "rs").base_model.model
    for site in merged:
        expected = theirs.get_submodule(site).get_delta_weight("default").double()
        torch.testing.assert_close(update(merged, site), expected, rtol=0, atol=1e-7)


def test_a_nan_in_one_adapter_stops_the_merge_and_names_the_file(tmp_path):
    expert = make_expert()
    tensors = {}
    for site in SITES:
        tensors.update(zip(site_keys(site), expert.read(site), strict=True))
    save_expert(tmp_path / "broken", tensors, expert.config)
    file = tmp_path / "broken" / "adapter_model.safetensors"
    stored = load_file(file)
    stored[site_keys("head")[0]][0, 0] = torch.nan
    save_file(stored, file)
    with pytest.raises(ValueError, match=r"broken/adapter_model.safetensors: .*head.lora_A.* 1 NaN"):
        merge([expert_from_folder(tmp_path / "broken")])
