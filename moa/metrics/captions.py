"""Captions against reference captions: the scorers of COCO, through pycocoevalcap.

    captions -> PTB tokens (Java) or a named stand-in -> CIDEr-D, BLEU-1..4, ROUGE-L, METEOR (Java)

SPICE is left out: it downloads its parser at the first use.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# PTB's names. In lower case pycocoevalcap does not take them for marks: they stay in the caption.
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """Corpus scores by name, the CIDEr-D of each caption, the tokenizer used, and what is absent."""

    corpus: dict[str, float]
    cider: list[float]
    tokenizer: str
    absent: dict[str, str] = field(default_factory=dict)


def caption_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, meteor: bool = False
) -> CaptionScores:
    """CIDEr (that is CIDEr-D, at most 10), BLEU-1..4, ROUGE-L and, on request, METEOR 1.5.

    Document frequencies come from these references: a subset is not comparable with its whole set, and a single image
    always has CIDEr 0. Java runs Stanford's PTB tokenizer and METEOR (some ten seconds); `tokenizer` and `absent` name
    what was used or missing.
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
    absent = {}
    if meteor:
        try:
            corpus["METEOR"] = meteor_score(hypotheses, truths)
        except ValueError as error:  # the answers may have taken hours: the other scores stay
            absent["METEOR"] = str(error)
    return CaptionScores(corpus=corpus, cider=[float(v) for v in each], tokenizer=tokenizer, absent=absent)


def meteor_score(hypotheses: dict[int, list[str]], truths: dict[int, list[str]]) -> float:
    """METEOR 1.5 of the whole set; ValueError without Java, or where its program does not answer."""
    if shutil.which("java") is None:
        raise ValueError("no Java here")
    from pycocoevalcap.meteor.meteor import Meteor

    safe = [  # its protocol separates sentences by three bars
        {i: [line.replace("|||", " ") for line in lines] for i, lines in captions.items()}
        for captions in (truths, hypotheses)
    ]
    scorer = Meteor()
    try:
        return float(scorer.compute_score(*safe)[0])
    except (OSError, ValueError) as error:
        raise ValueError(f"its program gave no score ({error}); it needs 2 GB") from error
    finally:
        if scorer.lock.locked():  # after an error; its destructor would wait for the lock for ever
            scorer.lock.release()


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
    tokens = re.findall(r"n't|'\w+|\w+(?:[-.,]\w+)*|[^\w\s]", line)
    return " ".join(BRACKETS.get(token, token) for token in tokens)
