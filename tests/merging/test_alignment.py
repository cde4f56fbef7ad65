"""Alignment: maps that change no function, found where they are known, and what averaging gains by them."""

import itertools

import pytest
import torch
from torch import nn

from moa.merging.align.activations import activation_matching, repair, run_tensor, unit_statistics
from moa.merging.align.alignment import Symmetry, Units, align, best_maps, transport, value_of, weight_matching
from moa.merging.align.clip import clip_spec
from tests.support.networks import NAMES, average, clip, drawings, grey, mlp, similarities, train_mlp, with_state


def mlp_spec(layers):
    """Linear layers one after the other, with activations that act on each unit alone between them."""
    return {
        one: Symmetry(units=(Units(made=((f"{one}.weight", 0), (f"{one}.bias", 0)), used=((f"{two}.weight", 1),)),))
        for one, two in itertools.pairwise(layers)
    }


MLP = mlp_spec(["0", "2", "4"])


def spec_of(model, rotate):
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    return clip_spec(shapes, text_heads=4, vision_heads=4, rotate=rotate)


def random_maps(state, spec, seed=0):
    """Blocks in another order, and a permutation or rotation inside each."""
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for name, symmetry in spec.items():
        order = torch.randperm(symmetry.blocks, generator=generator)
        found = []
        for units in symmetry.units:
            key, axis = units.made[0]
            width = state[key].shape[axis] // symmetry.blocks
            if symmetry.rotate:
                whole = torch.zeros(symmetry.blocks, width, symmetry.blocks, width)
                for i, j in enumerate(order):
                    whole[i, :, j] = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
                map = whole.flatten(2).flatten(0, 1)
            else:
                parts = [torch.randperm(width, generator=generator) + width * j for j in order]
                map = torch.cat(parts)
            found.append(map)
        maps[name] = tuple(found)
    return maps


@pytest.fixture(scope="module")
def pictures():
    return drawings(NAMES[:8], 2, 24, seed=0)[0]


# Specifications ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rotate", [False, True])
def test_no_map_of_a_clip_changes_its_similarities(pictures, rotate):
    model = clip(0, layers=2)
    spec, state = spec_of(model, rotate), model.state_dict()
    moved = align(state, spec, random_maps(state, spec))
    with torch.no_grad():
        before, after = (similarities(m, pictures) for m in (model, with_state(model, moved)))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert all(not torch.equal(moved[k], t) for k, t in state.items() if t.ndim > 1)


def test_the_clip_specification_moves_every_axis_that_is_free():
    """What stays: pixels, words, positions, patches, and the temperature."""
    model = clip(0, layers=2)
    state = model.state_dict()
    moved = {axis for s in spec_of(model, True).values() for units in s.units for axis in units.axes}
    still = {(key, axis) for key, tensor in state.items() for axis in range(tensor.ndim)} - moved
    assert moved <= {(key, axis) for key, tensor in state.items() for axis in range(tensor.ndim)}
    assert still == {
        ("text_model.embeddings.token_embedding.weight", 0),
        ("text_model.embeddings.position_embedding.weight", 0),
        ("vision_model.embeddings.position_embedding.weight", 0),
        *(("vision_model.embeddings.patch_embedding.weight", axis) for axis in (1, 2, 3)),
    }


# Finding maps -----------------------------------------------------------------------------------


def test_blocks_and_units_are_assigned_together_as_by_trying_all():
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(6, 6, generator=generator) for _ in range(2)]
    units = (Units(made=(("a", 0),)), Units(made=(("b", 0),)))
    found, value = best_maps(matrices, Symmetry(units=units, blocks=2))
    inner = [torch.tensor(p) for p in itertools.permutations(range(3))]
    best = max(
        sum(max(value_of(m, torch.cat([one + 3 * i, two + 3 * j])) for one in inner for two in inner) for m in matrices)
        for i, j in ((0, 1), (1, 0))
    )
    assert value == pytest.approx(best, rel=1e-5)
    assert sum(value_of(m, f) for m, f in zip(matrices, found, strict=True)) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("match", [weight_matching, transport])
def test_a_shuffled_mlp_is_put_back(match):
    state = mlp((20, 30, 30, 5), seed=0).state_dict()
    shuffled = align(state, MLP, random_maps(state, MLP))
    found = align(shuffled, MLP, match(state, shuffled, MLP))
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


def test_transport_puts_back_a_shuffled_clip_heads_and_all():
    state = clip(0, layers=2).state_dict()
    spec = spec_of(clip(0, layers=2), rotate=False)
    shuffled = align(state, spec, random_maps(state, spec))
    found = align(shuffled, spec, transport(state, shuffled, spec))
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


def test_activations_put_back_a_rotated_clip(pictures):
    model = clip(0, layers=2)
    spec, state = spec_of(model, True), model.state_dict()
    rotated = with_state(model, align(state, spec, random_maps(state, spec)))
    maps = activation_matching(model, rotated, spec, [pictures], run=similarities)
    found = align(rotated.state_dict(), spec, maps)
    for key, tensor in state.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-3, msg=key)


