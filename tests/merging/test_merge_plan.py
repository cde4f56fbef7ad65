"""Rules for some sites: which settings decide where, and what a rule without effect says."""

import pytest
import torch

from moa.files.spool import open_spool
from moa.merging.merge import merge, run_plan
from moa.merging.report.fidelity import summarise
from moa.merging.settings import SiteRule
from moa.merging.site_plan import make_plan, sum_gates
from moa.merging.source import lines_of_shared
from tests.merging.test_merge_identities import SHAPE, experts_of, make_expert, update_of

SITES = ["model.layers.0.q", "model.layers.1.q", "model.layers.2.q", "model.layers.0.up", "head"]


def experts(count=3):
    return experts_of(3, count, (2,), dict.fromkeys(SITES, (7, 8)))


def dense(merged):
    return {site: result.lora_b @ result.lora_a for site, result in merged.items()}


def test_the_first_rule_that_matches_a_site_decides_and_the_rest_keep_the_merges_own_settings():
    rules = [
        SiteRule(match=r"\.up$", method="ties", options={"density": 0.5}),
        SiteRule(match="layers.0", weights={"e0": 1, "e1": 0, "e2": 0}, rank=1),
    ]
    found = dense(merge(experts(), weights={"e0": 1, "e1": 2, "e2": 3}, rules=rules))
    plain = update_of(experts(), "linear", weights={"e0": 1, "e1": 2, "e2": 3})
    ties = update_of(experts(), "ties", options={"density": 0.5}, weights={"e0": 1, "e1": 2, "e2": 3})
    first = merge(experts(), weights={"e0": 1, "e1": 0, "e2": 0}, rank=1)
    torch.testing.assert_close(found["model.layers.0.up"], ties["model.layers.0.up"])
    torch.testing.assert_close(found["model.layers.0.q"], dense(first)["model.layers.0.q"])
    for site in ("model.layers.1.q", "model.layers.2.q", "head"):
        torch.testing.assert_close(found[site], plain[site])


def test_a_rules_options_win_and_another_method_brings_its_own_options_and_space():
    rules = [
        SiteRule(match="layers.0.q", options={"density": 0.5}),
        SiteRule(match="layers.1", method="knots"),
        SiteRule(match="layers.2", method="ties", space="core"),
    ]
    own = {"density": 0.1, "reduce": "sum"}
    plan = make_plan(experts(), method="ties", options=own, space="dense", rules=rules)
    found = [(job.method.paper[:4], job.space, dict(job.options)) for job in plan.jobs]
    assert [space for _, space, _ in found] == ["dense", "rows", "core", "dense"]
    options = [{key: row[key] for key in own if key in row} for _, _, row in found]
    assert options[0] == {"density": 0.5, "reduce": "sum"}
    assert options[2] == options[3] == own
    assert options[1] == {} or options[1] != own


