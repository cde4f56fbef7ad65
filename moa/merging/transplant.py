"""A text model's update on the language model inside a VLM of its family: one LoRA, or a whole model's difference.

    model.layers.3.mlp.up_proj   ->   model.language_model.layers.3.mlp.up_proj        (`language` of a family's row)

Nothing else of the VLM changes: not its vision tower, not its projector, nor the rows of its embeddings that the text
model does not have. A task vector is W_vlm + weight (W_model - W_text), as Ilharco et al. 2023 add one.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from moa.backbones.families import FAMILIES
from moa.backbones.fingerprint import base_fingerprint, computing
from moa.backbones.opening import open_decoder
from moa.backbones.shapes import layer_shapes
from moa.files.checkpoint_files import BaseFiles, local_base, match_parameters, match_sites, read_base
from moa.files.peft_config import read_json_object
from moa.files.spelling import match_spelling
from moa.files.targets import finds
from moa.merging.adapters import Expert, expert_from_folder, rename_sites
from moa.merging.align.carry import SiteMaps, activation_maps, frame_maps
from moa.merging.checkpoints.full import COMPUTE, differences, finite, mapped, updated
from moa.merging.core import Factors
from moa.merging.export import export as exports
from moa.merging.export import folder as export_folder
from moa.merging.merge import merge
from moa.merging.report.console import report_lines
from moa.merging.run import prepare_verify
from moa.merging.settings import TransplantConfig
from moa.merging.source import Source

EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")  # a row for each token
HEAD = "lm_head"


def transplant(settings: TransplantConfig, console: Console) -> None:
    """All of scripts.transplant. ValueError for parts that do not fit, before anything is written."""
    if settings.vlm is None or settings.out is None:
        raise ValueError(f"{'vlm' if settings.vlm is None else 'out'}: names no folder")
    if (settings.adapter is None) == (settings.model is None):
        raise ValueError("adapter, model: give one of the two")
    vlm = read_base(local_base(settings.vlm, "vlm"), "vlm")
    kind = vlm.config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"vlm: {vlm.folder} is a {kind}; choices: {', '.join(FAMILIES)}")
    language = FAMILIES[kind].language
    if settings.adapter is None:
        transplant_model(settings, vlm, language, console)
    else:
        transplant_adapter(settings, vlm, language, console)


def place_of(name: str, language: str) -> str:
    """Where a text model's layer or weight is in the VLM, as that spells it in memory."""
    if name.startswith(f"{language}."):
        return name
    plain = name.removeprefix("model.")
    return plain if plain.partition(".")[0] == HEAD else f"{language}.{plain}"


def chosen(names: Sequence[str], drop: Sequence[str]) -> list[str]:
    """Without those that a `drop` finds; ValueError for one that finds none, or where none is left."""
    for pattern in drop:
        if not any(finds(pattern, name, "drop") for name in names):
            raise ValueError(f"drop: {pattern!r} is in none of {names[0]} and {len(names) - 1} others")
    found = [name for name in names if not any(finds(pattern, name, "drop") for pattern in drop)]
    if not found:
        raise ValueError("drop: leaves nothing")
    return found


