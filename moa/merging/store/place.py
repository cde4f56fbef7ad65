"""Where experts are stored: a folder, or a repository of the hub, which is read through the hub's cache.

STORE/names/caption                                  its versions, one a line, the current one last
STORE/objects/3f2a9c0d51be7a44/caption/              a PEFT folder that never changes
    adapter_config.json, adapter_model.safetensors   the expert
    stats.safetensors, anchors.safetensors           of its inputs and its samples, where these were measured
    README.md, card.json                             what is known of it
    manifest.json                                    every file with its sha256; the version is its digest
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moa.checkpoint import MANIFEST, check_there, manifest_of, read_json, sha256, verify
from moa.cli.command import note
from moa.files.atomic import atomic_folder, locked, write_file, write_json

HUB, NAMES, OBJECTS, RECORD = "hf:", "names", "objects", "card.json"
NAME, VERSION = r"[A-Za-z_]\w*", r"[0-9a-f]{16}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """card.json: what is known of an expert; what was not measured is null or empty."""

    name: str
    digest: str  # of its factors and their scaling
    base: str | None
    base_fingerprint: str | None
    rank: int  # the largest
    num_sites: int
    tasks: list[str]  # of the data that it was trained on
    data: list[dict[str, Any]]
    license: dict[str, Any]  # as the publisher gives it, else the base's own
    statistics: int | None  # samples whose inputs stats.safetensors sums up
    anchors: list[str]  # kinds of evidence in anchors.safetensors
    scores: list[dict[str, Any]]  # of the expert alone
    mixes: list[dict[str, Any]]  # with each expert of its base that the store had
    beside: list[str]  # what its run trained too, which the store does not have


@dataclass(frozen=True, kw_only=True)
class Place:
    """An open store: `folder` is it, or what is here of the `repository`."""

    folder: Path
    repository: str | None = None

    @property
    def versions(self) -> dict[str, list[str]]:
        """By name, the current one last."""
        files = (file for file in sorted((self.folder / NAMES).glob("*")) if re.fullmatch(NAME, file.name))
        return {file.name: re.findall(rf"^{VERSION}$", file.read_text(), re.M) for file in files}

    def get(self, term: str | None) -> tuple[Entry, Path]:
        """Record and PEFT folder of NAME or NAME@VERSION; ValueError for an unknown one, and for a torn file."""
        name, _, wanted = (term or "").partition("@")
        known = self.versions.get(name, [])
        found = [version for version in known if version.startswith(wanted)] if wanted else known[-1:]
        if len(found) != 1:
            choices = [f"{name}@{version}" for version in known] or [*self.versions]
            raise ValueError(f"{term or 'name'}: names no expert; choices: {', '.join(choices) or 'none yet'}")
        target, here = f"{OBJECTS}/{found[0]}/{name}", self.folder
        if self.repository is not None:
            here = snapshot(self.repository, [f"{target}/*", f"{NAMES}/*"])
        folder = here / target
        check_there(folder / MANIFEST)
        if version_of(folder) != found[0]:
            raise ValueError(f"{folder / MANIFEST}: is not that of version {found[0]}, it was changed")
        verify(folder)
        return read_entry(folder), folder

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Version and record of each name's current version; a note for one that is not readable."""
        for name, known in self.versions.items():
            for version in known[-1:]:
                try:
                    yield version, read_entry(self.folder / OBJECTS / version / name)
                except ValueError as error:
                    note(f"warning: {error}")

    def writing(self) -> AbstractContextManager[None]:
        """One writer after the other, each with what all before it stored; the hub refuses a second one itself."""
        return locked(self.folder) if self.repository is None else nullcontext()

    def put(self, name: str, built: Path) -> str:
        """Store a folder as the current version of a name, whole or not at all, while `writing`; the version."""
        write_json(built / MANIFEST, manifest_of(built, later=()))
        version = version_of(built)
        lines = "".join(f"{line}\n" for line in (*(v for v in self.versions.get(name, []) if v != version), version))
        target = f"{OBJECTS}/{version}/{name}"
        if self.repository is None:
            with atomic_folder(self.folder / target) as folder:
                shutil.copytree(built, folder, dirs_exist_ok=True)
            write_file(self.folder / NAMES / name, lines)
            return version
        from huggingface_hub import CommitOperationAdd, HfApi

        adds = [CommitOperationAdd(f"{target}/{file.name}", str(file)) for file in sorted(built.iterdir())]
        adds.append(CommitOperationAdd(f"{NAMES}/{name}", lines.encode()))
        # refused by the hub where somebody has published since the names were read
        parent = self.folder.name
        HfApi().create_commit(self.repository, adds, commit_message=f"{name} {version}", parent_commit=parent)
        return version


def open_place(store: str, *, create: bool = False) -> Place:
    """ValueError where nothing is there, unless it is to be made."""
    if not store.startswith(HUB):
        if not create and not (Path(store) / NAMES).is_dir():
            raise ValueError(f"store: {store} has no folder {NAMES}; publish makes a store, {HUB}ORG/NAME is the hub's")
        return Place(folder=Path(store))
    repository = store.removeprefix(HUB)
    if create:
        from huggingface_hub import HfApi

        HfApi().create_repo(repository, exist_ok=True)
    return Place(folder=snapshot(repository, [f"{NAMES}/*", f"{OBJECTS}/*/{RECORD}"]), repository=repository)


def snapshot(repository: str, patterns: list[str]) -> Path:
    """The files of the hub's repository that match, in the cache; ValueError where they are neither there nor here."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except OSError as error:
        raise ValueError(f"store: {HUB}{repository} cannot be read: {' '.join(str(error).split())}") from None


def version_of(folder: Path) -> str:
    return sha256(folder / MANIFEST)[:16]


def read_entry(folder: Path) -> Entry:
    """ValueError naming the file where it is no record, or of another version of this module."""
    found = read_json(folder / RECORD)
    if found.keys() != {field.name for field in fields(Entry)}:
        raise ValueError(f"{folder / RECORD}: is not what this version of the project writes")
    return Entry(**found)
