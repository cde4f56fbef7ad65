"""A merge that is tuned: what it starts from."""

from types import SimpleNamespace

from scripts.demo.board.tuned_merge import TunedMerge, choices, length


def test_the_grid_adds_one_option_to_those_of_the_method():
    settings = TunedMerge(
        adapters=["a"], method="ties", options={"reduce": "sum"}, grid={"density": [0.1, 0.5]}, out="o"
    )
    assert choices(settings) == [{"reduce": "sum", "density": 0.1}, {"reduce": "sum", "density": 0.5}]
    assert choices(TunedMerge(adapters=["a"], out="o")) == [{}]


def test_the_length_of_a_merge_is_the_norm_of_all_its_sites():
    sites = {"q": SimpleNamespace(energy=9.0), "v": SimpleNamespace(energy=16.0)}
    assert length([sites]) == 5.0
