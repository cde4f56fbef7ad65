"""Partitions: every sample once, no image on two sides of a split, and the mix that a recipe names."""

from collections import Counter

import pytest
from PIL import Image

from data.sample import OcrWord, Sample
from moa.federated.partition import HOW, Client, PartitionConfig, Tag, make_clients, print_partition, tag_of

TASKS = ("caption", "grounding", "ocr_vqa", "vqa")


def tags(images: int = 60, tasks=TASKS) -> list[Tag]:
    """Every task asks about every image, vqa twice; two of three have OCR words."""
    asked = [(task, image) for task in tasks for image in range(images) for _ in range(1 + (task == "vqa"))]
    return [
        Tag(
            source=f"my_{task}",
            index=index,
            image=f"image {image}",
            task=task,
            label=f"label {image % 5}",
            style=("line", "paint")[image % 2],
            expert=task,
            modalities=frozenset({"image", *(["ocr"] if image % 3 else [])}),
        )
        for index, (task, image) in enumerate(asked)
    ]


def recipe(how: str = "even", **more) -> PartitionConfig:
    alpha = {"alpha": 0.5} if how.startswith("dirichlet") else {}
    return PartitionConfig(**{"clients": 8, "how": how, **alpha, **more})


def rows(clients: list[Client], part: str = "both") -> list[Tag]:
    return [r.tag for c in clients for r in ((*c.train, *c.test) if part == "both" else getattr(c, part))]


@pytest.mark.parametrize("how", HOW)
def test_every_sample_is_at_one_client_and_each_client_has_some(how):
    clients = make_clients(tags(), recipe(how, test=0.25), seed=1)
    place = lambda tag: (tag.source, tag.index)  # noqa: E731
    assert sorted(map(place, rows(clients))) == sorted(map(place, tags()))
    assert all(client.train for client in clients) and len(clients) == 8


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("seed", range(3))
def test_no_image_is_on_both_sides_of_a_split(how, seed):
    clients = make_clients(tags(), recipe(how, test=0.25, held_out=2, clients=10), seed=seed)
    train, test = ({tag.image for tag in rows(clients, part)} for part in ("train", "test"))
    assert not train & test and len(test) == 15
    sides = [{t.image for t in rows([c for c in clients if c.held_out == held])} for held in (False, True)]
    assert not sides[0] & sides[1] and len(sides[1]) == 12
    assert [client.held_out for client in clients] == [False] * 8 + [True] * 2


@pytest.mark.parametrize("how", HOW)
def test_the_same_seed_deals_the_same_in_any_order_of_samples(how):
    one, other = make_clients(tags(), recipe(how), 3), make_clients(tags()[::-1], recipe(how), 3)
    assert one == other
    assert one != make_clients(tags(), recipe(how), 4)


@pytest.mark.parametrize("how", ["dirichlet_tasks", "dirichlet_sizes", "dirichlet_labels", "even"])
def test_questions_of_one_image_and_task_stay_together(how):
    clients = make_clients(tags(), recipe(how), seed=0)
    owners = {(tag.task, tag.image, client.name) for client in clients for tag in rows([client])}
    assert len(owners) == len({owner[:2] for owner in owners})


def test_by_task_and_by_style_give_one_each():
    for how, field in (("by_task", "task"), ("by_style", "style")):
        clients = make_clients(tags(), recipe(how), seed=0)
        own = [{getattr(tag, field) for tag in rows([client])} for client in clients]
        assert all(len(values) == 1 for values in own) and len(set().union(*own)) == len(
            own[0] | own[1] | own[2] | own[3]
        )


@pytest.mark.slow
def test_a_small_alpha_is_uneven_and_a_large_one_is_even():
    def largest(how: str, alpha: float):
        clients = make_clients(tags(100), PartitionConfig(clients=5, how=how, alpha=alpha), seed=0)
        if how == "dirichlet_tasks":
            mixes = [Counter(tag.task for tag in rows([client])) for client in clients]
            return max(max(mix.values()) / mix.total() for mix in mixes)
        return max(len(client.train) for client in clients) / 500

    for how, evenly in (("dirichlet_tasks", 0.4), ("dirichlet_sizes", 0.2), ("dirichlet_labels", 0.2)):
        assert largest(how, 1e4) == pytest.approx(evenly, abs=0.03)
        assert largest(how, 0.1) > evenly + 0.08


def test_zipf_sizes():
    clients = make_clients(tags(300), recipe("even", clients=4, zipf=1.0), seed=0)
    sizes = [len(client.train) for client in clients]
    assert sizes == pytest.approx([1500 / k / (1 + 1 / 2 + 1 / 3 + 1 / 4) for k in (1, 2, 3, 4)], abs=6)


@pytest.mark.parametrize("how", ["even", "by_task", "dirichlet_tasks"])
def test_ocr_is_at_a_share_of_the_clients_alone(how):
    clients = make_clients(tags(), recipe(how, ocr_share=0.25), seed=0, experts=TASKS)
    with_words = {c.name for c in clients for row in c.train if "ocr" in row.tag.modalities - row.hidden}
    with_task = {c.name for c in clients for row in c.train if row.tag.task == "ocr_vqa"}
    assert len(with_words) == 2 and with_task <= with_words
    assert len(rows(clients)) == len(tags())


