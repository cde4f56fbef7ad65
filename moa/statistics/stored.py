"""stats.safetensors beside an expert: the moments of its inputs by site, and the digest of the expert they belong to.

`<site>.vectors` [in, direction], `.values` [direction], `.mean` [in], `.rest`, `.tokens` [1], as moments.py has them.
An expert that changed since, or another one, is refused by its digest; so the file needs no line in a manifest.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moa.files.atomic import atomic_file
from moa.files.peft import STATISTICS_FILE, ExpertHeader, all_finite, digest, read_header, read_site, sort_metadata
from moa.statistics.moments import Moments

FORMAT, VERSION = "moa-input-statistics", "1"
PARTS = ("vectors", "values", "mean", "rest", "tokens")


def write_statistics(
    expert: str | Path, moments: Mapping[str, Moments], num_samples: int, answer_share: float | None = None
) -> Path:
    """Write the file beside the expert's weights, whole or not at all; ValueError for sites that the expert lacks.
    `answer_share` is how tokens were weighed, see `moa.statistics.gather`."""
    header = read_header(expert)
    if moments.keys() != header.ranks.keys():
        odd = sorted(moments.keys() ^ header.ranks.keys())
        raise ValueError(f"{expert}: statistics must be of the expert's own sites; {odd[0]} is not in both")
    tensors: dict[str, Tensor] = {}
    for site, own in moments.items():
        parts = (own.vectors, own.values, own.mean, torch.tensor([own.rest]), torch.tensor([own.tokens]))
        tensors |= {f"{site}.{name}": part for name, part in zip(PARTS, parts, strict=True)}
    ready = {key: (t.float() if t.is_floating_point() else t).contiguous() for key, t in sorted(tensors.items())}
    if broken := [key for key, tensor in ready.items() if not all_finite(tensor)]:
        raise ValueError(f"{expert}: {broken[0]} of its inputs is not finite; nothing was written")
    metadata = {FORMAT: VERSION, "expert": _digest(header), "num_samples": str(num_samples)}
    metadata["answer_share"] = "null" if answer_share is None else str(answer_share)
    target = header.path / STATISTICS_FILE
    with atomic_file(target) as temporary:
        save_file(ready, temporary, metadata=metadata)
        sort_metadata(temporary)
    return target


def read_statistics(expert: str | Path, way_out: str) -> Callable[[str], Moments]:
    """The moments by site, each read when asked for; ValueError, with the `way_out`, for a missing or unfit file."""
    header = read_header(expert)
    file = header.path / STATISTICS_FILE
    if not file.is_file():
        raise ValueError(f"{file}: missing; {way_out}")
    try:
        with safe_open(file, framework="pt") as handle:
            keys, metadata = set(handle.keys()), handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not readable as safetensors ({error}); {way_out}") from None
    wanted = {f"{site}.{part}" for site in header.ranks for part in PARTS}
    if metadata.get(FORMAT) != VERSION or keys != wanted:
        raise ValueError(f"{file}: no statistics of this expert's sites, or of another version; {way_out}")
    if metadata.get("expert") != _digest(header):
        raise ValueError(f"{file}: belongs to other weights than {header.weights_file.name} beside it; {way_out}")

    def read(site: str) -> Moments:
        with safe_open(file, framework="pt") as handle:
            vectors, values, mean, rest, tokens = (handle.get_tensor(f"{site}.{part}") for part in PARTS)
        width = header.shapes[site][1]
        fits = vectors.shape == (width, len(values)) and mean.shape == (width,) and len(rest) == len(tokens) == 1
        finite = all(map(all_finite, (vectors, values, mean, rest)))
        if not (fits and finite) or (values < 0).any() or float(rest) < 0:
            raise ValueError(f"{file}: {site} holds no moments of {width} inputs; {way_out}")
        tensors = {"vectors": vectors.double(), "values": values.double(), "mean": mean.double()}
        return Moments(**tensors, rest=float(rest), tokens=int(tokens))

    return read


def share_of(expert: str | Path) -> str | None:
    """The `answer_share` of the file beside an expert as text; None where it is not recorded."""
    with safe_open(Path(expert) / STATISTICS_FILE, framework="pt") as handle:
        return (handle.metadata() or {}).get("answer_share")


def _digest(header: ExpertHeader) -> str:
    return digest(header.config, header.ranks, lambda site: read_site(header, site).values())
