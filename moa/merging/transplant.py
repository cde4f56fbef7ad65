"""A text model's update on the language model inside a VLM of its family: one LoRA, or a whole model's difference.

    model.layers.3.mlp.up_proj   ->   model.language_model.layers.3.mlp.up_proj        (`language` of a family's row)

Nothing else of the VLM changes: not its vision tower, not its projector, nor the rows of tokens that the text model
does not have; rows go to the same token, whatever its id. A task vector is W_vlm + weight (W_model - W_text), as
Ilharco et al. 2023 add one.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from moa.backbones.vocabulary import read_spellings
from moa.files.checkpoint_files import BaseFiles, local_base, match_parameters, match_sites, read_base
from moa.files.peft_config import read_json_object
from moa.files.spelling import match_spelling
from moa.files.targets import finds
from moa.merging.adapters import Expert, expert_from_folder, rename_sites
from moa.merging.align.carry import Seen, SiteMaps, activation_maps, frame_maps, token_maps
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
    if outside := [site for site in expert.ranks if not site.startswith(f"{language}.") and site != HEAD]:
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
    layers, source = layer_shapes(str(vlm.folder)) or {}, read_base(text, "text")
    shapes = {site: layers[site] for site in expert.ranks if site != HEAD}
    if settings.texts is not None and shapes:
        decoders = open_decoder(str(text)), open_decoder(str(vlm.folder))
        named = {site.removeprefix(f"{language}."): shape for site, shape in shapes.items()}
        for name, maps in activation_maps(*decoders, named, aligned_texts(text, vlm.folder, Path(settings.texts))):
            yield f"{language}.{name}", maps
    frames = [] if settings.texts is not None else [*shapes]
    sites = [*frames, *(site for site in expert.ranks if site == HEAD)]
    keys = match_sites({site: expert.shapes[site] for site in sites}, source)
    targets = match_sites({site: layers[site] for site in sites}, vlm)
    for site in sites:
        weights = mapped(source, keys[site]), mapped(vlm, targets[site])
        yield site, frame_maps(*weights) if site != HEAD else token_maps(*weights, shared_rows(text, vlm, *weights))


def shared_rows(text: Path, vlm: BaseFiles, own: Tensor, theirs: Tensor) -> Tensor:
    """[token, 2]: rows of the tokens that both vocabularies spell, and of what is no token in either."""
    words, others = read_spellings(text), read_spellings(vlm.folder)
    words, others = (words, others) if words and others else ({}, {})
    named = {*words.values(), *others.values()}
    pairs = [(number, others[word]) for word, number in words.items() if word in others]
    pairs += [(number, number) for number in range(min(len(own), len(theirs))) if number not in named]
    rows = torch.tensor(sorted(pairs), dtype=torch.long).view(-1, 2)
    return rows[(rows[:, 0] < len(own)) & (rows[:, 1] < len(theirs))]


def aligned_texts(text: Path, vlm: Path, file: Path) -> list[tuple[Seen, Seen]]:
    """Each line of a file in the tokens of both, and where a token of each ends at the same letter."""
    for key, folder in (("text", text), ("vlm", vlm)):
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{key}: {folder} has no tokenizer.json")
    tokenizers = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (text, vlm)]
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < 2:
        raise ValueError(f"texts: {file} has {len(lines)} lines; give at least two, better hundreds")
    found = []
    for line in lines:
        encoded = [tokenizer.encode(line) for tokenizer in tokenizers]
        ends = [{stop: place for place, (_, stop) in enumerate(one.offsets)} for one in encoded]
        common = sorted(ends[0].keys() & ends[1].keys())
        own, theirs = (
            (torch.tensor([one.ids]), [end[c] for c in common]) for one, end in zip(encoded, ends, strict=True)
        )
        found.append((own, theirs))
    return found


def transplant_model(settings: TransplantConfig, vlm: BaseFiles, language: str, console: Console) -> None:
    """The VLM's checkpoint with the difference of two text models added to its language model."""
    if settings.text is None:
        raise ValueError("text: names no folder; a whole model needs the base that it was trained from")
    model, text = (read_base(local_base(str(getattr(settings, key)), key), key) for key in ("model", "text"))
    lines = compare_bases(text.folder, vlm, settings)
    places, resized = match_model(model, text, vlm, language, settings.drop)
    lines += [f"resized: {line}" for line in resized]
    tokens = maps_of_tokens(places, (model, text, vlm), settings)
    lines += [
        f"{key}: rows of {int(maps.outputs._nnz())} tokens, error {error:.3f}" for key, (maps, error) in tokens.items()
    ]
    console.print(*lines, sep="\n", soft_wrap=True)
    out, cast = str(settings.out), None if settings.dtype == "auto" else export_folder.DTYPES[settings.dtype]
    export_folder.check_out(out, [model.folder, text.folder, vlm.folder])

    def update(key: str) -> Tensor:
        found = difference(model, text, places[key])
        return settings.weight * (moved_rows(tokens[key][0], found) if key in tokens else found)

    results = partial(updated, vlm, changed=places, update=update, cast=cast)
    report = {"weight": settings.weight, "model": str(model.folder), "text": str(text.folder)}
    report |= {"language": language, "moved": len(places), "resized": resized, "dropped": settings.drop}
    report |= {"errors": {key: error for key, (_, error) in tokens.items()}}
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
            resized.append(f"{place}: {counts}")
        if by_token:  # rows and width may differ
            shapes[place] = vlm.shapes[spelled[place]] if of_tokens(names) else (rows["vlm"], *model.shapes[name][1:])
        if place.startswith(HEAD) and place not in spelled:
            raise ValueError(
                f"vlm: {vlm.folder} has no {place}: it ties its output to its embeddings; drop=[{HEAD}] leaves it out"
            )
    found = match_parameters(shapes, vlm)
    return {found[place]: name for place, name in places.items()}, resized


