"""What a store has: a table of its experts, and all that is known of one."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from moa.card import CARD, hub_name, local_fingerprint
from moa.merging.settings import StoreConfig
from moa.merging.store.place import open_place


def find(settings: StoreConfig, console: Console) -> None:
    table = Table("name", "version", "tasks", "rank", "base", "statistics", "scores alone", "license")
    wanted = settings.base and local_fingerprint(settings.base)
    for version, entry in open_place(settings.store).entries():
        words = " ".join([entry.name, *entry.tasks, *(str(row["name"]) for row in entry.data)])
        same = entry.base_fingerprint == wanted if wanted else entry.base == settings.base
        if (settings.text or "").lower() not in words.lower() or (settings.base and not same):
            continue
        scores = ", ".join(f"{row['data']} {100 * row['value']:.0f}" for row in entry.scores)
        about = [", ".join(entry.tasks), entry.rank, Path(hub_name(entry.base or "")).name, entry.statistics, scores]
        cells = [entry.name, version[:8], *about, entry.license.get("license")]
        table.add_row(*(str(cell or "-") for cell in cells))
    console.print(table if table.rows else "no expert is so")


def show(settings: StoreConfig, console: Console) -> None:
    place = open_place(settings.store)
    entry, folder = place.get(settings.name)
    console.print((folder / CARD).read_text(), soft_wrap=True, highlight=False, markup=False)
    console.print(f"versions: {', '.join(place.versions[entry.name])}\nfolder: {folder}", soft_wrap=True)
