"""The fidelity report: its numbers on experts whose relations are known, and its page."""

import json

import pytest
import torch

from moa.analysis.fidelity_page import findings, write_page
from moa.merging.core import expert_from_tensors
from moa.merging.fidelity import cross_terms, measure, sign_conflict
from moa.merging.merge import merge
from moa.peft_io import save_expert, site_keys
from scripts import analyse
from tests.test_merge_identities import experts_of

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


def test_signs_of_one_expert_never_conflict(three):
    pair = three[0].factors(SITES[0], torch.float64)
    assert sign_conflict([pair, None]) == 0
    assert sign_conflict([pair, (pair[0], -pair[1])]) == 1


def test_the_page_names_who_fights_and_holds_its_pictures(three, tmp_path):
    merged = merge(three, weights={"plus": 1, "minus": 0.5, "apart": 1}, rank=1)
    record = measure(three, merged)
    lines = findings(record)
    assert "minus and plus agree least: cosine -1.00 over all sites" in lines[0]
    assert any("plus the merge keeps least" in line for line in lines)
    assert lines[-1] == "2 rows of A are zero: ranks that do nothing."
    write_page(tmp_path / "page.html", record, {"method": "linear <&>"})
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and "linear &lt;&amp;&gt;" in page
    assert "<script" not in page and "http" not in page  # self-contained


def test_the_script_reports_without_merging(three, tmp_path, capsys):
    for one in three:
        tensors = {}
        for site in SITES:
            tensors.update(zip(site_keys(site), one.read(site), strict=True))
        save_expert(tmp_path / one.name, tensors, one.config)
    analyse.main([f"adapters=[{tmp_path}/*]", f"out={tmp_path / 'report'}"])
    assert "agree least" in capsys.readouterr().out
    assert (tmp_path / "report" / "fidelity.html").is_file()
    assert len(json.loads((tmp_path / "report" / "fidelity.json").read_text())["sites"]) == 2


def test_a_mistake_of_the_script_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        analyse.main(["adapters=[]", f"out={tmp_path}"])
    assert capsys.readouterr().err == "error: adapters: names none\n"
    with pytest.raises(SystemExit):
        analyse.main([])
    assert capsys.readouterr().err == "error: out: names no folder\n"
