"""Each metric once: strings, boxes and numbers in, numbers in [0, 1] out.

Where a metric has an official implementation, its quirks are kept and named, because scores are only
comparable with them. Captions go through pycocoevalcap; everything else is a few lines here.
"""

import math
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

Box = tuple[float, float, float, float]  # x0, y0, x1, y1, one unit for all four

# -- VQA accuracy ---------------------------------------------------------------------------------

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
           "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
ARTICLES = {"a", "an", "the"}
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


# The official table restores ONE lost apostrophe. Its one mistake is kept; its entries with a
# capital ("Im") can never match lower-cased words and are left out.
RESTORED = {
    **{lost: word for word in CONTRACTIONS.split() for lost in _without_one_apostrophe(word)},
    "somebody'd": "somebodyd",
}


def normalize_vqa(text: str) -> str:
    """The official answer processing (GT-Vision-Lab/VQA vqaEval.py): punctuation, numbers, articles.

    Two slips of the original are kept: its look-behind before a period is a typo that never holds,
    and it passes re.UNICODE where the count of substitutions belongs, so at most 32 periods go.
    """
    glued = re.search(r"\d,\d", text) is not None
    stripped = text
    for mark in PUNCTUATION:
        near_blank = mark + " " in text or " " + mark in text
        stripped = stripped.replace(mark, "" if near_blank or glued else " ")
    stripped = re.sub(r"(?!<=\d)\.(?!\d)", "", stripped, count=int(re.UNICODE))
    words = [NUMBERS.get(word, word) for word in stripped.lower().split()]
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


def vqa_rule(answers: Sequence[str]) -> str:
    """The rule that `vqa_accuracy` uses for so many answers: `official_10` or `any_of_few`."""
    if not answers:
        raise ValueError("vqa_accuracy: a sample needs at least one answer, got none")
    return "official_10" if len(answers) >= 10 else "any_of_few"


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy against human answers.

    `official_10` (10 answers or more): the mean over i of min(1, matches among the others / 3);
    answers and prediction are normalised only if the answers differ, as in the official code.
    `any_of_few` (fewer): 1 if the normalised prediction equals a normalised answer. Agreement of
    three annotators means nothing there.
    """
    rule = vqa_rule(answers)
    answers, prediction = [_flat(a) for a in answers], _flat(prediction)
    if rule == "any_of_few":
        return float(normalize_vqa(prediction) in {normalize_vqa(a) for a in answers})
    if len(set(answers)) > 1:
        answers, prediction = [normalize_vqa(a) for a in answers], normalize_vqa(prediction)
    matches = sum(a == prediction for a in answers)
    others = [min(1.0, (matches - (a == prediction)) / 3) for a in answers]
    return sum(others) / len(others)


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


# -- Short answers --------------------------------------------------------------------------------


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals an answer up to case, blanks and a final period."""
    return float(_plain(prediction).rstrip(".") in {_plain(a).rstrip(".") for a in answers})


def levenshtein(first: str, second: str) -> int:
    """The least number of insertions, deletions and substitutions between two strings."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        above, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest answer, 0 below `threshold`.

    Biten et al. 2019 (arXiv 1907.00490), on lower-cased text with single blanks; exactly at the
    threshold the similarity counts, as in the public evaluation code.
    """
    best = max(_similarity(_plain(prediction), _plain(answer)) for answer in answers)
    return best if best >= threshold else 0.0


def _similarity(first: str, second: str) -> float:
    longest = max(len(first), len(second))
    return 1.0 if longest == 0 else 1 - levenshtein(first, second) / longest


# -- Captions -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """Corpus scores by name, the CIDEr-D of each caption, and the tokenizer that was used."""

    corpus: dict[str, float]
    cider: list[float]
    tokenizer: str


