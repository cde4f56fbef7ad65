"""What the units of two networks do on the same data: matching them by it, and resetting it after averaging.

`activation_matching` pairs units whose outputs vary together (Li et al. 2016; Git Re-Basin, section 3.1).
`repair` is REPAIR (Jordan et al. 2023): averages of units that do not quite agree vary less, from layer to layer
less. So the mean and standard deviation of every unit before its activation are set to those of the endpoints,
interpolated (the deviation, not the variance), and folded into weight and bias: the network remains a plain one.

In transformers every token of every sample counts as one value, padding too.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moa.merging.align.alignment import Maps, Spec, Units, best_maps
from moa.statistics.gather import watch_outputs

Run = Callable[[nn.Module, Any], object]  # (model, batch): one forward pass
Vector = Float[Tensor, " units"]
Values = Float[Tensor, "values units"]
Goals = dict[str, tuple[Vector, Vector]]  # layer -> mean, standard deviation
SMALL = 1e-5  # added to a variance, as BatchNorm does


def run_tensor(model: nn.Module, batch: Any) -> object:
    return model(batch)


@torch.no_grad()
def activation_matching(
    a: nn.Module, b: nn.Module, spec: Spec, batches: Iterable[Any], *, run: Run = run_tensor
) -> Maps:
    """Maps of B's units to A's by the covariance of their outputs, every layer normalised to one scale.

    One pass, no local optima: what a unit does on data does not depend on the order of any other units. A unit is
    seen in the outputs of all linear layers and LayerNorms that make it.
    """
    layers = {name: [_makers(a, units, name) for units in s.units] for name, s in spec.items()}
    seen = {x: Covariance() for groups in layers.values() for group in groups for x in group}
    for batch in batches:
        mine, theirs = (_outputs(model, seen, batch, run) for model in (a, b))
        for layer, covariance in seen.items():
            covariance.add(mine[layer], theirs[layer])
    maps: Maps = {}
    for name, groups in layers.items():
        agreements = [sum((seen[x].normalised() for x in g), start=torch.zeros(())) for g in groups]
        found, _ = best_maps(agreements, spec[name])
        maps[name] = tuple(found)
    return maps


class Covariance:
    """Running sums over A's and B's values at one layer: their number, sums, squares, and products."""

    sums: tuple[Any, ...] = (0, 0.0, 0.0, 0.0, 0.0, 0.0)

    def add(self, a: Float[Tensor, "values a_units"], b: Float[Tensor, "values b_units"]) -> None:
        more = len(a), a.sum(0), b.sum(0), a.square().sum(), b.square().sum(), a.T @ b
        self.sums = tuple(old + new for old, new in zip(self.sums, more, strict=True))

    def normalised(self) -> Float[Tensor, "a_units b_units"]:
        return self.exact().float()

    def exact(self) -> Float[Tensor, "a_units b_units"]:
        """Covariance over the root of both layers' whole variances, in double precision."""
        count, *sums = self.sums
        if not count:
            raise ValueError("batches: matching needs at least one")
        mean_a, mean_b, square_a, square_b, product = (value / count for value in sums)
        whole_a, whole_b = square_a - mean_a.square().sum(), square_b - mean_b.square().sum()
        covariance = product - torch.outer(mean_a, mean_b)
        return covariance / (whole_a * whole_b).clamp(min=SMALL**2).sqrt()


def _makers(model: nn.Module, units: Units, name: str) -> list[str]:
    """The modules whose outputs are the units."""
    paths = [key.removesuffix(".weight") for key, axis in units.made if not axis]
    paths = [path for path in paths if not path.endswith(".bias")]
    found = [path for path in paths if isinstance(dict(model.named_modules()).get(path), nn.Linear | nn.LayerNorm)]
    if not found:
        raise ValueError(f"spec: no linear layer or LayerNorm outputs the units of {name}")
    return found


def _outputs(model: nn.Module, layers: Iterable[str], batch: Any, run: Run) -> dict[str, Values]:
    kept: dict[str, Tensor] = {}

    def keep(layer: str, output: Tensor) -> None:
        kept[layer] = output.double().flatten(0, -2)

    with watch_outputs(model, layers, keep):
        run(model, batch)
    return kept


@torch.no_grad()
def repair(
    model: nn.Module,
    endpoints: Sequence[nn.Module],
    layers: Sequence[str],
    batches: Iterable[Any],
    *,
    weights: Sequence[float] = (0.5, 0.5),
    run: Run = run_tensor,
) -> nn.Module:
    """Reset the named linear layers of `model`, in place, to the statistics of the aligned endpoints.

    While the model's own statistics are taken, each batch already passes on reset, as through BatchNorm in training,
    so that a later layer sees what it will see. Leave out the last layer, whose outputs are the answer.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches: REPAIR needs at least one to take statistics from")
    for layer in layers:
        _linear(model, layer)
    found = [unit_statistics(endpoint, layers, batches, run) for endpoint in endpoints]
    share, goals = torch.tensor(list(weights), dtype=torch.float64), Goals()
    for layer in layers:
        means, stds = zip(*(ends[layer] for ends in found), strict=True)
        goals[layer] = share @ torch.stack(means), share @ torch.stack(stds)
    for layer, (mean, std) in unit_statistics(model, layers, batches, run, goals).items():
        linear, (goal_mean, goal_std) = _linear(model, layer), goals[layer]
        gain = goal_std / std
        linear.weight.copy_(linear.weight.double() * gain[:, None])
        linear.bias.copy_(goal_mean + gain * (linear.bias.double() - mean))
    return model


def unit_statistics(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Any], run: Run, goals: Goals | None = None
) -> Goals:
    """Mean and standard deviation of the layers' units over all batches; `goals`: each batch passes on at these."""
    sums: dict[str, list[Any]] = {layer: [0, 0.0, 0.0] for layer in layers}

    def see(layer: str, output: Tensor) -> Tensor | None:
        values = output.double().flatten(0, -2)
        for slot, value in enumerate((len(values), values.sum(0), values.square().sum(0))):
            sums[layer][slot] = sums[layer][slot] + value
        if goals is None:
            return None
        mean, std = _moments(len(values), values.sum(0), values.square().sum(0))
        return ((output - mean) / std * goals[layer][1] + goals[layer][0]).to(output.dtype)

    with watch_outputs(model, layers, see):
        for batch in batches:
            run(model, batch)
    return {layer: _moments(*totals) for layer, totals in sums.items()}


def _moments(count: int, total: Vector, squares: Vector) -> tuple[Vector, Vector]:
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0).add(SMALL).sqrt()


def _linear(model: nn.Module, layer: str) -> nn.Linear:
    module = model.get_submodule(layer)
    if not isinstance(module, nn.Linear) or module.bias is None:
        raise ValueError(f"layers: {layer} is not a linear layer with a bias, which REPAIR writes to")
    return module