def transplant_adapter(settings: TransplantConfig, vlm: BaseFiles, language: str, console: Console) -> None:
    """A PEFT folder of the VLM, verified as every export."""
    folder = Path(str(settings.adapter))
    expert = fit_adapter(expert_from_folder(folder), vlm.folder, language, settings)
    named = settings.text or str(expert.config.get("base_model_name_or_path") or "")
    text = local_base(named, "text") if settings.text or Path(named).is_dir() else None
    console.print(*compare_bases(text, vlm, settings), sep="\n", soft_wrap=True)
    errors: dict[str, float] = {}
    if settings.carry:
        expert, errors = carried(expert, text, vlm, language, settings)
        worst = max(errors, key=lambda site: errors[site])
        known = f"mean error {mean(errors.values()):.3f}, worst {errors[worst]:.3f} at {worst}"
        console.print(f"carried by {settings.carry}: {known}", soft_wrap=True)
    fingerprint = base_fingerprint(vlm.folder)
    expert = replace(expert, base_fingerprint=fingerprint)
    source = Source(experts=[expert], folders=[folder], base_name=str(vlm.folder), base_fingerprint=fingerprint)
    merged = merge([expert], weights={expert.name: settings.weight})
    verify = prepare_verify(source, settings)
    about = {"weight": settings.weight, "adapter": str(folder), "language": language, "dropped": settings.drop}
    about |= {"carry": settings.carry, "errors": errors} if errors else {}
    card = {"base": str(vlm.folder), "fingerprint": fingerprint, "about": "A text LoRA on the language model of a VLM."}
    out = str(settings.out)
    export_folder.check_out(out, [folder, vlm.folder])
    options: dict[str, Any] = {"dtype": settings.dtype, "verify": verify, "report": {"transplant": about}, "card": card}
    report = exports.export_adapter(out, merged, [expert], base=str(vlm.folder), **options)
    console.print(
        f"{len(merged)} layers, all in {language}", *report_lines(report, Path(out)), sep="\n", soft_wrap=True
    )


def fit_adapter(expert: Expert, vlm: Path, language: str, settings: TransplantConfig) -> Expert:
    """The expert with its sites as the VLM spells them; ValueError for one that is not there, or of another shape that
    is not carried."""
    names = {site: place_of(site, language) for site in chosen([*expert.ranks], settings.drop)}
    layers = layer_shapes(str(vlm)) or {}
    for site, place in names.items():
        if layers.get(place) != expert.shapes[site] and not (settings.carry and place in layers):
            there = f"is {list(layers[place])} there" if place in layers else "is not there"
            raise ValueError(
                f"adapter: {site} is [out, in] {list(expert.shapes[site])}, and {place} {there}; the language model of "
                f"{vlm} must be of the same family and size, and drop=[...] leaves layers out"
            )
    ranks, shapes = {site: expert.ranks[site] for site in names}, {site: expert.shapes[site] for site in names}
    plain = replace(expert, ranks=ranks, shapes=shapes, config={**expert.config, "task_type": None})
    return rename_sites(plain, names)


def carried(
    expert: Expert, text: Path | None, vlm: BaseFiles, language: str, settings: TransplantConfig
) -> tuple[Expert, dict[str, float]]:
    """The expert for another base of its family, and the error of each site; ValueError where it is too large."""
    if text is None:
        raise ValueError("text: names no folder; carry compares the base that the adapter was trained on with the VLM")
    if outside := [site for site in expert.ranks if not site.startswith(f"{language}.")]:
        raise ValueError(f"carry: {outside[0]} is outside of the language model; drop=[...] leaves it out")
    factors, errors = dict[str, Factors](), dict[str, float]()
    for site, maps in maps_by_site(expert, text, vlm, language, settings):
        factors[site], errors[site] = maps.carry(expert.read(site))
    if (error := mean(errors.values())) > settings.max_error:
        rule = f"max_error={settings.max_error:g}: the two bases have too little in common"
        raise ValueError(f"carry: the mean error of the layers' maps is {error:.3f}, above {rule}")
    shapes = {site: (len(b), a.shape[1]) for site, (a, b) in factors.items()}
    return replace(expert, shapes=shapes, read=factors.__getitem__), errors


def maps_by_site(
    expert: Expert, text: Path, vlm: BaseFiles, language: str, settings: TransplantConfig
) -> Iterator[tuple[str, SiteMaps]]:
    layers = layer_shapes(str(vlm.folder)) or {}
    if settings.texts is not None:
        shapes = {site.removeprefix(f"{language}."): layers[site] for site in expert.ranks}
        decoders = open_decoder(str(text)), open_decoder(str(vlm.folder))
        for name, maps in activation_maps(*decoders, shapes, token_rows(text, Path(settings.texts))):
            yield f"{language}.{name}", maps
        return
    source = read_base(text, "text")
    keys = match_sites(expert.shapes, source)
    targets = match_sites({site: layers[site] for site in expert.ranks}, vlm)
    for site, key in keys.items():
        yield site, frame_maps(mapped(source, key), mapped(vlm, targets[site]))


