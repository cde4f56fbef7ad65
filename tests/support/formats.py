"""Small data sets in the structure that their authors publish: field names, quirks and all.

`CASES[format]` writes one into a folder; it knows what its first sample must be, and how to break a row.
"""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.readers.captions import CAPTION
from data.readers.grounding import REGION
from data.readers.vqa import LETTER
from data.sample import OcrWord, Turn
from tests.support.tiny import random_image

SIZE = (40, 30)  # of every picture


@dataclass(frozen=True, kw_only=True)
class Case:
    """`config` are keys of the source, paths relative to the folder. `first` are the first sample's
    fields, but for those that are empty. `broken` damages the files; `complaint` is in the error then."""

    write: Callable[[Path], None]
    config: dict[str, Any]
    count: int
    first: dict[str, Any]
    broken: Callable[[Path], None]
    complaint: tuple[str, ...]
    at: int = 1  # the sample that the damage is about


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    random_image(0, *SIZE).save(path)


def image_bytes() -> bytes:
    stream = io.BytesIO()
    random_image(0, *SIZE).save(stream, "PNG")
    return stream.getvalue()


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def dump_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Changes the value that a JSON file holds, in place."""

    def run(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        dump(folder / name, value)

    return run


def edit_line(name: str, number: int, **changes: Any) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        rows[number].update(changes)
        dump_lines(folder / name, rows)

    return run


def ten(first: str, others: str) -> list[dict[str, Any]]:
    return [{"answer": first if i < 4 else others, "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]


# --- questions about pictures -------------------------------------------------------------------


def write_vqav2(folder: Path) -> None:
    header = {"info": {"year": 2017}, "data_type": "mscoco", "data_subtype": "val2014",
              "license": {"name": "CC"}}  # fmt: skip
    dump(folder / "questions.json", {**header, "task_type": "Open-Ended", "questions": [
        {"image_id": 42, "question": "What color is the mat?", "question_id": 42000},
        {"image_id": 42, "question": "Is it a café?", "question_id": 42001},
    ]})  # fmt: skip
    dump(folder / "annotations.json", {**header, "annotations": [
        {"question_type": "is it a", "multiple_choice_answer": "no", "answers": ten("yes", "no"),
         "image_id": 42, "answer_type": "yes/no", "question_id": 42001},
        {"question_type": "what color is the", "multiple_choice_answer": "green",
         "answers": ten("red", "green"), "image_id": 42, "answer_type": "other",
         "question_id": 42000},
    ]})  # fmt: skip
    write_image(folder / "images/COCO_val2014_000000000042.jpg")


def write_okvqa(folder: Path) -> None:
    header = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {},
              "data_subtype": "train2014"}  # fmt: skip
    answers = [{"answer_id": i, "raw_answer": "racing", "answer_confidence": "yes",
                "answer": "race"} for i in range(1, 11)]  # fmt: skip
    dump(folder / "questions.json", {**header, "questions": [
        {"image_id": 51606, "question": "What is the hairstyle?", "question_id": 516065},
        {"image_id": 51606, "question": "Who leaves?", "question_id": 516066},
    ]})  # fmt: skip
    dump(folder / "annotations.json", {**header, "annotations": [
        {"image_id": 51606, "answer_type": "other", "question_type": "four", "question_id": number,
         "answers": answers, "confidence": 3} for number in (516065, 516066)
    ]})  # fmt: skip
    write_image(folder / "images/train2014/COCO_train2014_000000051606.jpg")


def write_aokvqa(folder: Path) -> None:
    row = {"split": "val", "image_id": 461751, "question_id": "22jbM6gDxdaMaunuzgrsBB",
           "question": "What is in the motorcyclist's mouth?",
           "choices": ["toothpick", "food", "popsicle stick", "cigarette"],
           "correct_choice_idx": 3, "direct_answers": ["cigarette"] * 9 + ["smoke"],
           "difficult_direct_answer": False, "rationales": ["He's smoking."]}  # fmt: skip
    dump(folder / "val.json", [row, {**row, "question_id": "2Aq5RiEn7eyfWjEbpuYy"}])
    write_image(folder / "images/000000461751.jpg")


def write_gqa(folder: Path) -> None:
    row = {"semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
           "entailed": [], "equivalent": ["02930152"], "question": "Is the sky dark?",
           "imageId": "2354786", "isBalanced": True, "groups": {"global": None, "local": "06-sky"},
           "answer": "yes", "semanticStr": "select: sky (2486325)->verify color: dark [0]",
           "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {}},
           "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
           "fullAnswer": "Yes, the sky is dark."}  # fmt: skip
    dump(folder / "val.json", {"02930152": row, "07333408": {**row, "answer": "no"}})
    write_image(folder / "images/2354786.jpg")


def write_vizwiz(folder: Path) -> None:
    row = {"image": "VizWiz_val_00000000.jpg", "question": "Ok. There is another picture I hope it"
           " is a better one.", "answers": [{"answer_confidence": "yes", "answer": "unanswerable"}]
           * 10, "answer_type": "unanswerable", "answerable": 0}  # fmt: skip
    dump(folder / "val.json", [row, {**row, "image": "VizWiz_val_00000001.jpg"}])
    write_image(folder / "images/VizWiz_val_00000000.jpg")
    write_image(folder / "images/VizWiz_val_00000001.jpg")


def write_pope(folder: Path) -> None:
    row = {"question_id": 1, "image": "COCO_val2014_000000310196.jpg",
           "text": "Is there a snowboard in the image?", "label": "yes"}  # fmt: skip
    dump_lines(folder / "coco_pope_random.json", [row, {**row, "question_id": 2, "label": "no"}])
    write_image(folder / "images/COCO_val2014_000000310196.jpg")


def write_scienceqa(folder: Path) -> None:
    row = {"question": "Which is the main idea?", "choices": ["Honey.", "Bees."], "answer": 1,
           "hint": "Look at the picture.", "image": "image.png", "task": "closed choice",
           "grade": "grade2", "subject": "natural science", "topic": "biology",
           "category": "Animals", "skill": "Identify", "lecture": "", "solution": "",
           "split": "test"}  # fmt: skip
    text = {**row, "hint": "", "image": None, "answer": 0, "subject": "language science"}
    dump(folder / "problems.json", {"1": {**row, "split": "train"}, "5": text, "4": row})
    dump(folder / "pid_splits.json", {"train": ["1"], "test": ["4", "5"], "minitest": ["4"]})
    write_image(folder / "images/test/4/image.png")


QUESTIONS = {
    "vqav2": Case(
        write=write_vqav2,
        config={"path": "questions.json", "annotations": "annotations.json", "images": "images"},
        count=2,
        first={"id": "42000", "image_id": "42", "question": "What color is the mat?", "task": "vqa",
               "answers": ("green",) * 6 + ("red",) * 4, "split": "val2014",
               "tags": ("other", "what color is the")},
        broken=edit("annotations.json", lambda v: v["annotations"].pop(0)),
        complaint=("questions.json: questions[1]: unreadable row",
                   "annotations.json has no question_id '42001' in annotations"),
    ),
    "okvqa": Case(
        write=write_okvqa,
        config={"path": "questions.json", "annotations": "annotations.json", "images": "images"},
        count=2,
        first={"id": "516065", "image_id": "51606", "question": "What is the hairstyle?",
               "task": "vqa", "answers": ("race",) * 10, "split": "train2014",
               "tags": ("other", "four")},
        broken=edit("questions.json", lambda v: v["questions"][1].pop("question")),
        complaint=("questions.json: questions[1]: unreadable row: lacks 'question'",),
    ),
    "aokvqa": Case(
        write=write_aokvqa,
        config={"path": "val.json", "images": "images"},
        count=2,
        first={"id": "22jbM6gDxdaMaunuzgrsBB", "image_id": "461751", "task": "vqa", "split": "val",
               "question": "What is in the motorcyclist's mouth?",
               "answers": ("cigarette",) * 9 + ("smoke",)},
        broken=edit("val.json", lambda v: v[1].update(direct_answers="cigarette")),
        complaint=("val.json: [1]: unreadable row: 'direct_answers' must be a list",),
    ),
    "aokvqa_choice": Case(
        write=write_aokvqa,
        config={"path": "val.json", "images": "images"},
        count=2,
        first={"id": "22jbM6gDxdaMaunuzgrsBB", "image_id": "461751", "task": "vqa", "split": "val",
               "question": "What is in the motorcyclist's mouth?\nA. toothpick\nB. food\n"
               "C. popsicle stick\nD. cigarette", "answers": ("D",), "instruction": LETTER},
        broken=edit("val.json", lambda v: v[1].update(correct_choice_idx=4)),
        complaint=("val.json: [1]: unreadable row: 'correct_choice_idx' must be in 0..3",),
    ),
    "gqa": Case(
        write=write_gqa,
        config={"path": "val.json", "images": "images"},
        count=2,
        first={"id": "02930152", "image_id": "2354786", "question": "Is the sky dark?",
               "task": "vqa", "answers": ("yes",), "tags": ("verify", "attr")},
        broken=edit("val.json", lambda v: v["07333408"].update(imageId=1.5)),
        complaint=("val.json: ['07333408']: unreadable row: 'imageId' must be text or a whole",),
    ),
    "vizwiz": Case(
        write=write_vizwiz,
        config={"path": "val.json", "images": "images", "split": "val"},
        count=2,
        first={"id": "VizWiz_val_00000000.jpg", "image_id": "VizWiz_val_00000000.jpg",
               "question": "Ok. There is another picture I hope it is a better one.",
               "task": "vqa", "answers": ("unanswerable",) * 10, "split": "val",
               "tags": ("unanswerable", "unanswerable")},
        broken=lambda folder: (folder / "images/VizWiz_val_00000001.jpg").unlink(),
        complaint=("val.json: [1]: missing image", "VizWiz_val_00000001.jpg"),
    ),
    "pope": Case(
        write=write_pope,
        config={"path": "coco_pope_random.json", "images": "images"},
        count=2,
        first={"id": "1", "image_id": "310196", "question": "Is there a snowboard in the image?",
               "task": "vqa", "answers": ("yes",), "tags": ("random",)},
        broken=edit_line("coco_pope_random.json", 1, label=1),
        complaint=("coco_pope_random.json:2: unreadable row: 'label' must be text, got 1",),
    ),
    "scienceqa": Case(
        write=write_scienceqa,
        config={"path": "problems.json", "annotations": "pid_splits.json", "images": "images",
                "split": "test"},
        count=2,
        first={"id": "4", "image_id": "4", "task": "vqa", "answers": ("B",), "split": "test",
               "question": "Context: Look at the picture.\nWhich is the main idea?\nA. Honey.\n"
               "B. Bees.", "instruction": LETTER, "tags": ("picture", "natural science", "grade2")},
        broken=edit("problems.json", lambda v: v["5"].pop("choices")),
        complaint=("problems.json: ['5']: unreadable row: lacks 'choices'",),
    ),
}  # fmt: skip

# --- questions that want reading ------------------------------------------------------------------


def write_textvqa(folder: Path) -> None:
    row = {"question": "what is the brand of this camera?", "image_id": "003a8ae2ef43b901",
           "image_classes": ["Cassette deck"], "flickr_original_url": "https://farm2/o.jpg",
           "flickr_300k_url": "https://c5/z.jpg", "image_width": 1024, "image_height": 664,
           "answers": ["nous les gosses", "dakota", "clos culombu"] + ["dakota digital"] * 7,
           "question_tokens": ["what", "is"], "question_id": 34602, "set_name": "val"}  # fmt: skip
    header = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    dump(folder / "val.json", {**header, "data": [row, {**row, "question_id": 34603}]})
    box = {"width": 0.25, "top_left_x": 0.5, "top_left_y": 0.125, "height": 0.25, "rotation": 0,
           "roll": 0.0, "pitch": 0.0, "yaw": 0.0}  # fmt: skip
    dump(folder / "rosetta.json", {**header, "data": [
        {"image_id": "003a8ae2ef43b901", "ocr_tokens": ["dakota", "DIGITAL"], "ocr_info": [
            {"word": "dakota", "bounding_box": box},
            {"word": "DIGITAL", "bounding_box": {**box, "top_left_x": 0.9}}]},
    ]})  # fmt: skip
    write_image(folder / "images/003a8ae2ef43b901.jpg")


def write_docvqa(folder: Path) -> None:
    row = {"questionId": 49153, "question": "What is the actual value per 1000?",
           "question_types": ["figure/diagram"], "image": "documents/pybv0228_81.png",
           "docId": 14465, "ucsf_document_id": "pybv0228", "ucsf_document_page_no": "81",
           "answers": ["0.28", ".28"], "data_split": "val"}  # fmt: skip
    header = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val"}
    dump(folder / "val_v1.0.json", {**header, "data": [row, {**row, "questionId": 24580}]})
    words = [{"boundingBox": [8, 3, 20, 4, 20, 9, 8, 8], "text": "Value"},
             {"boundingBox": [30, 3, 39, 3, 39, 8, 30, 8], "text": "0.28", "confidence": "Low"}]  # fmt: skip
    dump(folder / "ocr_results/pybv0228_81.json", {"status": "Succeeded", "recognitionResults": [
        {"page": 1, "clockwiseOrientation": 0.1, "width": 80, "height": 60, "unit": "pixel",
         "lines": [{"boundingBox": [8, 3, 39, 3, 39, 9, 8, 9], "text": "Value 0.28",
                    "words": words}]}]})  # fmt: skip
    write_image(folder / "spdocvqa_images/documents/pybv0228_81.png")


def write_stvqa(folder: Path) -> None:
    row = {"dataset": "coco-text", "file_name": "COCO_train2014_000000456867.jpg", "question":
           "What name is on the phone?", "answers": ["vanessa"], "question_id": 8,
           "file_path": "coco-text/COCO_train2014_000000456867.jpg", "set_name": "train",
           "image_id": "COCO_train2014_000000456867"}  # fmt: skip
    dump(folder / "train_task_3.json", {"dataset_name": "st-vqa", "data": [
        row, {**row, "question_id": 9, "answers": ["nokia", "Nokia"]}]})  # fmt: skip
    write_image(folder / "images/coco-text/COCO_train2014_000000456867.jpg")


def write_ocrvqa(folder: Path) -> None:
    row = {"imageURL": "http://ecx.images-amazon.com/images/I/519XL3Ik6FL.gif",
           "authorName": "Sandra Boynton", "title": "Mom's Calendar", "genre": "Calendars",
           "questions": ["Who wrote this book?", "Is this a games related book?"],
           "answers": ["Sandra Boynton", "No"], "split": 3}  # fmt: skip
    dump(folder / "dataset.json", {"0761183272": {**row, "split": 1}, "1449430000": row})
    write_image(folder / "images/1449430000.jpg")  # people save every cover as a JPEG


def write_chartqa(folder: Path) -> None:
    row = {"imgname": "41699051005347.png", "query": "How many food items are shown?",
           "label": "14"}  # fmt: skip
    dump(folder / "test_human.json", [row, {**row, "label": "0.57"}])
    write_image(folder / "png/41699051005347.png")


READING = {
    "textvqa": Case(
        write=write_textvqa,
        config={"path": "val.json", "images": "images", "ocr": "rosetta.json"},
        count=2,
        first={"id": "34602", "image_id": "003a8ae2ef43b901", "task": "ocr_vqa", "split": "val",
               "question": "what is the brand of this camera?",
               "answers": ("nous les gosses", "dakota", "clos culombu", *["dakota digital"] * 7),
               "ocr": (OcrWord(text="dakota", box=(20.0, 3.75, 30.0, 11.25), confidence=1.0),
                       OcrWord(text="DIGITAL", box=(36.0, 3.75, 40.0, 11.25), confidence=1.0))},
        broken=edit("rosetta.json", lambda v: v["data"][0]["ocr_info"][0].pop("word")),
        complaint=("val.json: data[1]: unreadable row: lacks 'word'",),
    ),
    "docvqa": Case(
        write=write_docvqa,
        config={"path": "val_v1.0.json", "images": "spdocvqa_images", "ocr": "ocr_results"},
        count=2,
        first={"id": "49153", "image_id": "documents/pybv0228_81.png", "task": "ocr_vqa",
               "question": "What is the actual value per 1000?", "answers": ("0.28", ".28"),
               "split": "val", "tags": ("figure/diagram",),
               "ocr": (OcrWord(text="Value", box=(4.0, 1.5, 10.0, 4.5), confidence=1.0),
                       OcrWord(text="0.28", box=(15.0, 1.5, 19.5, 4.0), confidence=0.5))},
        broken=lambda folder: (folder / "ocr_results/pybv0228_81.json").unlink(),
        complaint=("val_v1.0.json: data[1]: unreadable row", "pybv0228_81.json: no such data file"),
    ),
    "stvqa": Case(
        write=write_stvqa,
        config={"path": "train_task_3.json", "images": "images"},
        count=2,
        first={"id": "8", "image_id": "456867",
               "question": "What name is on the phone?", "answers": ("vanessa",),
               "task": "ocr_vqa", "split": "train", "tags": ("coco-text",)},
        broken=edit("train_task_3.json", lambda v: v["data"][1].update(file_path="../x.jpg")),
        complaint=("train_task_3.json: data[1]: image outside folder", "images: '../x.jpg'"),
    ),
    "ocrvqa": Case(
        write=write_ocrvqa,
        config={"path": "dataset.json", "images": "images", "split": "test"},
        count=2,
        first={"id": "1449430000/0", "image_id": "1449430000", "question": "Who wrote this book?",
               "answers": ("Sandra Boynton",), "task": "ocr_vqa", "split": "test",
               "tags": ("Calendars",)},
        broken=edit("dataset.json", lambda v: v["1449430000"]["answers"].pop()),
        complaint=("dataset.json: ['1449430000']: unreadable row: has 2 questions and 1 answers",),
    ),
    "chartqa": Case(
        write=write_chartqa,
        config={"path": "test_human.json", "images": "png", "split": "test"},
        count=2,
        first={"id": "[0]", "image_id": "41699051005347.png", "task": "ocr_vqa", "split": "test",
               "question": "How many food items are shown?", "answers": ("14",),
               "tags": ("human",)},
        broken=edit("test_human.json", lambda v: v[1].update(imgname=["a"])),
        complaint=("test_human.json: [1]: unreadable row: 'imgname' must be text, got ['a']",),
    ),
}  # fmt: skip

# --- captions -------------------------------------------------------------------------------------


def write_coco(folder: Path) -> None:
    image = {"license": 3, "file_name": "COCO_val2014_000000391895.jpg", "height": 30, "width": 40,
             "coco_url": "http://images.cocodataset.org/x.jpg", "id": 391895,
             "date_captured": "2013-11-14 11:18:45"}  # fmt: skip
    other = {**image, "file_name": "COCO_val2014_000000522418.jpg", "id": 522418}
    dump(folder / "captions_val2014.json", {"info": {}, "images": [image, other], "licenses": [],
        "annotations": [{"image_id": 522418, "id": 48, "caption": "A woman cutting a cake."},
                        {"image_id": 391895, "id": 770337, "caption": "A man on a moped. "},
                        {"image_id": 391895, "id": 771687, "caption": "A bike on a dirt road."}],
        "type": "captions"})  # fmt: skip
    write_image(folder / "val2014/COCO_val2014_000000391895.jpg")
    write_image(folder / "val2014/COCO_val2014_000000522418.jpg")


def write_karpathy(folder: Path) -> None:
    def image(number: int, split: str, sentid: int) -> dict[str, Any]:
        sentences = [{"tokens": ["a", "man"], "raw": f"A man {i}.", "imgid": 0, "sentid": i}
                     for i in (sentid, sentid + 1)]  # fmt: skip
        return {"filepath": "val2014", "sentids": [sentid, sentid + 1], "imgid": 0, "split": split,
                "filename": f"COCO_val2014_{number:012d}.jpg", "sentences": sentences,
                "cocoid": number}  # fmt: skip

    rows = [image(1, "test", 10), image(2, "restval", 20), image(3, "train", 30)]
    dump(folder / "dataset_coco.json", {"images": rows, "dataset": "coco"})
    for number in (1, 2, 3):
        write_image(folder / f"images/val2014/COCO_val2014_{number:012d}.jpg")


def write_flickr(folder: Path) -> None:
    (folder / "results.csv").write_text(
        "image_name| comment_number| comment\n"
        "1000092795.jpg| 0| Two young guys look at their hands .\n"
        "1000092795.jpg| 1| Two men , in a yard .\n"
        "2199200615.jpg| 4   A dog runs across the grass .\n"
    )
    write_image(folder / "images/1000092795.jpg")
    write_image(folder / "images/2199200615.jpg")


def write_shards(folder: Path) -> None:
    for shard, keys in (("00000", ("000000", "000001")), ("00001", ("000002",))):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for key in keys:
                files = {"png": image_bytes(), "txt": f"a picture {key}".encode(),
                         "json": b'{"width": 40}'}  # fmt: skip
                for suffix, content in files.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def break_shard(folder: Path) -> None:
    with tarfile.open(folder / "00001.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("000002.txt"))


CAPTIONS = {
    "coco_captions": Case(
        write=write_coco,
        config={"path": "captions_val2014.json", "images": "val2014"},
        count=2,
        first={"id": "391895", "image_id": "391895", "question": CAPTION, "task": "caption",
               "answers": ("A man on a moped. ", "A bike on a dirt road.")},
        broken=edit("captions_val2014.json", lambda v: v["images"][1].pop("file_name")),
        complaint=("captions_val2014.json: images[1]: unreadable row: lacks 'file_name'",),
    ),
    "karpathy": Case(
        write=write_karpathy,
        config={"path": "dataset_coco.json", "images": "images", "split": "train+restval",
                "one_per": "caption"},
        count=4,
        first={"id": "20", "image_id": "2", "question": CAPTION, "task": "caption",
               "answers": ("A man 20.",), "split": "restval"},
        broken=edit("dataset_coco.json", lambda v: v["images"][1]["sentences"][1].pop("raw")),
        complaint=("dataset_coco.json: images[1]: unreadable row: lacks 'raw'",),
    ),
    "flickr30k": Case(
        write=write_flickr,
        config={"path": "results.csv", "images": "images"},
        count=2,
        first={"id": "1000092795", "image_id": "1000092795", "question": CAPTION,
               "task": "caption", "answers": ("Two young guys look at their hands .",
                                              "Two men , in a yard .")},
        broken=lambda folder: (folder / "images/2199200615.jpg").write_bytes(b""),
        complaint=("results.csv:4: broken image", "2199200615.jpg"),
    ),
    "webdataset": Case(
        write=write_shards,
        config={"path": "{00000..00001}.tar"},
        count=3,
        first={"id": "000000", "image_id": "000000", "question": CAPTION, "task": "caption",
               "answers": ("a picture 000000",)},
        broken=break_shard,
        complaint=("00001.tar: 000002: missing image: among txt",),
        at=2,
    ),
}  # fmt: skip

# --- phrases and where they are -------------------------------------------------------------------


def write_refcoco(folder: Path) -> None:
    sentences = [{"tokens": ["the", "lady"], "raw": "THE LADY", "sent_id": 451, "sent": "the lady"},
                 {"tokens": ["left"], "raw": "Left", "sent_id": 452, "sent": "left"}]  # fmt: skip
    ref = {"sent_ids": [451, 452], "file_name": "COCO_train2014_000000581857_16.jpg",
           "ann_id": 1719310, "ref_id": 0, "image_id": 581857, "split": "testA",
           "sentences": sentences, "category_id": 1}  # fmt: skip
    refs = [{**ref, "split": "train"}, ref]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))  # as Python 2 wrote them
    dump(folder / "instances.json", {"info": {}, "licenses": [], "images": [
        {"file_name": "COCO_train2014_000000581857.jpg", "height": 30, "width": 40, "id": 581857}],
        "annotations": [{"segmentation": [[1.0, 2.0]], "area": 7, "iscrowd": 0, "id": 1719310,
                         "image_id": 581857, "bbox": [3.5, 4, 36.9, 20], "category_id": 1}],
        "categories": [{"supercategory": "person", "id": 1, "name": "person"}]})  # fmt: skip
    write_image(folder / "train2014/COCO_train2014_000000581857.jpg")


ENTITY = """<annotation><filename>1000092795.jpg</filename>
<size><width>80</width><height>60</height><depth>3</depth></size>
<object><name>1</name><name>2</name>
<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>31</xmax><ymax>41</ymax></bndbox></object>
<object><name>1</name>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>9</ymax></bndbox></object>
<object><name>8</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>"""


def write_entities(folder: Path) -> None:
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir()
    (folder / "Sentences/1000092795.txt").write_text(
        "[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] in [/EN#8/scene the yard] .\n"
        "[/EN#1/people Two people] near [/EN#0/notvisual it] .\n"
    )
    (folder / "Annotations/1000092795.xml").write_text(ENTITY)
    (folder / "test.txt").write_text("1000092795\n")
    write_image(folder / "images/1000092795.jpg")


def break_entities(folder: Path) -> None:
    (folder / "Annotations/1000092795.xml").write_text(ENTITY.replace("<xmax>31", "<xmax>99"))


def write_visual_genome(folder: Path) -> None:
    region = {"region_id": 1382, "width": 12, "height": 9, "image_id": 1, "x": 21, "y": 7,
              "phrase": "the clock is green in colour"}  # fmt: skip
    dump(folder / "region_descriptions.json", [
        {"regions": [region, {**region, "region_id": 1383, "phrase": "a shade"}], "id": 1},
        {"regions": [{**region, "region_id": 1384, "image_id": 2}], "id": 2}])  # fmt: skip
    write_image(folder / "images/VG_100K/1.jpg")
    write_image(folder / "images/VG_100K_2/2.jpg")


def ask(phrase: str) -> str:
    return REGION.format(question=phrase)


GROUNDING = {
    "refcoco": Case(
        write=write_refcoco,
        config={"path": "refs(unc).p", "annotations": "instances.json", "images": "train2014",
                "split": "testA"},
        count=2,
        first={"id": "451", "image_id": "581857", "question": ask("the lady"), "answers": (),
               "task": "grounding", "split": "testA", "boxes": ((3.5, 4.0, 40.0, 24.0),)},
        broken=edit("instances.json", lambda v: v["annotations"][0].update(bbox=[3, 4, 45, 6])),
        complaint=("refs(unc).p: [1].sentences[1]: box outside image", "(3.0, 4.0, 48.0, 10.0)"),
    ),
    "flickr30k_entities": Case(
        write=write_entities,
        config={"path": ".", "annotations": "test.txt", "images": "images"},
        count=3,
        first={"id": "1000092795#0#0", "image_id": "1000092795", "answers": (),
               "question": ask("Two young guys"), "task": "grounding",
               "boxes": ((5.0, 10.0, 15.0, 20.0), (0.0, 0.0, 2.0, 4.0))},
        broken=break_entities,
        complaint=("Sentences/1000092795.txt:1: box outside image",),
    ),
    "visual_genome": Case(
        write=write_visual_genome,
        config={"path": "region_descriptions.json", "images": "images"},
        count=3,
        first={"id": "1382", "image_id": "1", "question": ask("the clock is green in colour"),
               "answers": (), "task": "grounding", "boxes": ((21.0, 7.0, 33.0, 16.0),)},
        broken=edit("region_descriptions.json", lambda v: v[0]["regions"][1].update(width="9")),
        complaint=("region_descriptions.json: [0]: unreadable row: 'width' must be a whole number",),
    ),
}  # fmt: skip

# --- conversations, one's own, tables, folders ----------------------------------------------------


def write_llava(folder: Path) -> None:
    turns = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A café."},
             {"from": "human", "value": "Where?"}, {"from": "gpt", "value": "In Paris."}]  # fmt: skip
    dump(folder / "mix.json", [
        {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": turns},
        {"id": "wgByO4Y_0", "model": "", "conversations": [
            {"from": "gpt", "value": "the end of an answer"}, *turns[2:]]},
    ])  # fmt: skip
    write_image(folder / "images/coco/train2017/000000033471.jpg")


def write_messages(folder: Path) -> None:
    first = {"messages": [{"role": "system", "content": "Be brief."},
                          {"role": "user", "content": "<image>What is it?"},
                          {"role": "assistant", "content": "A cat."}], "images": ["a/1.jpg"]}  # fmt: skip
    parts = [{"type": "image"}, {"type": "text", "text": "And this?"}]
    second = {"messages": [{"role": "user", "content": parts},
                           {"role": "assistant", "content": "A dog."}], "image": "a/1.jpg"}  # fmt: skip
    dump_lines(folder / "train.jsonl", [first, second])
    write_image(folder / "images/a/1.jpg")


def write_own(folder: Path) -> None:
    row = {"image": "a.png", "question": "what is it?", "task": "vqa", "answers": ["a cat"]}
    words = [{"text": "STOP", "box": [1, 2, 9, 8]}]
    dump_lines(folder / "rows.jsonl", [{**row, "id": 5, "ocr": words, "tags": ["x"]}, row])
    write_image(folder / "a.png")


def write_table(folder: Path) -> None:
    rows = [{"picture": {"bytes": image_bytes(), "path": "1.png"}, "query": "what?",
             "labels": ["a", "b"], "number": 7},
            {"picture": {"bytes": image_bytes(), "path": "2.png"}, "query": "who?",
             "labels": ["c"], "number": 8}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")


def break_table(folder: Path) -> None:
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    rows[1]["picture"]["bytes"] = rows[1]["picture"]["bytes"][:60]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")


def write_classes(folder: Path) -> None:
    write_image(folder / "cat/1.jpg")
    write_image(folder / "dog/2.png")


OTHERS = {
    "llava": Case(
        write=write_llava,
        config={"path": "mix.json", "images": "images"},
        count=2,
        first={"id": "000000033471", "image_id": "33471", "task": "vqa",
               "question": "What is it?", "answers": ("A café.",),
               "turns": (Turn(question="Where?", answer="In Paris."),)},
        broken=edit("mix.json", lambda v: v[1].update(image="x.jpg")),
        complaint=("mix.json: [1]: unreadable row: has 0 times <image> for 1 images",),
    ),
    "messages": Case(
        write=write_messages,
        config={"path": "train.jsonl", "images": "images"},
        count=2,
        first={"id": "train.jsonl:1", "image_id": "a/1.jpg", "question": "What is it?",
               "task": "vqa", "answers": ("A cat.",), "system": "Be brief."},
        broken=edit_line("train.jsonl", 1, messages=[{"role": "cook", "content": "x"}]),
        complaint=("train.jsonl:2: unreadable row: unknown role 'cook'; choices: system, human",),
    ),
    "jsonl": Case(
        write=write_own,
        config={"path": "rows.jsonl"},
        count=2,
        first={"id": "5", "image_id": "a.png", "question": "what is it?", "task": "vqa",
               "answers": ("a cat",), "tags": ("x",),
               "ocr": (OcrWord(text="STOP", box=(1.0, 2.0, 9.0, 8.0), confidence=1.0),)},
        broken=edit_line("rows.jsonl", 1, boxes=[[1, 2, float("nan"), 4]]),
        complaint=("rows.jsonl:2: box outside image: box (1.0, 2.0, nan, 4.0)",),
    ),
    "table": Case(
        write=write_table,
        config={"path": "rows.parquet", "columns": {"id": "number", "image": "picture",
                                                    "question": "query", "answers": "labels"}},
        count=2,
        first={"id": "7", "image_id": "1", "question": "what?", "answers": ("a", "b"),
               "task": "vqa"},
        broken=break_table,
        complaint=("rows.parquet: row 2: broken image: image in the file",),
    ),
    "image_folder": Case(
        write=write_classes,
        config={"path": "."},
        count=2,
        first={"id": "cat/1.jpg", "image_id": "cat/1.jpg", "question": 'a photo of a {}', "answers": ("cat",),
               "task": "classification", "choices": ("cat", "dog")},
        broken=lambda folder: (folder / "dog/2.png").write_bytes(image_bytes()[:80]),
        complaint=("dog/2.png: broken image",),
    ),
}  # fmt: skip

CASES = QUESTIONS | READING | CAPTIONS | GROUNDING | OTHERS