@pytest.mark.parametrize("rotate", [False, True])
def test_weight_matching_brings_weights_closer_and_keeps_the_function(pictures, rotate):
    a, b = clip(0), clip(1)
    spec = spec_of(a, rotate)
    agreements = []
    for sweeps in (1, 2, 100):
        maps = weight_matching(a.state_dict(), b.state_dict(), spec, max_sweeps=sweeps)
        found = align(b.state_dict(), spec, maps)
        agreements.append(sum(float((found[k] * t).sum()) for k, t in a.state_dict().items()))
    start = sum(float((b.state_dict()[k] * t).sum()) for k, t in a.state_dict().items())
    assert start + 10 < agreements[0] <= agreements[1] <= agreements[2]
    with torch.no_grad():
        before, after = (similarities(m, pictures) for m in (b, with_state(b, found)))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_pairs_that_do_not_fit_are_named():
    a, b = (mlp((20, width, width, 5), 0).state_dict() for width in (12, 14))
    with pytest.raises(ValueError, match=r"0.weight: is \[12.* in A and \[14.* in B"):
        weight_matching(a, b, MLP)
    with pytest.raises(ValueError, match="B: 0.weight is missing"):
        weight_matching(a, {}, MLP)
    model = clip(0)
    with pytest.raises(ValueError, match="may rotate, which transport cannot"):
        transport(model.state_dict(), model.state_dict(), spec_of(model, True))


# REPAIR -----------------------------------------------------------------------------------------


def test_repair_sets_every_layer_to_the_interpolated_statistics():
    a, b = (mlp((20, 32, 32, 5), seed) for seed in (0, 1))
    batch = torch.randn(400, 20, generator=torch.Generator().manual_seed(0))
    fixed = repair(average(a, b), [a, b], ["0", "2"], [batch], weights=(0.3, 0.7))
    found, *ends = (unit_statistics(m, ["0", "2"], [batch], run_tensor) for m in (fixed, a, b))
    for layer in ("0", "2"):
        for part in range(2):
            wanted = 0.3 * ends[0][layer][part] + 0.7 * ends[1][layer][part]
            torch.testing.assert_close(found[layer][part], wanted, rtol=1e-3, atol=1e-3)
    untouched = average(a, b)[4]
    assert torch.equal(fixed[4].weight, untouched.weight)


def test_repair_of_a_network_to_itself_changes_nothing():
    model = mlp((20, 32, 5), 0)
    batch = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    fixed = repair(with_state(model, model.state_dict()), [model, model], ["0"], [batch])
    torch.testing.assert_close(fixed(batch), model(batch), rtol=1e-4, atol=1e-5)


def test_repair_needs_batches_and_biases():
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    with pytest.raises(ValueError, match="batches: REPAIR needs at least one"):
        repair(model, [model, model], ["0"], [])
    with pytest.raises(ValueError, match="layers: 0 is not a linear layer with a bias"):
        repair(model, [model, model], ["0"], [torch.zeros(1, 3)])


# Networks trained apart -------------------------------------------------------------------------


def loss_and_accuracy(logits, labels):
    loss = nn.functional.cross_entropy(logits, labels)
    return float(loss), float((logits.argmax(1) == labels).float().mean())


def recovered(rows, name):
    """Mean share of the loss barrier of plain averaging that an average is spared."""
    shares = []
    for row in rows:
        ends = (row["a"][0] + row["b"][0]) / 2
        shares.append((row["plain"][0] - row[name][0]) / (row["plain"][0] - ends))
    return sum(shares) / len(shares)


def accuracy(rows, name):
    return sum(row[name][1] for row in rows) / len(rows)


def show(rows):
    for name in rows[0]:
        cells = "  ".join(f"{loss:.2f} {right:4.0%}" for loss, right in (row[name] for row in rows))
        print(f"{name:28s} {cells}   barrier recovered {recovered(rows, name):4.0%}")


@pytest.mark.slow
def test_mlps_trained_apart_average_only_once_aligned():
    """Four hidden layers, 20 drawings to tell apart, three pairs of networks."""
    train, test = (drawings(NAMES[:20], n, 12, seed, turn=20) for seed, n in ((0, 150), (1, 30)))
    inputs, unseen, labels = grey(train[0]), grey(test[0]), test[1]
    spec, hidden = mlp_spec(["0", "2", "4", "6", "8"]), ["0", "2", "4", "6"]
    rows = []
    for pair in range(3):
        a, b = (
            train_mlp(mlp((144, 256, 256, 256, 256, 20), seed), inputs, train[1], seed, 300)
            for seed in (2 * pair, 2 * pair + 1)
        )
        mine, theirs = a.state_dict(), b.state_dict()
        found = {"a": a, "b": b, "plain": average(a, b)}
        found["plain, REPAIR"] = repair(average(a, b), [a, b], hidden, [inputs[::3]])
        for name, maps in (
            ("weight matching", weight_matching(mine, theirs, spec, seed=pair)),
            ("transport", transport(mine, theirs, spec)),
        ):
            aligned = with_state(b, align(theirs, spec, maps))
            found[name] = average(a, aligned)
            merged = average(a, aligned)
            found[f"{name}, REPAIR"] = repair(merged, [a, aligned], hidden, [inputs[::3]])
        with torch.no_grad():
            rows.append({n: loss_and_accuracy(m(unseen), labels) for n, m in found.items()})
    show(rows)
    assert accuracy(rows, "a") > 0.8 and accuracy(rows, "plain") < 0.2
    for name in ("weight matching", "transport"):
        assert recovered(rows, name) > 0.75 and accuracy(rows, name) > 0.6
    gain = {
        name: accuracy(rows, f"{name}, REPAIR") - accuracy(rows, name)
        for name in rows[0]
        if f"{name}, REPAIR" in rows[0]
    }
    assert gain["plain"] > 0.15 and gain["transport"] > 0.02 and gain["weight matching"] > 0
