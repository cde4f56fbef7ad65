"""VQA accuracy: soft agreement with ten human answers, by the two normalisations in use.

    accuracy = mean over the ten answers i of min(1, matches among the other nine / 3)

`vqa_official` is VQA v2's own evaluation (GT-Vision-Lab/VQA, vqaEval.py). `vqa_evalai` is the
processor of TextVQA and VizWiz (EvalAI, in facebookresearch/mmf and LLaVA's m4c_evaluator.py).
Their slips are kept, because scores are only comparable with them:

- the look-behind before a period is a typo, so that a period after a digit goes too ("1." is "1");
- re.UNICODE is given in place of the count of substitutions, so at most 32 periods go;
- one comma between digits anywhere deletes all marks, which otherwise become blanks.
"""

import re
from collections.abc import Sequence

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


# The official table restores ONE lost apostrophe. Its one mistake is kept; its entries with a
# capital ("Im") can never match lower-cased words and are left out.
RESTORED = {
    **{w[:i] + w[i + 1 :]: w for w in CONTRACTIONS.split() for i, letter in enumerate(w) if letter == "'"},
    "somebody'd": "somebodyd",
}


def normalize_vqa(text: str) -> str:
    """The official answer processing: punctuation, then numbers, articles and contractions."""
    return _words(_punctuation(text))


def normalize_evalai(text: str) -> str:
    """The EvalAI processor: commas and question marks go, and "cat's" becomes "cat 's" before the rest."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(_punctuation(_flat(text)))


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str) -> str:
    glued = re.search(r"\d,\d", text) is not None
    out = text
    for mark in PUNCTUATION:
        near_blank = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if near_blank or glued else " ")
    return re.sub(r"(?!<=\d)\.(?!\d)", "", out, count=int(re.UNICODE))


def _words(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


def vqa_official(prediction: str, answers: Sequence[str]) -> float:
    """VQA v2's accuracy. If all answers are equal, nothing is normalised: "Two" misses ten times "2"."""
    _check_ten("vqa_official", answers)
    answers, prediction = [_flat(answer) for answer in answers], _flat(prediction)
    if len(set(answers)) > 1:
        answers, prediction = [normalize_vqa(a) for a in answers], normalize_vqa(prediction)
    return _leave_one_out(prediction, answers)


def vqa_evalai(prediction: str, answers: Sequence[str]) -> float:
    """The accuracy of TextVQA and VizWiz: always normalised, on both sides."""
    _check_ten("vqa_evalai", answers)
    return _leave_one_out(normalize_evalai(prediction), [normalize_evalai(a) for a in answers])


def aokvqa_direct(prediction: str, answers: Sequence[str]) -> float:
    """A-OKVQA's direct answers (eval_predictions.py): min(1, matches / 3), and no normalisation."""
    return min(1.0, sum(answer == prediction for answer in answers) / 3)


def _check_ten(name: str, answers: Sequence[str]) -> None:
    if len(answers) < 10:
        raise ValueError(f"{name}: a question needs ten answers, got {len(answers)}")


def _leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    matches = sum(answer == prediction for answer in answers)
    scores = [min(1.0, (matches - (answer == prediction)) / 3) for answer in answers]
    return sum(scores) / len(scores)


def vqa_rule(answers: Sequence[str]) -> str:
    """The rule that `vqa_accuracy` uses for so many answers: `official_10` or `any_of_few`."""
    if not answers:
        raise ValueError("vqa_accuracy: a sample needs at least one answer, got none")
    return "official_10" if len(answers) >= 10 else "any_of_few"


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy for one's own data: `vqa_official` of 10 answers or more; of fewer, 1 for any normalised answer."""
    if vqa_rule(answers) == "official_10":
        return vqa_official(prediction, answers)
    return float(normalize_vqa(_flat(prediction)) in {normalize_vqa(_flat(answer)) for answer in answers})
