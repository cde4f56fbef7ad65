"""Every merging method, and the options that a user may give it; read without torch."""

import difflib
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moa.merging.methods.method import SPACES, Method, Weights

ALL = tuple(SPACES)
RANDOM, BY_RANK, MIDDLE = "sparse.at_random", "sparse.by_rank", "sparse.without_outliers"
LARGEST, ADD, VOTE = "sparse.largest", "sparse.add", "sparse.elect"
SUM = {"reduce": "sum"}
SHARED: dict[str, Any] = {"prepare": "sparse.model_thresholds"}
ROWWISE: dict[str, Any] = {**SHARED, "spaces": ("rows",)}
SUMS: dict[str, Any] = {"is_sum": True}
LINEAR: dict[str, Any] = {**SUMS, "spaces": ("core", "factor")}
READS: dict[str, Any] = {"reads_inputs": True}
READS_ROWS: dict[str, Any] = {**READS, "spaces": ("rows",)}
PAIRS: dict[str, Any] = {"spaces": ("factor",), "joint": True}


def thinned(thin: str, combine: str, weights: Weights, paper: str, **more: Any) -> Method:
    """Some values of each update, then one matrix of what is left; in every space unless `more` names others."""
    return Method("", weights, paper, thin=thin, combine=combine, **{"spaces": ALL, **more})


ROWS: dict[str, Method] = {
    "linear": Method("linear", "mean", "Model Soups (Wortsman et al., 2022), on updates", **LINEAR),
    "task_arithmetic": Method("linear", "ones", "Editing Models with Task Arithmetic (Ilharco et al., 2023)", **SUMS),
    "lines": Method("linear", "ones", "LiNeS: Post-training Layer Scaling (Wang et al., 2025), eq. 3", **SUMS),
    "sa_merge": Method("linear", "ones", "Selective Attention Merging (Shankar et al., 2025)", **SUMS),
    "slerp": Method("linear", "mean", "Spherical linear interpolation (Shoemake, 1985), as in mergekit"),
    "karcher": Method("linear", "mean", "Karcher mean on the sphere (Karcher, 1977), as in mergekit"),
    "model_stock": Method("linear", "mean", "Model Stock (Jang et al., 2024), eq. 5, per tensor"),
    "ties": thinned(LARGEST, VOTE, "ones", "TIES-Merging (Yadav et al., 2023)", **SHARED),
    "knots": thinned(LARGEST, VOTE, "ones", "KnOTS (Stoica et al., 2025), TIES on common output directions", **ROWWISE),
    "magnitude_prune": thinned(LARGEST, ADD, "ones", "task arithmetic on the largest values, as in PEFT", **SHARED),
    "dare_linear": thinned(RANDOM, ADD, "mean", "DARE: Language Models are Super Mario (Yu et al., 2024)"),
    "dare_ties": thinned(RANDOM, VOTE, "mean", "DARE (Yu et al., 2024) with the vote of TIES", defaults=SUM),
    "della": thinned(BY_RANK, VOTE, "mean", "DELLA-Merging (Deep et al., 2024)", defaults=SUM),
    "della_linear": thinned(BY_RANK, ADD, "mean", "DELLA-Merging (Deep et al., 2024), without the vote"),
    "breadcrumbs": thinned(MIDDLE, ADD, "mean", "Model Breadcrumbs (Davari and Belilovsky, 2024)"),
    "breadcrumbs_ties": thinned(MIDDLE, VOTE, "mean", "Model Breadcrumbs (Davari and Belilovsky, 2024), vote of TIES"),
    "pcb": Method("sparse", "ones", "Parameter Competition Balancing (Du et al., 2024)", spaces=ALL),
    "consensus": Method("sparse", "ones", "TALL masks and Consensus Merging (Wang et al., 2024)", spaces=ALL),
    "tsv_m": Method("spectral", "ones", "Task Singular Vectors (Gargiulo et al., 2025)"),
    "iso_c": Method("spectral", "ones", "No Task Left Behind (Marczak et al., 2025), over the numerical rank"),
    "iso_cts": Method("spectral", "ones", "No Task Left Behind (Marczak et al., 2025), with own directions"),
    "wudi": Method("spectral", "ones", "WUDI-Merging (Cheng, 2025), OptMerge, ActMerge, ASWUDI (2026), in closed form"),
    "pico": Method("spectral", "mean", "Pico (2026), on the updates; norm=mean is its last step"),
    "ct_merge": Method("spectral", "ones", "CT-Merging (2026), by its abstract"),
    "score": Method("spectral", "ones", "SCORE (2026), deviations about 0"),
    "nufilt": Method("spectral", "ones", "NuFilt (2026), in the order of the experts, in closed form"),
    "dc_merge": Method("spectral", "ones", "DC-Merge (2026), as released for LoRA"),
    "ctm": Method("spectral", "ones", "Compress-then-Merge (2026), Tucker-2 subspace and TIES"),
    "regmean": Method("regression", "ones", "RegMean (Jin et al., 2023), which MAny (2026) streams", **READS_ROWS),
    "core_regmean": Method("regression", "ones", "SSR-Merge (2026), the weights of IterIS (2025)", **READS),
    "tada": Method("regression", "ones", "TaDA (2026), by its abstract, for any number of experts", **READS),
    "robustmerge": Method("factorwise", "ones", "RobustMerge (Zeng et al., 2025)", **PAIRS),
    "lorahub_factors": Method("factorwise", "mean", "LoraHub (Huang et al., 2024), as released", **PAIRS),
    "aligned_linear": Method("factorwise", "mean", "Git Re-Basin (Ainsworth et al., 2023), matching ranks", **PAIRS),
    "lego": Method("factorwise", "mean", "LoRA-LEGO (Zhao et al., 2025), as in Compress-then-Merge", **PAIRS),
}  # fmt: skip
# A row's function is called as the row.
METHODS = {key: replace(row, name=key) for key, row in ROWS.items()}