def token_rows(folder: Path, file: Path) -> list[Tensor]:
    """The ids of each line of a file, by a base's tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"text: {folder} has no tokenizer.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = [tokenizer.encode(line).ids for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(rows) < 2:
        raise ValueError(f"texts: {file} has {len(rows)} lines; give at least two, better hundreds")
    return [torch.tensor([row]) for row in rows if row]


def transplant_model(settings: TransplantConfig, vlm: BaseFiles, language: str, console: Console) -> None:
    """The VLM's checkpoint with the difference of two text models added to its language model."""
    if settings.text is None:
        raise ValueError("text: names no folder; a whole model needs the base that it was trained from")
    model, text = (read_base(local_base(str(getattr(settings, key)), key), key) for key in ("model", "text"))
    lines = compare_bases(text.folder, vlm, settings)
    places, resized = match_model(model, text, vlm, language, settings.drop)
    lines += [f"resized: {line}" for line in resized]
    console.print(*lines, sep="\n", soft_wrap=True)
    out, cast = str(settings.out), None if settings.dtype == "auto" else export_folder.DTYPES[settings.dtype]
    export_folder.check_out(out, [model.folder, text.folder, vlm.folder])

    def update(key: str) -> Tensor:
        return settings.weight * difference(model, text, places[key], vlm.shapes[key])

    results = partial(updated, vlm, changed=places, update=update, cast=cast)
    report = {"weight": settings.weight, "model": str(model.folder), "text": str(text.folder)}
    report |= {"language": language, "moved": len(places), "resized": resized, "dropped": settings.drop}
    manifest = {key: {"from": places.get(key), "rule": "added" if key in places else "the VLM's"} for key in vlm.files}
    about = f"{model.folder.name} less {text.folder.name}, added to the language model."
    card = {"about": about, "rows": [(model.folder.name, f"{settings.weight:.4g}", str(model.folder))]}
    size: dict[str, Any] = {"cast": cast, "max_shard_gb": settings.max_shard_gb}
    export_folder.write_checkpoint(out, vlm, results, report, manifest, card, **size)
    kept = len(vlm.files) - len(places)
    console.print(
        f"{len(places)} tensors of {language} changed, {kept} are the VLM's own; checkpoint: {out}", soft_wrap=True
    )