def test_a_dropped_site_is_not_in_the_result_and_has_no_gates():
    plan = make_plan(experts(), rules=[SiteRule(match="head", drop=True)])
    assert [*run_plan(plan)] == SITES[:-1]
    assert sum_gates(plan)["head"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("values, expected", [([-0.5], [-0.5] * 3), ([0, 1, 4], [0, 1, 4]), ([0.2, 1], [0.2, 0.6, 1])])
def test_a_scale_runs_along_the_depth_of_the_whole_model(values, expected):
    rules = [SiteRule(match=r"\.q$", scale=[float(v) for v in values])]
    plan = make_plan(experts(), rules=rules)
    merged, plain = run_plan(plan), update_of(experts(), "linear")
    for site, factor in zip(SITES, expected, strict=False):
        torch.testing.assert_close(dense(merged)[site], factor * plain[site])
        torch.testing.assert_close(sum_gates(plan)[site], torch.full((3,), factor / 3).double())
        if factor:
            norms = merged[site].lora_a.norm(dim=1), merged[site].lora_b.norm(dim=0)
            torch.testing.assert_close(*norms)  # still balanced


def test_what_was_kept_is_told_of_the_scaled_result():
    one = experts(1)
    scaled, plain = merge(one, rules=[SiteRule(match="", scale=[-0.5])], rank=1), merge(one, rank=1)
    for site, result in scaled.items():
        assert result.energy == pytest.approx(plain[site].energy / 4)
        assert result.lost == pytest.approx(plain[site].lost / 4) and result.lost > 0.1
    total = summarise(one, merge(one, rules=[SiteRule(match="", scale=[-0.5])]))["total"]
    assert total["experts"]["e0"]["retention"] == pytest.approx(-0.5)
    assert total["experts"]["e0"]["energy_in_span"] == pytest.approx(1)
    assert total["norm"] == pytest.approx(0.5 * total["experts"]["e0"]["norm"])


@pytest.mark.parametrize(
    "rules, message",
    [
        ([{"match": "nowhere"}], "sites: 'nowhere' decides no site"),
        ([{"match": "layers"}, {"match": "layers.0"}], "sites: 'layers.0' decides no site"),
        ([{"match": ""}, {"match": "", "drop": True}], "decides no site"),
        ([{"match": "", "drop": True}], "the rules drop every site"),
        ([{"match": "q", "method": "tiez"}], "no such method 'tiez'; near: .'ties'"),
        ([{"match": "q", "options": {"density": 0.1}}], "options.density: method linear has no"),
        ([{"match": "q", "weights": {"e9": 1}}], "weights.e9: no such expert"),
    ],
)
def test_a_rule_that_cannot_work_is_named(rules, message):
    with pytest.raises(ValueError, match=message):
        make_plan(experts(), rules=[SiteRule(**rule) for rule in rules])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"match": "("}, "'\\(' is not a regular expression"),
        ({"match": "", "scale": []}, "must be one finite"),
        ({"match": "", "rank": 0}, "rank: must be a positive number"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SiteRule(**fields)


def test_factors_in_a_spool_are_the_same_rounded_once(tmp_path):
    with open_spool(tmp_path, torch.bfloat16) as keep:
        kept = merge(experts(), keep=keep)
    for site, result in merge(experts()).items():
        assert torch.equal(kept[site].lora_a, result.lora_a.bfloat16())
        assert torch.equal(kept[site].lora_b, result.lora_b.bfloat16())
    assert list(tmp_path.iterdir()) == []


# Experts that are added ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "space"),
    [
        ("linear", "core"),
        ("regmean", "rows"),
        ("ties", "dense"),
        ("ties", "rows"),
        ("linear", "factor"),
        ("lego", None),
    ],
)
def test_a_shared_expert_is_added_to_what_the_others_merge_to(method, space):
    """Of another rank than theirs, and at a site of its own."""
    routed = experts_of(0, 2, (2,))
    shared = make_expert("shared", 9, 3, {**SHAPE, "layers.2.self_attn.q_proj": (5, 8)})
    settings = {"method": method, "space": space, "rank": 8}
    found = merge([routed[0], shared, routed[1]], added=["shared"], **settings)
    expected, alone = merge(routed, **settings), merge([shared])
    assert found.keys() == {*SHAPE, "layers.2.self_attn.q_proj"}
    for site, result in found.items():
        others = expected[site].lora_b @ expected[site].lora_a if site in expected else 0.0
        own = alone[site].lora_b @ alone[site].lora_a
        torch.testing.assert_close(result.lora_b @ result.lora_a, others + own)


def test_a_shared_expert_that_is_not_added_has_a_line(tmp_path):
    runs = [tmp_path / name / "checkpoints/step-000001" for name in ("a", "b")]
    for run in runs:
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("experts: {common: {gate: always}, vqa: {}}")
    vqa, common = (runs[0] / "experts" / name for name in ("vqa", "common"))
    assert not [*lines_of_shared([vqa, common], runs[:1])]
    (missing,) = lines_of_shared([vqa], runs[:1])
    assert missing.startswith("common of a: ") and missing.endswith(f"not in the result; add {common} to adapters")
    merged, missing = lines_of_shared([vqa, common, runs[1] / "experts/vqa"], runs)
    assert "merged here like any other" in merged and missing.startswith("common of b: ")


def test_the_gates_of_a_merge_with_a_shared_expert_are_its_weights():
    experts = [*experts_of(0, 2, (2,)), make_expert("shared", 9, 3)]
    plan = make_plan(experts, added=["shared"])
    gates = sum_gates(plan)
    assert all(row.tolist() == [0.5, 0.5, 1.0] for row in gates.values())
    weights = {"e0": 0.25, "e1": 0.5, "shared": 2.0}
    scaled = sum_gates(
        make_plan(experts, method="task_arithmetic", options={"scale": 2.0}, weights=weights, added=["shared"])
    )
    assert all(row.tolist() == [0.5, 1.0, 2.0] for row in scaled.values())