# Of a method, the option that a fair comparison tunes beside the result's length, and at most five values of it.
DENSITY: tuple[str, tuple[Any, ...]] = ("density", (0.1, 0.2, 0.3, 0.5, 0.8))
TUNED: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("ties", "knots", "magnitude_prune", "dare_linear", "dare_ties", "robustmerge"), DENSITY),
    **dict.fromkeys(("della", "della_linear"), ("density", (0.2, 0.3, 0.5, 0.7, 0.8))),
    **dict.fromkeys(("breadcrumbs", "breadcrumbs_ties"), ("density", (0.1, 0.3, 0.5, 0.7, 0.85))),
    "lines": ("first", (0.0, 0.1, 0.3, 0.5, 0.7)),
    "pcb": ("ratio", (0.05, 0.1, 0.2, 0.3, 0.5)),
    "consensus": ("threshold", (0.2, 0.3, 0.4, 0.5, 0.6)),
    "tsv_m": ("share", (0.25, 0.5, 0.75, 1.0)),
    "iso_cts": ("common", (0.2, 0.4, 0.6, 0.8, 1.0)),
    "wudi": ("directions", ("all", "leading")),
    "pico": ("then", ("linear", "ties", "tsv_m")),
    "ct_merge": ("size", (4, 8, 16, 32)),
    "score": ("deviations", (1.0, 1.5, 1.96, 3.0)),
    "nufilt": ("protected", (2, 4, 8, 32, 128)),
    "dc_merge": ("density", (0.001, 0.01, 0.1, 0.5, 1.0)),
    "ctm": ("size", (4, 8, 16, 32)),
    "regmean": ("nondiagonal", (0.8, 0.9, 0.95, 1.0)),
    "core_regmean": ("directions", (0, 2, 4, 8)),
    "tada": ("conflict", (0.1, 0.3, 0.5, 1.0)),
    "aligned_linear": ("align", ("procrustes", "permutation", "balanced")),
    "lego": ("size", (4, 8, 16, 32)),
}  # fmt: skip


def find_method(name: str, space: str | None = None) -> Method:
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3) or "none"
        raise ValueError(f"method: no such method {name!r}; near: {near}; method=list prints all")
    if space is not None and space not in METHODS[name].spaces:
        raise ValueError(f"space: method {name} is not defined in {space!r}; choices: {[*METHODS[name].spaces]}")
    return METHODS[name]


def check_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options with the given ones put in; ValueError names an unknown or odd one."""
    known = METHODS[method].options
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"options.{key}: method {method} has no such option; it has {sorted(known) or 'none'}")
        number = isinstance(known[key], float) and isinstance(value, int | float)
        if not number and type(value) is not type(known[key]):
            raise ValueError(f"options.{key}: must be a {type(known[key]).__name__}, got {value!r}")
        if number and not -sys.float_info.max <= value <= sys.float_info.max:  # NaN is not
            raise ValueError(f"options.{key}: must be finite, got {str(value)[:40]}")
    return {**known, **options}
