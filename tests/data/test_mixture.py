"""The mixture: shares, passes, and an order that nothing but seed and position decides."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from data.checks import BadSampleError
from data.config import SourceConfig
from data.mixture import BLOCK, Grouping, Mixture, quotas
from data.readers.table import open_records
from data.sample import Sample


class Numbers:
    """Samples whose id is their index."""

    def __init__(self, name: str, size: int):
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        image = Image.new("RGB", (4, 4))
        return Sample(id=str(index), image_id="", image=image, question="?", answers=("a",),
                      task="t", source=self.name)  # fmt: skip


def mixture(seed: int = 0, **weights: float) -> Mixture:
    sizes = {"a": 30, "b": 70, "c": 7}
    return Mixture({n: Numbers(n, s) for n, s in sizes.items()}, weights, seed=seed)


def test_each_block_holds_every_source_by_its_weight_to_the_sample():
    mixed = mixture(a=1, b=1, c=2)
    for start in (0, BLOCK, 5 * BLOCK):
        counts = Counter(mixed.locate(p)[0] for p in range(start, start + BLOCK))
        assert counts == {"a": 250, "b": 250, "c": 500}


def test_each_block_mixes_its_sources_in_an_order_of_its_own():
    mixed = mixture()
    names = [mixed.locate(position)[0] for position in range(3 * BLOCK)]
    orders = {tuple(names[first : first + BLOCK]) for first in range(0, 3 * BLOCK, BLOCK)}
    assert len(orders) == 3


def test_a_source_is_walked_without_repeats_and_in_a_new_order_at_each_pass():
    walk = [i for name, i in map(mixture().locate, range(3000)) if name == "b"]
    passes = [walk[k : k + 70] for k in range(0, 700, 70)]
    assert all(sorted(one) == list(range(70)) for one in passes)
    assert len({tuple(one) for one in passes}) == len(passes)


def test_the_order_is_a_function_of_seed_and_position_alone():
    forwards = [mixture(3).locate(p) for p in range(2500)]
    backwards = [mixture(3).locate(p) for p in reversed(range(2500))]
    assert forwards == backwards[::-1]
    assert forwards != [mixture(4).locate(p) for p in range(2500)]


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_do_not_change_the_order(workers):
    mixed = mixture()
    loader = DataLoader(mixed, sampler=range(40), batch_size=4, num_workers=workers,
                        collate_fn=list)  # fmt: skip
    seen = [(s.source, int(s.id)) for batch in loader for s in batch]
    assert seen == [mixed.locate(p) for p in range(40)]


def test_the_table_of_an_epoch_counts_what_is_drawn():
    table = mixture(a=1, b=1, c=2).epoch()
    assert [(s.name, s.size, s.draws) for s in table] == [
        ("a", 30, 27),
        ("b", 70, 27),
        ("c", 7, 54),
    ]
    assert table[2].passes == pytest.approx(54 / 7)


def test_largest_remainders_are_rounded_up():
    assert quotas([1, 1, 1], 10) == [4, 3, 3]
    assert quotas([5, 3, 2], 10) == [5, 3, 2]
    assert quotas([5, 3, 1], 10) == [6, 3, 1]  # of 5.6, 3.3 and 1.1


def test_a_source_that_would_never_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"data\.sources\.c\.weight"):
        mixture(a=1, b=1, c=1e-5)


def test_a_reader_that_fails_on_a_file_yields_the_error_in_place_of_the_sample():
    class Broken(Numbers):
        def __getitem__(self, index: int) -> Sample:
            raise OSError("image file is truncated")

    item = Mixture({"x": Broken("x", 3)})[0]
    assert isinstance(item, BadSampleError)
    assert "source 'x', sample" in str(item) and "truncated" in str(item)


def test_counted_draws_fill_every_epoch_to_the_sample():
    draws = {"a": 30, "b": 140, "c": 3}
    mixed = Mixture({n: Numbers(n, s) for n, s in (("a", 30), ("b", 70), ("c", 7))}, draws=draws)
    assert mixed.epoch_length == 173
    for epoch in range(3):
        walk = [mixed.locate(p) for p in range(173 * epoch, 173 * (epoch + 1))]
        assert Counter(name for name, _ in walk) == draws
        assert sorted(i for name, i in walk if name == "b") == sorted([*range(70)] * 2)
    assert [(s.draws, s.weight, s.passes) for s in mixed.epoch()] == [
        (30, None, 1.0), (140, None, 2.0), (3, None, 3 / 7)
    ]  # fmt: skip


def test_epochs_of_a_part_of_a_source_go_on_where_the_last_one_stopped():
    mixed = Mixture({"a": Numbers("a", 10), "b": Numbers("b", 4)}, draws={"a": 5, "b": 4})
    seen = [i for name, i in map(mixed.locate, range(18)) if name == "a"]
    assert sorted(seen) == [*range(10)]


class Lengths(Numbers):
    """Every third sample is text alone; lengths are scattered."""

    def lengths(self, index: int) -> tuple[int, int]:
        return int(index % 3 > 0), index * 7919 % 1000


GROUPING = Grouping(batch_size=8, window=10)


def grouped(seed: int = 0, grouping: Grouping | None = GROUPING) -> Mixture:
    sources = {"a": Lengths("a", 500), "b": Lengths("b", 333)}
    return Mixture(sources, seed=seed, grouping=grouping)


def sizes(mixed: Mixture, count: int) -> np.ndarray:
    """[batch, 8, (images, letters)] of the first `count` positions."""
    found = [mixed.sources[name].lengths(i) for name, i in map(mixed.locate, range(count))]
    return np.array(found).reshape(-1, 8, 2)


def test_grouping_only_changes_places_within_a_window():
    before, after = grouped(grouping=None), grouped()
    for start in (0, 80, 400):
        window = range(start, start + 80)
        assert sorted(map(before.locate, window)) == sorted(map(after.locate, window))


def test_batches_are_alike_in_modality_and_length():
    scattered, alike = sizes(grouped(grouping=None), 800), sizes(grouped(), 800)
    mixed = (np.ptp(alike[..., 0], axis=1) > 0).reshape(10, 10).sum(1)
    assert mixed.max() <= 1  # per window
    assert (np.ptp(scattered[..., 0], axis=1) > 0).mean() > 0.9
    padding = 1 - alike[..., 1].sum() / (8 * alike[..., 1].max(1).sum())
    before = 1 - scattered[..., 1].sum() / (8 * scattered[..., 1].max(1).sum())
    assert padding < 0.2 < 0.4 < before


def test_batches_come_in_another_order_than_by_length():
    longest = sizes(grouped(), 800)[..., 1].max(1).reshape(10, 10)
    assert not any((np.diff(window) >= 0).all() for window in longest)
    assert len({tuple(np.argsort(window)) for window in longest}) > 1


def test_each_window_puts_its_batches_in_an_order_of_its_own():
    """The shortest text of a batch says which place it had before the batches were shuffled."""
    found = sizes(grouped(), 3 * 80) @ [1000, 1]
    orders = np.argsort(found.min(1).reshape(3, 10), axis=1)
    assert len({*map(tuple, orders.tolist())}) == 3


def test_a_grouped_order_is_a_function_of_seed_and_position_alone():
    forwards = [grouped(3).locate(p) for p in range(200)]
    again = grouped(3)
    assert [again.locate(p) for p in reversed(range(200))][::-1] == forwards
    assert [grouped(4).locate(p) for p in range(200)] != forwards
    loader = DataLoader(grouped(3), sampler=range(200), batch_size=8, num_workers=2,
                        collate_fn=list)  # fmt: skip
    assert [(s.source, int(s.id)) for batch in loader for s in batch] == forwards


def test_a_reader_without_lengths_is_named():
    with pytest.raises(ValueError, match="data.group_by_length: the reader of b"):
        Mixture({"a": Lengths("a", 9), "b": Numbers("b", 9)}, grouping=GROUPING)


def test_a_row_that_cannot_be_read_is_drawn_like_any_other(tmp_path):
    rows = [{"image": "x.png", "question": "a" * n, "task": "vqa"} for n in range(1, 8)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, "", "{broken"]), encoding="utf-8")
    source = SourceConfig(name="mine", format="jsonl", path=str(tmp_path / "rows.jsonl"))
    data = open_records(source, None, None)
    assert [data.lengths(i) for i in range(7)] == [(1, n) for n in range(1, 8)]
    mixed = Mixture({"mine": data}, grouping=Grouping(batch_size=2, window=4))
    items = [mixed[position] for position in range(8)]
    assert {item.rule for item in items} == {"missing image", "unreadable row"}
    assert sorted(item.where[-1] for item in items) == [*"12345679"]