def caption_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> CaptionScores:
    """CIDEr (that is CIDEr-D, at most 10), BLEU-1..4 and ROUGE-L of pycocoevalcap.

    Document frequencies come from the references of the pictures being scored: a subset is not
    comparable with its whole set, and a single picture always has CIDEr 0. The tokenizer is Stanford's
    PTB where Java is present; otherwise a plain stand-in, and `tokenizer` says so.
    """
    if len(predictions) != len(references) or not all(references):
        raise ValueError(
            f"caption_scores: each of {len(predictions)} predictions needs at least one reference,"
            f" got references for {sum(map(bool, references))}"
        )
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    lines, tokenizer = tokenize_captions([*predictions, *(r for refs in references for r in refs)])
    hypotheses = {i: [line] for i, line in enumerate(lines[: len(predictions)])}
    rest = iter(lines[len(predictions) :])
    truths = {i: [next(rest) for _ in refs] for i, refs in enumerate(references)}
    cider, each = Cider().compute_score(truths, hypotheses)
    bleu, _ = Bleu(4).compute_score(truths, hypotheses, verbose=0)
    rouge, _ = Rouge().compute_score(truths, hypotheses)
    corpus = {"CIDEr": float(cider), "ROUGE-L": float(rouge)}
    corpus |= {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, start=1)}
    return CaptionScores(corpus=corpus, cider=[float(v) for v in each], tokenizer=tokenizer)


def tokenize_captions(captions: Sequence[str]) -> tuple[list[str], str]:
    """Lower-cased tokens without punctuation, joined by blanks, and the name of the tokenizer."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    lines = [" ".join(caption.split()) or "." for caption in captions]  # PTB drops empty lines
    tokenized, name = _ptb(lines, Path(ptbtokenizer.__file__)), "PTB (Stanford CoreNLP 3.4.1)"
    if tokenized is None:
        tokenized, name = [_stand_in(line) for line in lines], "stand-in (no working Java)"
    drop = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(t for t in line.split() if t not in drop) for line in tokenized], name


def _ptb(lines: list[str], module: Path) -> list[str] | None:
    """Stanford's tokenizer over stdin (the package's wrapper writes into site-packages)."""
    if not lines or shutil.which("java") is None:
        return [] if not lines else None
    jar = module.with_name("stanford-corenlp-3.4.1.jar")
    options = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", *options]
    done = subprocess.run(command, input="\n".join(lines).encode(), capture_output=True)
    tokenized = done.stdout.decode("utf-8", "replace").splitlines()
    return tokenized if done.returncode == 0 and len(tokenized) == len(lines) else None


def _stand_in(line: str) -> str:
    """Words and marks apart, "n't" and "'s" split off: PTB on plain captions, not on odd ones."""
    line = re.sub(r"(\w)(n't|'\w+)\b", r"\1 \2", line.lower())
    return " ".join(re.findall(r"n't|'\w+|\w+(?:[-.,]\w+)*|[^\w\s]", line))


# -- Grounding ------------------------------------------------------------------------------------


def iou(first: Box, second: Box) -> float:
    """Intersection over union; 0 where a box has no area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    total = _area(first) + _area(second) - shared
    return shared / total if total > 0 else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def best_iou(predicted: Box | None, truths: Sequence[Box]) -> float:
    """IoU with the nearest true box, in original pixels; an unparsable answer (None) scores 0."""
    return (
        0.0 if predicted is None else max((iou(predicted, truth) for truth in truths), default=0.0)
    )


def grounding_scores(
    predicted: Sequence[Box | None], truths: Sequence[Sequence[Box]], threshold: float = 0.5
) -> dict[str, list[float]]:
    """Per sample: a hit at IoU >= `threshold` (`Acc@0.5`), the IoU itself, and `unparsable` as 0/1."""
    overlaps = [best_iou(box, boxes) for box, boxes in zip(predicted, truths, strict=True)]
    return {
        f"Acc@{threshold}": [float(overlap >= threshold) for overlap in overlaps],
        "mean_IoU": overlaps,
        "unparsable": [float(box is None) for box in predicted],
    }


# -- Standard error -------------------------------------------------------------------------------


def clustered_standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """The standard error of a mean whose values come in clusters (all questions of one picture).

        sqrt(G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2) / n,   G clusters, n values

    (Miller 2024, arXiv 2411.00640, with the small-sample factor.) With clusters of one it is the
    usual s / sqrt(n). None for fewer than two clusters: there it is unknown, not zero.
    """
    mean = sum(values) / max(len(values), 1)
    sums: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    count = len(sums)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * sum(s * s for s in sums.values())) / len(values)