def test_missing_modalities_by_sample():
    clients = make_clients(tags(200), recipe(missing=0.3), seed=0)
    hidden = Counter(m for client in clients for row in client.train for m in row.hidden)
    assert hidden["image"] / 1000 == pytest.approx(0.3, abs=0.05)
    assert hidden["ocr"] / (1000 * 2 / 3) == pytest.approx(0.3, abs=0.06)
    assert all(row.hidden <= row.tag.modalities for client in clients for row in client.train)


def test_missing_modalities_by_client_leave_one_of_each_sample():
    clients = make_clients(tags(), recipe(missing_at_client=0.6, clients=12), seed=0)
    both = [row for client in clients for row in client.train if len(row.tag.modalities) == 2]
    assert all(len(row.hidden) < 2 for row in both)
    # a modality is absent from all of a client's samples, or from those alone that keep the other
    kinds = [{row.hidden for row in client.train if len(row.tag.modalities) == 2} for client in clients]
    assert {len(kind) for kind in kinds} == {1, 2}


def test_a_client_without_a_modality_leaves_each_sample_one_that_it_has():
    for more in ({}, {"ocr_share": 0.5}, {"modalities": ["ocr"]}):
        clients = make_clients(tags(), recipe(missing_at_client=0.6, clients=12, **more), seed=0)
        assert all(row.tag.modalities - row.hidden for client in clients for row in client.train)
        assert any(row.hidden for client in clients for row in client.train)


def test_single_modalities():
    clients = make_clients(tags(), recipe(single=3), seed=0)
    for place, client in enumerate(clients):
        want = frozenset({"ocr"} if place < 3 else {"image"})
        assert all(row.hidden == want & row.tag.modalities for row in client.train)


def test_a_minimum_is_filled_from_the_client_with_most():
    clients = make_clients(tags(), recipe("dirichlet_sizes", alpha=0.05, min_samples=12), seed=0)
    assert min(len(client.train) for client in clients) >= 12 and len(rows(clients)) == len(tags())


@pytest.mark.parametrize(
    ("more", "experts", "said"),
    [
        ({"min_samples": 100}, (), r"client-\d: \d+ training samples, must be 100 or more \(how=even, 8 clients\)"),
        ({}, (*TASKS, "counting"), r"experts \['counting'\] have no owner"),
        ({"how": "by_task", "clients": 3}, (), "by_task needs a training client for each of .*, got 3"),
        ({"how": "by_task", "clients": 5, "held_out": 2}, (), "needs a training client .* got 3"),
    ],
)
def test_a_client_without_data_and_an_expert_without_an_owner_are_named(more, experts, said):
    with pytest.raises(ValueError, match=said):
        make_clients(tags(), recipe(**more), seed=0, experts=experts)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"how": "random"}, "how: must be one of"),
        ({"alpha": 1.0}, "alpha: is of dirichlet_tasks"),
        ({"held_out": 8}, "held_out: must be less than clients=8"),
        ({"single": 9}, "single: must be at most clients=8"),
        ({"missing": 0.1, "single": 2}, "missing: hides modalities, and so does single"),
    ],
)
def test_a_wrong_recipe_is_named(more, said):
    with pytest.raises(ValueError, match=said):
        recipe(**more)


def test_the_table_counts_by_client_and_task():
    clients = make_clients(tags(), recipe("by_task", clients=6, held_out=2, test=0.5, ocr_share=0.5), seed=0)
    lines = print_partition(clients, len(tags())).splitlines()
    assert lines[0].split() == ["client", *TASKS, "train", "test", "ocr", "hidden"]
    assert lines[1].split()[:2] == ["client-0", str(len(clients[0].train))] and "held out" in lines[6]
    unused = len(tags()) - len(rows(clients))
    assert lines[-1].startswith(f"{unused} of 300 samples are at no client") and unused > 0


def test_samples_without_an_image_are_split_one_by_one():
    texts = [Tag(source="text", index=index, image="", task="vqa") for index in range(40)]
    clients = make_clients(texts, recipe(test=0.25), seed=0)
    assert len(rows(clients, "test")) == 10 and len(rows(clients, "train")) == 30


def test_the_tag_of_a_sample():
    word = OcrWord(text="stop", box=(0, 0, 1, 1), confidence=1.0)
    fields = {"id": "7", "question": "?", "task": "vqa", "source": "s", "tags": ("line", "x"), "expert": "ocr"}
    sample = Sample(**fields, image_id="i", image=Image.new("RGB", (2, 2)), answers=("red", "blue"), ocr=(word,))
    tag = tag_of(sample, "my_vqa", 3)
    assert (tag.source, tag.index, tag.image, tag.label, tag.style) == ("my_vqa", 3, "i", "red", "line")
    assert tag.modalities == {"image", "ocr"} and tag.expert == "ocr"
    text = tag_of(Sample(**fields, image_id="i", image=None, answers=(), ocr=()), "my_vqa", 3)
    assert not text.modalities and not text.image and not text.label


def test_clients_on_machines_of_their_own_have_all_that_is_there():
    clients = make_clients(tags(), recipe("own", test=0.25), seed=1)
    assert [client.name for client in clients] == [f"client-{place}" for place in range(8)]
    assert all(len(rows([client])) == len(tags()) and rows([client], "test") for client in clients)
    with pytest.raises(ValueError, match="zipf: has no effect with how=own"):
        recipe("own", zipf=1.0)
