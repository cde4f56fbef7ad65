"""The mixture: shares, passes, and an order that nothing but seed and position decides."""

from collections import Counter

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from data.checks import BadSampleError
from data.mixture import BLOCK, Mixture, quotas
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