def match_model(
    model: BaseFiles, text: BaseFiles, vlm: BaseFiles, language: str, drop: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Key of the VLM -> the text models', and a line for each matrix whose rows of tokens differ in number.

    ValueError for a weight that one of the three lacks, or has in another shape.
    """
    names = chosen([key for key, dtype in model.dtypes.items() if dtype.is_floating_point], drop)
    if lacking := [name for name in names if name not in text.files]:
        others = f" (and {len(lacking) - 1} others)" if lacking[1:] else ""
        raise ValueError(f"text: {text.folder} lacks {lacking[0]}{others} of the model; drop=[...] leaves it out")
    places = {place_of(name, language): name for name in names}
    spelled, resized = match_spelling(places, vlm.files), []
    shapes: dict[str, tuple[int, ...]] = {}
    for place, name in places.items():
        parts = {"model": model.shapes[name], "text": text.shapes[name], "vlm": vlm.shapes.get(spelled.get(place, ""))}
        rows = {part: shape[0] for part, shape in parts.items() if shape}
        shapes[place] = model.shapes[name]
        by_token = name.endswith(EMBEDDINGS) and place in spelled
        if text.shapes[name][by_token:] != model.shapes[name][by_token:]:
            raise ValueError(f"text: {name} is {list(text.shapes[name])}, and {list(model.shapes[name])} in the model")
        if by_token and len(set(rows.values())) > 1:
            counts = ", ".join(f"{count} rows in the {part}" for part, count in rows.items())
            resized.append(f"{place}: {counts}; the first {min(rows.values())} are added")
            shapes[place] = (rows["vlm"], *model.shapes[name][1:])
        if place.startswith(HEAD) and place not in spelled:
            raise ValueError(
                f"vlm: {vlm.folder} has no {place}: it ties its output to its embeddings; drop=[{HEAD}] leaves it out"
            )
    found = match_parameters(shapes, vlm)
    return {found[place]: name for place, name in places.items()}, resized


def difference(model: BaseFiles, text: BaseFiles, key: str, shape: Sequence[int]) -> Tensor:
    """W_model - W_text as a matrix of the VLM's shape, vectors as one row; rows of tokens that one lacks are zero."""
    one, other = (mapped(files, key) for files in (model, text))
    rows = min(len(one), len(other), shape[0])
    found, own = torch.zeros(torch.Size(shape), dtype=COMPUTE), finite(one[:rows].to(COMPUTE), "model", model, key)
    found[:rows] = own - finite(other[:rows].to(COMPUTE), "text", text, key)
    return found.view(shape[0] if len(shape) > 1 else 1, -1)


def compare_bases(text: Path | None, vlm: BaseFiles, settings: TransplantConfig) -> list[str]:
    """Lines on vocabulary and config; ValueError where tokens or what is computed differ, unless `other_base`."""
    if text is None:
        return ["not compared: the text base is not here, so its vocabulary and config are unknown; give text=FOLDER"]
    own = computing(read_json_object(text / "config.json"))
    theirs = computing(vlm.config.get("text_config") or vlm.config)
    odd = [row for row in differences(own, theirs) if not re.search(r"vocab_size|token_id|model_type|tie_word", row[0])]
    lines, (moved, lacking, common) = [], compare_vocabularies(vocabulary(text), vocabulary(vlm.folder))
    if odd:
        key, wanted, found = odd[0]
        lines.append(f"text: config.json has {key}={wanted!r}, and the VLM's language model {found!r}")
    if moved:
        token, before, after = moved[0]
        lines.append(f"text: token {token!r} has id {before}, and {after} in the VLM (and {len(moved) - 1} others)")
    wrong = lines[-1:] if moved else [] if settings.carry else lines
    if wrong and not settings.other_base:
        raise ValueError(f"{wrong[0]}; other_base=true moves the update all the same")
    if common:
        lines.append(
            f"vocabulary: {common} tokens have the same id in both; {lacking} of the text model's are not in the VLM"
        )
    else:
        lines.append("vocabulary: not compared, as one of the two has no tokenizer.json")
    return lines


def vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id of a folder's tokenizer.json; empty without one."""
    if not (folder / "tokenizer.json").is_file():
        return {}
    record = read_json_object(folder / "tokenizer.json")
    listed = record.get("model", {}).get("vocab", {})
    pairs = listed if isinstance(listed, Mapping) else {row[0]: place for place, row in enumerate(listed)}
    return {**pairs, **{row["content"]: row["id"] for row in record.get("added_tokens", [])}}


def compare_vocabularies(
    text: Mapping[str, int], vlm: Mapping[str, int]
) -> tuple[list[tuple[str, int, int]], int, int]:
    """Tokens of both with another id, the number that only the text model has, and of those that are the same."""
    if not text or not vlm:
        return [], 0, 0
    counts = Counter("lacking" if t not in vlm else "same" if vlm[t] == i else "moved" for t, i in text.items())
    moved = [(token, own, vlm[token]) for token, own in text.items() if vlm.get(token, own) != own]
    return moved, counts["lacking"], counts["same"]
