"""Samples dealt to clients, from one seed: which tasks, how many, and which modalities each client has.

A recipe is a matrix of shares [key, client] (a key is a task, a label or a style), and who has which modality. The unit
that is dealt is all samples of one image and key. An image is on one side of each split: training or test, and training
clients or held-out ones. Two training clients may have questions of different tasks about the same image.

    how                shares
    even               every client the same share of every task
    by_task, by_style  each client one task (Pilot, FedDPA, FedLEASE), one style (MoAFCL); in turn, in order of names
    by_source          each client one data set
    dirichlet_tasks    each client's mix of tasks is drawn from Dirichlet(alpha)
    dirichlet_sources  each client's mix of data sets is
    dirichlet_sizes    each task's sizes over clients are (FCIT)
    dirichlet_labels   each label's sizes over clients are (FedMLLM)
    own                nothing is dealt: every client is on a machine with data of its own, which is all data here
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data.sample import Sample
from moa.cli.ranges import Count, CountOrZero, NotNegative, Positive, ShareAboveZero, ShareBelowOne, Size, check

Shares = np.ndarray  # [key, client]
OWN = "own"


@dataclass(frozen=True, kw_only=True)
class Tag:
    """What a partition reads of a sample."""

    source: str
    index: int  # in its source
    image: str  # the id of the image; "" for none
    task: str
    label: str = ""
    style: str = ""
    expert: str | None = None
    modalities: frozenset[str] = frozenset()  # that the sample has: image, ocr

    @property
    def unit(self) -> str:
        """What all samples of one image have in common; a sample without an image is by itself."""
        return f"image {self.image}" if self.image else f"{self.source} {self.index}"


def tag_of(sample: Sample, source: str, index: int) -> Tag:
    """The label is the first answer, the style the first of the sample's tags."""
    has = {"image": sample.image is not None, "ocr": bool(sample.ocr)}
    return Tag(
        source=source,
        index=index,
        image=sample.image_id if sample.image is not None else "",
        task=sample.task,
        label=next(iter(sample.answers), ""),
        style=next(iter(sample.tags), ""),
        expert=sample.expert,
        modalities=frozenset(modality for modality, present in has.items() if present),
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sample at a client, and the modalities that the client does not see of it."""

    tag: Tag
    hidden: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Client:
    name: str
    train: tuple[Row, ...]
    test: tuple[Row, ...] = ()
    held_out: bool = False  # never trains; for evaluation on an unseen client


@dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """How samples are dealt; at most one of `missing`, `missing_at_client` and `single` is given."""

    clients: Size = 10  # called client-0, client-1, ...
    # even, by_source, by_task, by_style, dirichlet_sources, dirichlet_tasks, dirichlet_sizes, dirichlet_labels or own
    how: str = "by_source"
    alpha: Positive | None = None  # of a Dirichlet distribution: small is uneven
    zipf: NotNegative = 0.0  # client k has a share of 1 / k^zipf
    min_samples: Count = 1  # training samples that each client has at least
    test: ShareBelowOne = 0.0  # share of the images that nobody trains on
    held_out: CountOrZero = 0  # of the clients, the last ones: they never train
    # of the clients have OCR words, and the samples of ocr_tasks; null: all of them
    ocr_share: ShareAboveZero | None = None
    ocr_tasks: list[str] = field(default_factory=lambda: ["ocr_vqa"])
    # which the three below hide
    modalities: list[str] = field(default_factory=lambda: ["image", "ocr"])
    missing: ShareBelowOne = 0.0  # chance that a modality of a sample is hidden
    missing_at_client: ShareBelowOne = 0.0  # chance that a modality of a client is
    single: CountOrZero | None = None  # so many clients see the first modality alone, the others all but the first

    def __post_init__(self) -> None:
        check(self.how in (*HOW, OWN), "how", f"must be one of {[*HOW, OWN]}, got {self.how!r}")
        for key in ("zipf", "held_out", "ocr_share", "single") if self.how == OWN else ():
            check(not getattr(self, key), key, f"has no effect with how={OWN}")
        rule = f"is of dirichlet_tasks, _sources, _sizes and _labels, got {self.alpha} for how={self.how}"
        check((self.alpha is not None) == self.how.startswith("dirichlet"), "alpha", rule)
        rule = f"must be less than clients={self.clients}, got {self.held_out}"
        check(self.held_out < self.clients, "held_out", rule)
        fits = self.single is None or self.single <= self.clients
        check(fits, "single", f"must be at most clients={self.clients}, got {self.single}")
        given = [key for key in ("missing", "missing_at_client") if getattr(self, key)]
        given += ["single"] if self.single is not None else []
        check(
            len(given) < 2, "".join(given[:1]), f"hides modalities, and so does {''.join(given[1:2])}; give one of them"
        )


def even(keys: int, recipe: PartitionConfig, rng: np.random.Generator) -> Shares:
    return np.ones((keys, recipe.clients))


def in_turn(keys: int, recipe: PartitionConfig, rng: np.random.Generator) -> Shares:
    clients = np.arange(recipe.clients)
    return (clients % keys == np.arange(keys)[:, None]).astype(float)


def mixes(keys: int, recipe: PartitionConfig, rng: np.random.Generator) -> Shares:
    return rng.dirichlet(np.full(keys, recipe.alpha), recipe.clients).T


def sizes(keys: int, recipe: PartitionConfig, rng: np.random.Generator) -> Shares:
    return rng.dirichlet(np.full(recipe.clients, recipe.alpha), keys)


# How -> the field of a tag that is the key, and the shares of each key.
HOW: dict[str, tuple[str, Callable[[int, PartitionConfig, np.random.Generator], Shares]]] = {
    "even": ("task", even),
    "by_task": ("task", in_turn),
    "by_style": ("style", in_turn),
    "by_source": ("source", in_turn),
    "dirichlet_tasks": ("task", mixes),
    "dirichlet_sources": ("source", mixes),
    "dirichlet_sizes": ("task", sizes),
    "dirichlet_labels": ("label", sizes),
}


def make_clients(
    tags: Iterable[Tag], recipe: PartitionConfig, seed: int, experts: Collection[str] = ()
) -> list[Client]:
    """Every sample at one client, or none where no client of its side has its key; ValueError for who lacks samples."""
    tags = sorted(tags, key=lambda tag: (tag.source, tag.index))
    rng = np.random.default_rng([seed, recipe.clients])
    if recipe.how == OWN:
        test = chosen(sorted({tag.unit for tag in tags}), recipe.test, rng)
        one = _client(0, [tags], recipe, test, True, rng)
        found = [replace(one, name=client_name(place, recipe)) for place in range(recipe.clients)]
        check_owners(found, recipe, experts)
        return found
    kind, shares_of = HOW[recipe.how]
    # OCR samples are dealt by themselves: not every client may have them.
    units: dict[tuple[str, bool], dict[str, list[Tag]]] = defaultdict(lambda: defaultdict(list))
    for tag in tags:
        needs_ocr = recipe.ocr_share is not None and tag.task in recipe.ocr_tasks
        units[getattr(tag, kind), needs_ocr][tag.unit].append(tag)
    keys = sorted({key for key, _ in units})
    training = recipe.clients - recipe.held_out
    if recipe.how.startswith("by_") and training < len(keys):
        raise ValueError(f"clients: {recipe.how} needs a training client for each of {keys}, got {training}")
    shares = shares_of(len(keys), recipe, rng) / np.arange(1, recipe.clients + 1) ** float(recipe.zipf)
    wanted = {key for key, needs_ocr in units if needs_ocr}
    has_ocr = ocr_clients(shares, [key in wanted for key in keys], recipe, rng)
    images = sorted({image for own in units.values() for image in own})
    held = chosen(images, recipe.held_out / recipe.clients, rng)
    test = chosen(images, recipe.test, rng)
    dealt: list[list[list[Tag]]] = [[] for _ in range(recipe.clients)]
    for (key, needs_ocr), own in sorted(units.items()):
        row = shares[keys.index(key)] * (has_ocr if needs_ocr else 1)
        for side, clients in ((False, slice(0, training)), (True, slice(training, None))):
            groups = [own[image] for image in own if (image in held) == side]
            allowed = (has_ocr if needs_ocr else np.ones(recipe.clients))[clients]
            own_row = row[clients]
            if not own_row.any() and not recipe.how.startswith("by_"):
                own_row = allowed  # a share that is 0 to rounding
            for client, group in zip(spread(len(groups), own_row, rng), groups, strict=True):
                if client is not None:
                    dealt[client + (clients.start or 0)].append(group)
    if not recipe.how.startswith("by_"):
        fill(dealt[:training], recipe, test, has_ocr)
    found = [_client(place, own, recipe, test, bool(has_ocr[place]), rng) for place, own in enumerate(dealt)]
    check_owners(found, recipe, experts)
    return found


def ocr_clients(
    shares: Shares, wanted: Sequence[bool], recipe: PartitionConfig, rng: np.random.Generator
) -> np.ndarray:
    """1 where a client has OCR, else 0: those with most of the keys that are `wanted`, the others at random."""
    if recipe.ocr_share is None:
        return np.ones(recipe.clients)
    rows = [place for place, key in enumerate(wanted) if key]
    own, has = shares[rows].sum(0) + 1e-9 * rng.random(recipe.clients), np.zeros(recipe.clients)
    count = max(1, round(recipe.ocr_share * recipe.clients))
    has[np.argsort(-own, kind="stable")[:count]] = 1
    return has


def chosen(images: Sequence[str], share: float | int, rng: np.random.Generator) -> frozenset[str]:
    order = rng.permutation(len(images))
    return frozenset(images[place] for place in order[: round(share * len(images))])


def spread(count: int, row: np.ndarray, rng: np.random.Generator) -> list[int | None]:
    """A client for each of `count` groups, in the shares of a row to within one; None where the row is 0."""
    if not row.any():
        return [None] * count
    wanted = count * row / row.sum()
    whole = np.floor(wanted).astype(int)
    # by the largest remainders, equal ones at random
    left = np.argsort(-(wanted - whole) + 1e-9 * rng.random(len(row)), kind="stable")[: count - whole.sum()]
    whole[left] += 1
    return [int(client) for client in rng.permutation(np.repeat(np.arange(len(row)), whole))]


def fill(dealt: Sequence[list[list[Tag]]], recipe: PartitionConfig, test: Collection[str], has_ocr: np.ndarray) -> None:
    """Give clients with less than `min_samples` groups of the client that has most, which keeps as many itself."""
    size = [sum(len(group) for group in own if group[0].unit not in test) for own in dealt]

    def movable(group: Sequence[Tag], rich: int, poor: int) -> bool:
        spare = group[0].unit not in test and size[rich] - len(group) >= recipe.min_samples
        return spare and (bool(has_ocr[poor]) or group[0].task not in recipe.ocr_tasks)

    for poor in range(len(dealt)):
        while size[poor] < recipe.min_samples:
            rich = max(range(len(dealt)), key=lambda client: (size[client], -client))
            places = reversed(range(len(dealt[rich])))
            place = next((p for p in places if rich != poor and movable(dealt[rich][p], rich, poor)), None)
            if place is None:
                return
            group = dealt[rich].pop(place)
            dealt[poor].append(group)
            size[rich], size[poor] = size[rich] - len(group), size[poor] + len(group)


def _client(
    place: int,
    groups: Sequence[Sequence[Tag]],
    recipe: PartitionConfig,
    test: Collection[str],
    has_ocr: bool,
    rng: np.random.Generator,
) -> Client:
    absent = [m for m in recipe.modalities if rng.random() < recipe.missing_at_client]
    if recipe.single is not None:
        absent = [m for m in recipe.modalities if (m == recipe.modalities[0]) == (place >= recipe.single)]
    rows = []
    without_ocr: set[str] = set() if has_ocr else {"ocr"}
    for tag in sorted((tag for group in groups for tag in group), key=lambda tag: (tag.source, tag.index)):
        hidden = {m for m in recipe.modalities if rng.random() < recipe.missing} | set(absent) | without_ocr
        there = sorted(tag.modalities & set(recipe.modalities) - without_ocr)
        if recipe.missing_at_client and there and hidden >= tag.modalities:
            hidden -= {there[int(rng.integers(len(there)))]}
        rows.append(Row(tag=tag, hidden=frozenset(hidden & tag.modalities)))
    return Client(
        name=client_name(place, recipe),
        train=tuple(row for row in rows if row.tag.unit not in test),
        test=tuple(row for row in rows if row.tag.unit in test),
        held_out=place >= recipe.clients - recipe.held_out,
    )


def client_name(place: int, recipe: PartitionConfig) -> str:
    return f"client-{place:0{len(str(recipe.clients - 1))}}"


def check_owners(clients: Sequence[Client], recipe: PartitionConfig, experts: Collection[str]) -> None:
    """ValueError for a client with too few samples, and an expert that no training client has samples of."""
    for client in clients:
        if len(client.train) < recipe.min_samples:
            rule = f"{len(client.train)} training samples, must be {recipe.min_samples} or more"
            raise ValueError(f"{client.name}: {rule} (how={recipe.how}, {recipe.clients} clients)")
    owned = {row.tag.expert for client in clients if not client.held_out for row in client.train}
    if lost := sorted(set(experts) - owned):
        raise ValueError(f"experts {lost} have no owner: no training client has samples of them (how={recipe.how})")


def print_partition(clients: Sequence[Client], total: int | None = None) -> str:
    """A line a client: its samples by task, for test, with OCR, hidden; and how many of `total` are at no client."""
    tasks = sorted({row.tag.task for client in clients for row in (*client.train, *client.test)})
    width = max(8, *(len(task) + 1 for task in tasks))
    lines = [f"{'client':<18}" + "".join(f"{name:>{width}}" for name in (*tasks, "train", "test", "ocr")) + "  hidden"]
    for client in clients:
        by_task = Counter(row.tag.task for row in client.train)
        ocr = sum("ocr" in row.tag.modalities - row.hidden for row in client.train)
        hidden = Counter(modality for row in client.train for modality in sorted(row.hidden))
        numbers = (*(by_task[task] for task in tasks), len(client.train), len(client.test), ocr)
        name = f"{client.name}{' held out' if client.held_out else ''}"
        hides = ", ".join(f"{modality} {count}" for modality, count in sorted(hidden.items())) or "-"
        lines.append(f"{name:<18}" + "".join(f"{number:>{width}}" for number in numbers) + f"  {hides}")
    used = sum(len(client.train) + len(client.test) for client in clients)
    if total is not None and total > used:
        lines.append(f"{total - used} of {total} samples are at no client: none on the image's side has their key")
    return "\n".join(lines)