def of_tokens(names: Iterable[str]) -> bool:
    """Whether all weights have a row for each token: these may move between bases that nothing else moves between."""
    return all(name.endswith(EMBEDDINGS) for name in names)


def difference(model: BaseFiles, text: BaseFiles, key: str) -> Tensor:
    """W_model - W_text of the rows that both have; vectors as one row."""
    one, other = (mapped(files, key) for files in (model, text))
    rows = min(len(one), len(other))
    found = finite(one[:rows].to(COMPUTE), "model", model, key) - finite(other[:rows].to(COMPUTE), "text", text, key)
    return found.flatten(1) if found.dim() > 1 else found[None]


def moved_rows(maps: SiteMaps, update: Tensor) -> Tensor:
    """Each token's row at its place in the VLM, zeros elsewhere."""
    return (maps.outputs @ update.double()).to(update) @ maps.inputs.T.to(update)


def maps_of_tokens(
    places: Mapping[str, str], files: tuple[BaseFiles, BaseFiles, BaseFiles], settings: TransplantConfig
) -> dict[str, tuple[SiteMaps, float]]:
    """Key of the VLM -> maps and error of each matrix with a row for each token.

    Rows keep their frame where the two bases agree. Alone, without layers, which have a place in their own base alone,
    they are turned to the VLM's. ValueError where rows go elsewhere and the error is too large.
    """
    model, text, vlm = files
    found, alone = dict[str, tuple[SiteMaps, float]](), of_tokens(places.values())
    for key, name in places.items():
        if not name.endswith(EMBEDDINGS):
            continue
        update = difference(model, text, name)
        own, theirs = mapped(text, name)[: len(update)], mapped(vlm, key)
        shared = shared_rows(text.folder, vlm, own, theirs)
        maps = token_maps(own, theirs, shared, turn=own.shape[1] != theirs.shape[1])
        if alone and maps.error > settings.max_error:
            maps = token_maps(own, theirs, shared)
        moved = moved_rows(maps, update)
        error = maps.with_lost(float(moved.square().sum()), float(update.square().sum()))
        if error > settings.max_error and (alone or bool((shared[:, 0] != shared[:, 1]).any())):
            rule = "" if alone else "; drop=[layers, norm] moves the rows of tokens alone, into the VLM's frame"
            raise ValueError(
                f"text: {name} has an error of {error:.3f}, above max_error={settings.max_error:g}: the two "
                f"vocabularies or bases have too little in common{rule}"
            )
        found[key] = maps, error
    return found


def compare_bases(text: Path | None, vlm: BaseFiles, settings: TransplantConfig) -> list[str]:
    """Lines on vocabulary and config; ValueError where tokens or what is computed differ, unless `other_base`."""
    if text is None:
        return ["not compared: the text base is not here, so its vocabulary and config are unknown; give text=FOLDER"]
    own = computing(read_json_object(text / "config.json"))
    theirs = computing(vlm.config.get("text_config") or vlm.config)
    odd = [row for row in differences(own, theirs) if not re.search(r"vocab_size|token_id|model_type|tie_word", row[0])]
    lines, words, others = list[str](), read_spellings(text), read_spellings(vlm.folder)
    moved = [(word, number, others[word]) for word, number in words.items() if others.get(word, number) != number]
    if odd:
        key, wanted, found = odd[0]
        lines.append(f"text: config.json has {key}={wanted!r}, and the VLM's language model {found!r}")
    if moved:
        token, before, after = moved[0][0].decode(errors="replace"), *moved[0][1:]
        lines.append(f"text: token {token!r} has id {before}, and {after} in the VLM (and {len(moved) - 1} others)")
    wrong = [] if settings.carry else lines[: bool(odd)] if settings.model else lines[-1:]
    if wrong and not settings.other_base:
        raise ValueError(f"{wrong[0]}; other_base=true moves the update all the same")
    if words and others:
        both = len(words.keys() & others.keys())
        rest = f"{len(words) - both} of the text model's are not in the VLM"
        lines.append(f"vocabulary: {both} tokens are in both, {both - len(moved)} with the same id; {rest}")
    else:
        lines.append("vocabulary: not compared, as one of the two has no tokenizer.json")
    return lines
