"""The fidelity report: its numbers on experts whose relations are known, and its page."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moa.analysis.fidelity_page import details, summary, write_page
from moa.analysis.fidelity_plots import pairwise
from moa.files.peft import save_expert, site_keys
from moa.merging.adapters import expert_from_tensors
from moa.merging.merge import merge
from moa.merging.report.console import interference_tables, report_lines
from moa.merging.report.fidelity import measure
from moa.merging.report.interference import cross_terms, prune, sample_entries, sign_conflict, sign_disagreement
from moa.statistics.moments import InputSums
from scripts import analyse
from tests.merging.test_merge_identities import experts_of

SITES = ("layers.0.q", "layers.1.q")


def expert(name, a, b):
    tensors = {}
    for site in SITES:
        tensors.update(zip(site_keys(site), (torch.tensor(a), torch.tensor(b)), strict=True))
    config = {"peft_type": "LORA", "r": len(a), "lora_alpha": len(a), "target_modules": list(SITES)}
    return expert_from_tensors(name, tensors, config)


@pytest.fixture
def three():
    """The second undoes the first; the third lives elsewhere, and one of its rows is zero."""
    return [
        expert("plus", [[1.0, 0, 0]], [[1.0], [0], [0]]),
        expert("minus", [[1.0, 0, 0]], [[-1.0], [0], [0]]),
        expert("apart", [[0, 0, 2.0], [0, 0, 0]], [[0, 1.0], [0, 0], [3.0, 0]]),
    ]


def test_relations_of_known_experts(three):
    record = measure(three)
    total = record["total"]
    expected = [[1, -1, 0], [-1, 1, 0], [0, 0, 1]]
    torch.testing.assert_close(torch.tensor(total["cosine"]), torch.tensor(expected).float())
    overlap = [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    torch.testing.assert_close(torch.tensor(total["overlap"]), torch.tensor(overlap).float())
    assert total["norms"] == pytest.approx([2**0.5, 2**0.5, 6 * 2**0.5])
    assert total["sign_conflict"] == pytest.approx(2 / 8)  # 1 + 1 of 1 + 1 + 6 cancel
    assert total["sign_disagreement"][0][1] == 1 and total["sign_disagreement"][0][2] == 0.5
    assert record["sites"]["layers.0.q"]["zero_rows"] == [0, 0, 1]
    assert record["sites"]["layers.0.q"]["singular_values"] == [[1.0], [1.0], [pytest.approx(6.0)]]
    assert "merged" not in total
    assert json.loads(json.dumps(record)) == record


def test_what_became_of_each_expert(three):
    merged = merge(three, weights={"plus": 1, "minus": 0.5, "apart": 1}, rank=1)
    row = measure(three, merged)["total"]["merged"]
    # 6 along the third, 0.5 along the first; rank 1 keeps the third alone
    assert row["retention"] == pytest.approx([0, 0, 1])
    assert row["energy_in_span"] == pytest.approx([0, 0, 1])
    assert row["cut_by_rank"] == pytest.approx(0.25 / 36.25)
    assert row["outside_span"] == pytest.approx(0, abs=1e-12)
    site = measure(three, merged)["sites"]["layers.1.q"]["merged"]
    assert site["singular_values_of_sum"] == pytest.approx([6.0, 0.5])
    assert site["singular_values"] == pytest.approx([6.0])


def test_energy_outside_the_span_is_what_dense_pruning_leaves(three):
    experts = experts_of(0)
    inside = measure(experts, merge(experts, method="ties", rank=7))
    outside = measure(experts, merge(experts, method="ties", space="dense", rank=7))
    assert inside["total"]["merged"]["outside_span"] == pytest.approx(0, abs=1e-12)
    assert 0.01 < outside["total"]["merged"]["outside_span"] < 0.9


def test_cross_terms_are_those_of_the_product_of_sums(three):
    a, b = torch.eye(2).double(), torch.eye(2).double()
    pairs = [(a[:1], b[:, :1]), (a[1:], b[:, 1:])]
    # (b1 + b2)(a1 + a2) is all ones; wanted is the identity: two entries too many, of norm sqrt 2
    assert cross_terms(pairs, torch.ones(2).double()) == pytest.approx(1.0)
    assert cross_terms(pairs[:1], torch.ones(1).double()) == pytest.approx(0, abs=1e-12)
    assert measure(three)["total"]["cross_terms"] is None  # the ranks differ
    # The first two share A up to scale, and their products cancel: what is added is all zero too.
    assert measure(three[:2])["total"]["cross_terms"] == 0


def test_cross_terms_are_what_factor_space_adds():
    """Whatever the scales: the same from the merges themselves."""
    experts = experts_of(0, ranks=(2, 2, 2))
    weights = {"e0": 1.0, "e1": 0.5, "e2": -2.0}
    exact = merge(experts, weights=weights, method="linear")
    apart = merge(experts, weights=weights, method="linear", space="factor")
    for site, row in measure(experts, apart)["sites"].items():
        wanted = exact[site].lora_b @ exact[site].lora_a
        found = apart[site].lora_b @ apart[site].lora_a
        assert row["cross_terms"] == pytest.approx(float((found - wanted).norm() / wanted.norm()))


def test_signs_of_one_expert_never_conflict(three):
    pair = three[0].factors(SITES[0], torch.float64)
    assert sign_conflict(sample_entries([pair, None])) == 0
    assert sign_conflict(sample_entries([pair, (pair[0], -pair[1])])) == 1


def test_signs_disagree_by_the_mass_of_products():
    entries = torch.tensor([[1.0, 2.0, -1.0, 0.0], [3.0, -1.0, -1.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    # products 3, -2, 1, 0: 2 of 6 pull apart; with an update of zeros nobody knows
    expected = torch.tensor([[0, 1 / 3, 0.5], [1 / 3, 0, 0.5], [0.5, 0.5, 0.5]]).double()
    torch.testing.assert_close(sign_disagreement(entries), expected, rtol=0, atol=1e-6)


def test_what_pruning_and_scaling_make_of_an_expert():
    a = torch.tensor([[4.0, 3.0, 0.0, 0.0], [0.5, 0.0, 0.6, 0.0]]).double()
    b = torch.eye(3, 2).double() * torch.tensor([1.0, 2.0]).double()
    kept = prune((a, b), density=0.125)  # the 4 and 3 of A, both values of B
    # row 0 is whole, row 1 has no survivor and is not scaled
    assert kept["scales"] == [1.0, 1.0] and kept["emptied_rows"] == 1
    assert kept["singular_values"] == pytest.approx([5.0]) == kept["scaled"]
    a[0, 2], a[1, 1] = 2.0, 3.5  # kept are 4, 3.5 and 3: rows of 9 and 4.6 lose 2 and 1.1
    kept = prune((a, b), density=0.25)
    assert kept["scales"] == pytest.approx([9 / 7, 4.6 / 3.5])


def test_the_summary_names_who_fights_where_and_what_was_lost(three):
    merged = merge(three, weights={"plus": 1, "minus": 0.5, "apart": 1}, rank=1)
    first, second = summary(measure(three, merged), {"method": "linear", "rank": 1})
    assert first == (
        "plus and minus fight most: 100% of what both change pulls in opposite directions (50% is chance; "
        "cosine -1.00), mainly in layers.0."
    )
    assert second.startswith("linear at rank 1 kept 0% of plus and 100% of apart")
    assert "cut off 0.7% of the result's energy" in second  # 0.25 of 36.25
    assert "apart has 2 ranks that do nothing: " in details(measure(three))[-1]
    (line,) = summary(measure([three[0], three[2]]), {})
    assert line.startswith("No two experts fight or help each other: every cosine lies between 0.00")
    (line,) = summary(measure([three[0], three[0]]), {})
    assert "plus and plus pull together most: cosine 1.00" in line


@pytest.mark.slow
def test_the_page_holds_its_pictures(three, tmp_path):
    merged = merge(three, weights={"plus": 1, "minus": 0.5, "apart": 1}, rank=1)
    write_page(tmp_path / "page.html", measure(three, merged), {"method": "linear <&>"})
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and "linear &lt;&amp;&gt;" in page
    assert "<script" not in page and "http" not in page  # self-contained
    write_page(tmp_path / "one.html", measure(three[:1]), {})  # nobody to fight with
    assert (tmp_path / "one.html").read_text().count("data:image/png;base64,") == 4


def test_an_expert_without_a_site_counts_as_nothing_there(three):
    tensors = dict(zip(site_keys(SITES[0]), three[2].read(SITES[0]), strict=True))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [SITES[0]]}
    record = measure([three[0], expert_from_tensors("half", tensors, config)])
    assert record["sites"][SITES[1]]["norms"] == [1.0, 0.0]
    assert record["sites"][SITES[1]]["zero_rows"] == [0, None]
    assert record["total"]["norms"] == pytest.approx([2**0.5, 6.0])


def lone(name, site, value=1.0):
    """An expert of one site."""
    tensors = dict(zip(site_keys(site), (torch.tensor([[value, 0, 0]]), torch.ones(3, 1)), strict=True))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [site]}
    return expert_from_tensors(name, tensors, config)


def test_a_pair_that_shares_no_site_stays_blank():
    record = measure([lone("a", SITES[0]), lone("b", SITES[1]), lone("c", SITES[1], -2.0)])
    assert record["total"]["sign_disagreement"] == [[0.0, None, None], [None, 0.0, 1.0], [None, 1.0, 0.0]]
    blank = np.isnan(pairwise(record["total"], "cosine"))
    assert blank.tolist() == [[False, True, True], [True, False, False], [True, False, False]]
    assert np.isnan(pairwise(record["layers"]["layers.0"], "overlap")[1, 2])  # neither is there
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    (_, pairs) = interference_tables(record)
    assert dict(zip(pairs.columns[0].cells, pairs.columns[2].cells, strict=True)) == {
        "b, c": "100.0%", "a, b": "-", "a, c": "-"
    }  # fmt: skip


@pytest.mark.slow
def test_the_page_begins_with_what_the_model_answers_and_has_no_reprs(three, tmp_path):
    about = {"method": "ties", "options": {"density": 0.2, "scope": None}, "sites": [], "beside": [],
             "rules": [{"match": "mlp", "drop": False}]}  # fmt: skip
    agreement = "6% of the merge's greedy tokens are those of the model that routes each sample"
    record = measure([*three, lone("elsewhere", SITES[0])], None)
    write_page(tmp_path / "page.html", record, about, agreement)
    page = (tmp_path / "page.html").read_text()
    assert page.index(agreement.replace("'", "&#x27;")) < page.index("fight most")
    assert "<td>density=0.2</td>" in page and "<td>match=mlp</td>" in page
    for repr_ in ("[]", "{", "None", "sites</td>", "beside"):
        assert repr_ not in page.split("</style>")[1].split("data:image")[0], repr_


@pytest.mark.parametrize(("share", "advised"), [(0.49, True), (0.5, False)])
def test_low_agreement_comes_with_what_to_try_first(share, advised):
    row = {"max_abs_logit_diff": 1.0, "max_abs_logit": 2.0, "greedy_token_agreement": 1.0}
    routed = {"routed_model": {**row, "greedy_token_agreement": share}}
    report = {"kind": "adapter", "dtype": "float32", "keys_written": 2, "verified": True,
              "comparisons": {"written": row, "live_mixture": row, **routed}, "probe": {"samples": 4}}  # fmt: skip
    last = report_lines(report, Path("out"))[-1]
    assert last.startswith("advice: 49% of the merge's greedy tokens are those") == advised


@pytest.mark.slow
def test_the_script_reports_without_merging(three, tmp_path, capsys):
    for one in three:
        tensors = {}
        for site in SITES:
            tensors.update(zip(site_keys(site), one.read(site), strict=True))
        save_expert(tmp_path / one.name, tensors, one.config)
    analyse.main([f"adapters=[{tmp_path}/*]", f"out={tmp_path / 'report'}"])
    printed = capsys.readouterr().out
    assert "minus and plus fight most" in printed and "minus, plus" in printed
    assert (tmp_path / "report" / "fidelity.html").is_file()
    assert len(json.loads((tmp_path / "report" / "fidelity.json").read_text())["sites"]) == 2


def test_a_mistake_of_the_script_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        analyse.main(["adapters=[]", f"out={tmp_path}"])
    assert capsys.readouterr().err == "error: adapters: names none\n"
    with pytest.raises(SystemExit) as stop:
        analyse.main([f"adapters=[{tmp_path}]"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/adapter_config.json: missing")
    assert list(tmp_path.iterdir()) == []


def with_inputs_of(found, x):
    sums = InputSums()
    sums.add(x)
    return replace(found, inputs=lambda site: sums.sketch(x.shape[1], x.shape[1]))


def test_crosstalk_and_residual_are_those_of_outputs_on_the_experts_own_inputs():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(7, 5, generator=generator).double() * (1 + k) for k in range(3)]
    plain = made(generator)
    found = [with_inputs_of(e, x) for e, x in zip(plain, inputs, strict=True)]
    merged = merge(found, method="linear", weights={"e0": 0.5, "e1": 0.3, "e2": 0.2}, rank=2)
    record = measure(found, merged)
    for site in SITES:
        dense = [b @ a for a, b in (e.factors(site, torch.float64) for e in found)]
        result = merged[site].lora_b @ merged[site].lora_a
        for k, x in enumerate(inputs):
            own = (x @ dense[k].T).square().sum()
            row = [float((x @ d.T).square().sum() / own) for d in dense]
            expected = [None if j == k else pytest.approx(value) for j, value in enumerate(row)]
            assert record["sites"][site]["crosstalk"][k] == expected
            error = (x @ (result - dense[k]).T).square().sum() / own
            assert record["sites"][site]["residual"][k] == pytest.approx(float(error))
    over = [record["sites"][site]["crosstalk"][0][1] for site in SITES]
    assert record["total"]["crosstalk"][0][1] == pytest.approx(sum(over) / 2)
    lines = "\n".join(details(record))
    assert "Crosstalk is" in lines and "a merge without loss" in lines
    assert interference_tables(record)[-1].title == "crosstalk"
    assert "crosstalk" not in measure(plain)["total"]  # without statistics


def made(generator):
    """Three experts of rank 2 on five inputs and four outputs, at two sites."""
    shapes = ((2, 5), (4, 2))
    factors = [[torch.randn(s, generator=generator).tolist() for s in shapes] for _ in range(3)]
    return [expert(f"e{k}", *pair) for k, pair in enumerate(factors)]


def test_a_shared_expert_is_no_other_and_part_of_what_each_one_does():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=generator).double()
    routed, also, shared = made(generator)
    found = [with_inputs_of(routed, x), with_inputs_of(also, x), shared]
    one = merge(found, method="task_arithmetic", weights={"e0": 1.0, "e1": 0.0, "e2": 1.0})
    record = measure(found, one, shared={"e2"})["total"]
    assert record["residual"][0] == pytest.approx(0, abs=1e-12) and record["residual"][2] is None
    table = record["crosstalk"]
    assert [table[0][2], table[1][2], *table[2]] == [None] * 5 and table[0][1] > 0
