"""Every benchmark for models that generate, by the name that a config gives it.

The first six are for data of one's own: a sample whose source names no benchmark is scored by the
one of its task. The others are published ones.
"""

from moa.benchmarks.aokvqa import AOKVQA
from moa.benchmarks.benchmark import Benchmark
from moa.benchmarks.captioning import CAPTION, COCO_CAPTIONS
from moa.benchmarks.chartqa import CHARTQA
from moa.benchmarks.docvqa import DOCVQA, STVQA
from moa.benchmarks.exact import EXACT
from moa.benchmarks.gqa import GQA
from moa.benchmarks.grounding import GROUNDING
from moa.benchmarks.ocr_vqa import OCR_VQA
from moa.benchmarks.pope import POPE
from moa.benchmarks.scienceqa import SCIENCEQA
from moa.benchmarks.textvqa import TEXTVQA, VIZWIZ
from moa.benchmarks.vqa import VQA
from moa.benchmarks.vqav2 import VQAV2

BENCHMARKS: dict[str, Benchmark] = {
    "vqa": VQA,
    "caption": CAPTION,
    "grounding": GROUNDING,
    "ocr_vqa": OCR_VQA,
    "count": EXACT,
    "yes_no": EXACT,
    "vqav2": VQAV2,
    "okvqa": VQAV2,
    "aokvqa": AOKVQA,
    "aokvqa_choice": SCIENCEQA,
    "textvqa": TEXTVQA,
    "vizwiz": VIZWIZ,
    "docvqa": DOCVQA,
    "stvqa": STVQA,
    "chartqa": CHARTQA,
    "gqa": GQA,
    "scienceqa": SCIENCEQA,
    "pope": POPE,
    "refcoco": GROUNDING,
    "coco_captions": COCO_CAPTIONS,
}
