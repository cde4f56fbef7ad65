"""Every format, from files as their authors publish them to samples, and what a broken row says."""

import pickle
import tarfile
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from data.checks import BadSampleError
from data.config import SourceConfig
from data.readers.names import readers
from data.readers.record import RecordDataset
from data.readers.table import FORMATS, format_called, open_records
from data.sample import Sample
from tests.support.formats import CASES, SIZE, dump, dump_lines, edit, write_image

PATHS = ("path", "images", "annotations", "ocr")


@pytest.fixture(autouse=True)
def no_caches(tmp_path, monkeypatch):
    """Nothing is written outside the test's folder."""
    monkeypatch.setenv("MOA_CACHE", str(tmp_path / "index"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")


def opened(name: str, folder: Path, **changes) -> RecordDataset:
    config = {**CASES[name].config, **changes} if name in CASES else changes
    paths = {key: str(folder / config[key]) for key in PATHS if config.get(key)}
    return open_records(SourceConfig(name="mine", format=name, **config | paths), "one")


def written(name: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    CASES[name].write(folder)
    return folder


def error_of(dataset: RecordDataset, index: int) -> BadSampleError:
    with pytest.raises(BadSampleError) as error:
        dataset[index]
    return error.value


def test_every_format_of_the_config_has_a_reader_and_a_case():
    assert {*readers()} == {*CASES}
    assert all(format_called(name) is FORMATS[name] for name in readers())


@pytest.mark.parametrize("name", CASES)
def test_a_published_file_becomes_samples(name, tmp_path):
    case, dataset = CASES[name], opened(name, written(name, tmp_path / "data"))
    assert len(dataset) == case.count
    samples = [dataset[index] for index in range(len(dataset))]
    assert samples[0].image is not None and samples[0].image.size == SIZE
    empty = {"expert": "one", "source": "mine", "split": None, "boxes": (), "ocr": None,
             "instruction": "", "system": "", "turns": (), "tags": (), "choices": (),
             "more_images": (), "box_image": 0}  # fmt: skip
    names = [field.name for field in fields(Sample) if field.name != "image"]
    assert {name: getattr(samples[0], name) for name in names} == empty | case.first
    assert len({sample.id for sample in samples}) == case.count
    with pytest.raises(IndexError):
        dataset[case.count]


@pytest.mark.parametrize("name", CASES)
def test_a_broken_row_is_named_with_its_file_and_leaves_its_neighbours(name, tmp_path):
    case, folder = CASES[name], written(name, tmp_path / "data")
    case.broken(folder)
    error = error_of(opened(name, folder), case.at)
    assert all(words in str(error) for words in case.complaint), str(error)
    assert str(error).startswith(str(folder))


@pytest.mark.parametrize("name", ["vqav2", "gqa", "llava", "karpathy", "visual_genome", "refcoco"])
def test_the_samples_before_a_broken_row_can_be_read(name, tmp_path):
    folder = written(name, tmp_path / "data")
    if name != "refcoco":
        CASES[name].broken(folder)
    assert opened(name, folder)[0].id == CASES[name].first["id"]


@pytest.mark.parametrize("name", CASES)
def test_a_missing_file_is_named_with_its_source_and_format(name, tmp_path):
    folder = written(name, tmp_path / "data")
    with pytest.raises(ValueError, match="data.sources.mine") as error:
        opened(name, folder, path="nowhere/nothing.json")
    assert "nowhere" in str(error.value)


def test_a_key_that_a_format_lacks_or_does_not_use_is_named(tmp_path):
    folder = written("vqav2", tmp_path / "data")
    with pytest.raises(ValueError, match=r"mine\.images: format vqav2 needs it: path, images, anno"):
        opened("vqav2", folder, images=None)
    with pytest.raises(ValueError, match=r"mine\.ocr: has no effect with format=vqav2"):
        opened("vqav2", folder, ocr="annotations.json")
    with pytest.raises(ValueError, match=r"mine\.images: no such folder"):
        opened("vqav2", folder, images="elsewhere")
    with pytest.raises(ValueError, match=r"mine\.prompt: {questoin} in .* is not {question}"):
        opened("vqav2", folder, prompt="{questoin}?")


def test_a_test_split_has_no_answers(tmp_path):
    folder = written("vqav2", tmp_path / "vqa")
    assert opened("vqav2", folder, annotations=None)[0].answers == ()
    folder = written("aokvqa", tmp_path / "aokvqa")
    edit("val.json", lambda v: [v[0].pop(k) for k in ("direct_answers", "correct_choice_idx")])(folder)
    assert opened("aokvqa", folder)[0].answers == opened("aokvqa_choice", folder)[0].answers == ()


def test_text_alone_is_a_sample_without_a_image(tmp_path):
    mixed = opened("llava", written("llava", tmp_path / "llava"))[1]
    assert mixed.image is None and (mixed.question, mixed.answers) == ("Where?", ("In Paris.",))
    science = opened("scienceqa", written("scienceqa", tmp_path / "science"))[1]
    assert science.image is None and science.tags[0] == "text"


def test_lengths_are_told_without_opening_a_image(tmp_path):
    folder = written("llava", tmp_path / "data")
    (folder / "images/coco/train2017/000000033471.jpg").unlink()
    dataset = opened("llava", folder)
    assert dataset.lengths(0) == (1, len("What is it?A café.Where?In Paris."))
    assert dataset.lengths(1) == (0, len("Where?In Paris."))


def test_prompt_and_instruction_come_from_the_source_where_it_names_them(tmp_path):
    folder = written("textvqa", tmp_path / "data")
    brief = "Answer the question using a single word or phrase."
    sample = opened("textvqa", folder, prompt="Look: {question}", instruction=brief)[0]
    assert sample.question.startswith("Look: what is the brand") and sample.instruction == brief


def test_a_sources_task_overrides_the_rows_own(tmp_path):
    assert opened("jsonl", written("jsonl", tmp_path / "own"), task="count")[0].task == "count"
    assert opened("gqa", written("gqa", tmp_path / "gqa"), task="yes_no")[0].task == "yes_no"


def test_captions_are_one_sample_a_image_or_one_a_caption(tmp_path):
    folder = written("coco_captions", tmp_path / "coco")
    each = opened("coco_captions", folder, one_per="caption")
    assert [(s.id, s.image_id, s.answers) for s in map(each.__getitem__, range(3))] == [
        ("48", "522418", ("A woman cutting a cake.",)),
        ("770337", "391895", ("A man on a moped. ",)),
        ("771687", "391895", ("A bike on a dirt road.",)),
    ]
    folder = written("karpathy", tmp_path / "karpathy")
    whole = opened("karpathy", folder, split="test", one_per="image")
    assert len(whole) == 1 and whole[0].answers == ("A man 10.", "A man 11.")
    folder = written("flickr30k", tmp_path / "flickr")
    each = opened("flickr30k", folder, one_per="caption")
    assert (len(each), each[1].id, each[2].answers) == (
        3, "1000092795#1", ("A dog runs across the grass .",)
    )  # fmt: skip


def test_flickrs_token_file_holds_what_kaggles_table_does(tmp_path):
    folder = written("flickr30k", tmp_path / "data")
    lines = ["1000092795.jpg#0\tTwo young guys .", "1000092795.jpg#1\tTwo | men .", "bad"]
    (folder / "ok.token").write_text("\n".join(lines[:2]))
    assert opened("flickr30k", folder, path="ok.token")[0].answers == (
        "Two young guys .", "Two | men ."
    )  # fmt: skip
    (folder / "bad.token").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"bad\.token:3: neither IMAGE"):
        opened("flickr30k", folder, path="bad.token")


def test_karpathys_file_for_flickr_has_neither_folder_nor_number(tmp_path):
    row = {"sentids": [0], "imgid": 0, "split": "test", "filename": "1007129816.jpg",
           "sentences": [{"tokens": ["a"], "raw": "A man .", "imgid": 0, "sentid": 0}]}  # fmt: skip
    dump(tmp_path / "dataset_flickr30k.json", {"images": [row], "dataset": "flickr30k"})
    write_image(tmp_path / "images/1007129816.jpg")
    sample = opened("karpathy", tmp_path, path="dataset_flickr30k.json", images="images",
                    split="test", one_per="image")[0]  # fmt: skip
    assert (sample.id, sample.answers) == ("1007129816", ("A man .",))


@pytest.mark.parametrize(
    ("name", "split", "choices"),
    [
        ("karpathy", "train+val", "'val'; it has {'test': 1, 'restval': 1, 'train': 1}"),
        ("refcoco", "testB", "'testB'; it has {'train': 1, 'testA': 1}"),
        ("scienceqa", "dev", "'dev'; it has ['train', 'test', 'minitest']"),
        ("ocrvqa", "dev", "'dev'; choices: train, val, test"),
    ],
)
def test_an_unknown_split_is_named_with_the_choices(name, split, choices, tmp_path):
    with pytest.raises(ValueError) as error:
        opened(name, written(name, tmp_path / "data"), split=split)
    assert f"no split {choices}" in str(error.value)


class Malicious:
    """What an attacker would put into a pickle: a call of any function, here one that leaves a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_names_code_is_refused_and_nothing_runs(tmp_path, protocol):
    folder, trace = written("refcoco", tmp_path / "data"), tmp_path / "trace"
    content = pickle.dumps([Malicious(trace)], protocol=protocol)
    (folder / "refs(unc).p").write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: not a pickle of plain containers: names"):
        opened("refcoco", folder)
    assert not trace.exists()
    pickle.loads(content)
    assert trace.exists()  # it is dangerous indeed


def test_a_pickle_that_is_cut_short_is_named(tmp_path):
    folder = written("refcoco", tmp_path / "data")
    (folder / "refs(unc).p").write_bytes((folder / "refs(unc).p").read_bytes()[:90])
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: not a pickle of plain containers"):
        opened("refcoco", folder)


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/secret.jpg", "a/../../secret.jpg", "a\0b"])
def test_a_image_outside_its_folder_is_never_opened(tmp_path, name):
    write_image(tmp_path / "secret.jpg")
    (tmp_path / "images").mkdir()
    dump_lines(tmp_path / "x.jsonl", [{"image": name, "question": "q", "task": "vqa"}])
    error = error_of(opened("jsonl", tmp_path, path="x.jsonl", images="images"), 0)
    assert error.rule == "image outside folder" and "x.jsonl:1" in str(error)


def test_a_image_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    folder = written("jsonl", tmp_path / "data")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    error = error_of(opened("jsonl", folder), 0)
    assert error.rule == "image too large" and "rows.jsonl:1" in str(error)


@pytest.mark.parametrize(
    ("turns", "complaint"),
    [
        ([("human", "<image>a"), ("human", "b")], "has two questions in a row"),
        ([("human", "<image>a"), ("gpt", "b"), ("gpt", "c")], "has two answers in a row"),
        ([("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "<image>d")], "has <image> in an answer"),
        ([("human", "<image>a"), ("gpt", "b"), ("human", "c")], "ends with a question"),
        ([("human", "<image><image>a"), ("gpt", "b")], "has 2 times <image> for 1 images"),
        ([("human", "<image>where? <bbox>"), ("gpt", "b")], "has <bbox>"),
        ([("gpt", "<image>b")], "has no question"),
    ],
)
def test_a_conversation_of_another_shape_is_named_with_what_is_wrong(turns, complaint, tmp_path):
    folder = written("llava", tmp_path / "data")
    messages = [{"from": role, "value": value} for role, value in turns]
    edit("mix.json", lambda v: v[0].update(conversations=messages))(folder)
    error = error_of(opened("llava", folder), 0)
    assert "mix.json: [0]: unreadable row" in str(error) and complaint in str(error)


def test_messages_are_read_from_parquet_and_from_a_list_too(tmp_path):
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = written("messages", tmp_path / "data")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()][:1]
    expected = opened("messages", folder)[0]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    dump(folder / "train.json", rows)
    for file in ("train.parquet", "train.json"):
        found = opened("messages", folder, path=file)[0]
        assert (found.question, found.answers, found.system) == (
            expected.question, expected.answers, expected.system
        )  # fmt: skip


def test_a_table_names_columns_that_it_lacks(tmp_path):
    folder = written("table", tmp_path / "data")
    with pytest.raises(ValueError, match="no column 'qury'; it has picture, query, labels, number"):
        opened("table", folder, columns={"question": "qury"})
    with pytest.raises(ValueError, match=r"columns\.queston: no such field; choices: id, image_id"):
        opened("table", folder, columns={"queston": "query"})


def test_open_clips_table_of_images_and_titles_is_read(tmp_path):
    (tmp_path / "pairs.tsv").write_text("filepath\ttitle\na/1.jpg\ta cat\n")
    write_image(tmp_path / "images/a/1.jpg")
    columns = {"image": "filepath", "answers": "title"}
    sample = opened("table", tmp_path, path="pairs.tsv", images="images", columns=columns,
                    task="caption", prompt="Say what it is.")[0]  # fmt: skip
    assert (sample.image_id, sample.answers, sample.task) == ("a/1.jpg", ("a cat",), "caption")


def test_class_labels_of_a_saved_table_become_their_names(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])})
    table = datasets.Dataset.from_dict({"text": ["?", "!"], "label": [1, 0]}, features=features)
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    columns = {"question": "text", "answers": "label"}
    dataset = opened("table", tmp_path, path="saved", split="train", columns=columns)
    assert [dataset[0].answers, dataset[1].answers] == [("dog",), ("cat",)]
    with pytest.raises(ValueError, match="no split 'val'; it has train"):
        opened("table", tmp_path, path="saved", split="val", columns=columns)


def test_a_clone_of_a_hub_data_set_is_read_by_its_splits(tmp_path):
    folder = written("table", tmp_path / "clone/data")
    (folder / "rows.parquet").rename(folder / "train-00000-of-00001.parquet")
    dataset = opened("table", tmp_path, **CASES["table"].config | {"path": "clone"}, split="train")
    assert [dataset[0].question, dataset[1].answers] == ["what?", ("c",)]
    with pytest.raises(ValueError, match="clone: no split 'val'; it has train"):
        opened("table", tmp_path, path="clone", split="val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data\.sources\.mine: .*empty: no data set"):
        opened("table", tmp_path, path="empty", split="train")


def test_a_hub_name_says_so_where_there_is_no_network(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    source = SourceConfig(name="mine", format="table", path="nobody/nothing", split="train")
    with pytest.raises(ValueError, match="neither a file or folder here, nor a data set that can"):
        open_records(source, None)


def test_a_broken_file_that_a_row_leads_to_is_named_beside_the_row(tmp_path):
    folder = written("docvqa", tmp_path / "data")
    (folder / "ocr_results/pybv0228_81.json").write_text('{"recognitionResults": [')
    message = str(error_of(opened("docvqa", folder), 0))
    assert "val_v1.0.json: data[0]: unreadable row" in message
    assert "ocr_results/pybv0228_81.json: not JSON" in message


def test_a_shard_that_is_missing_or_compressed_is_named(tmp_path):
    folder = written("webdataset", tmp_path / "data")
    with pytest.raises(ValueError, match=r"00002\.tar"):
        opened("webdataset", folder, path="{00000..00002}.tar")
    assert len(opened("webdataset", folder, path="*.tar")) == 3
    with tarfile.open(folder / "00001.tar", "w:gz") as archive:
        archive.add(folder / "00000.tar", "a.jpg")
    with pytest.raises(ValueError, match=r"00001\.tar: not a tar file without compression"):
        opened("webdataset", folder)
    with tarfile.open(folder / "00001.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ValueError, match=r"00001\.tar: holds a\.jpg twice"):
        opened("webdataset", folder)


def all_formats(folder: Path, toy: dict) -> dict:
    """The toy world's config with every format as a training source and as a test."""
    sources = {}
    for name, case in CASES.items():
        written(name, folder / name)
        paths = {key: str(folder / name / value) for key, value in case.config.items() if key in PATHS}
        sources[name] = {**case.config, **paths, "format": name, "expert": "vqa"}
    sources["image_folder"]["prompt"] = "what is this?"
    tasks = ["vqa", "ocr_vqa", "caption", "grounding", "classification"]
    toy["data"] = {"sources": sources, "tasks": tasks}
    toy["eval"] = {"sources": sources, "batch_size": 8}
    toy["train"]["batch_size"] = 64
    toy["stages"] = {"joint": {"steps": 1}}
    return toy


@pytest.mark.slow
def test_every_format_trains_a_step_and_is_scored(tmp_path):
    import yaml

    from moa.config import load_config
    from moa.evaluation.settings import with_eval
    from moa.evaluation.sources import score_sources
    from moa.training.setup import make_accelerator, open_run
    from tests.support.toy import toy_world
    from train import train

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(all_formats(tmp_path, toy_world(tmp_path))))
    config = load_config(tmp_path / "run.yaml")
    run, state = open_run(config, make_accelerator(config))
    drawn = {run.mixture.locate(position)[0] for position in range(64)}
    assert len(drawn) > 20
    train(run, state)
    assert run.step == 1
    results = score_sources(run.model, with_eval(config, max_new_tokens=4))
    assert {result.name for result in results} == {*CASES}
    assert not any(result.skipped for result in results)
