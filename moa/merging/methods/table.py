"""Every merging method, and the options that a user may give it; read without torch."""

import difflib
import sys
from collections.abc import Mapping
from typing import Any

from moa.merging.methods.method import SPACES, Method, Weights

ALL = tuple(SPACES)
RANDOM, BY_RANK, MIDDLE = "sparse.at_random", "sparse.by_rank", "sparse.without_outliers"
LARGEST, ADD, VOTE = "sparse.largest", "sparse.add", "sparse.elect"
SUM = {"reduce": "sum"}
SHARED: dict[str, Any] = {"prepare": "sparse.model_thresholds"}
SUMS: dict[str, Any] = {"is_sum": True}
PAIRS: dict[str, Any] = {"spaces": ("factor",), "joint": True}


def thinned(thin: str, combine: str, weights: Weights, paper: str, **more: Any) -> Method:
    """Some values of each update, then one matrix of what is left; in every space unless `more` names others."""
    return Method("", weights, paper, thin=thin, combine=combine, **{"spaces": ALL, **more})


METHODS: dict[str, Method] = {
    "linear": Method(
        "linear.linear",
        "mean",
        "Model Soups (Wortsman et al., 2022), on updates",
        spaces=("core", "factor"),
        **SUMS,
    ),
    "task_arithmetic": Method(
        "linear.task_arithmetic",
        "ones",
        "Editing Models with Task Arithmetic (Ilharco et al., 2023)",
        **SUMS,
    ),
    "lines": Method(
        "linear.lines",
        "ones",
        "LiNeS: Post-training Layer Scaling (Wang et al., 2025), equation 3",
        **SUMS,
    ),
    "sa_merge": Method(
        "linear.sa_merge", "ones", "Selective Attention Merging (Shankar et al., 2025)", **SUMS
    ),
    "slerp": Method(
        "linear.slerp",
        "mean",
        "Spherical linear interpolation (Shoemake, 1985), as mergekit's slerp, on updates",
    ),
    "karcher": Method(
        "linear.karcher",
        "mean",
        "Karcher mean on the sphere (Karcher, 1977), as mergekit's karcher, on updates",
    ),
    "model_stock": Method(
        "linear.model_stock", "mean", "Model Stock (Jang et al., 2024), equation 5, per tensor"
    ),
    "ties": thinned(LARGEST, VOTE, "ones", "TIES-Merging (Yadav et al., 2023)", **SHARED),
    "knots": thinned(
        LARGEST,
        VOTE,
        "ones",
        "KnOTS (Stoica et al., 2025): TIES on the experts' common output directions",
        spaces=("rows",),
        **SHARED,
    ),
    "magnitude_prune": thinned(
        LARGEST,
        ADD,
        "ones",
        "PEFT's magnitude_prune: task arithmetic on the largest values",
        **SHARED,
    ),
    "dare_linear": thinned(
        RANDOM, ADD, "mean", "DARE: Language Models are Super Mario (Yu et al., 2024)"
    ),
    "dare_ties": thinned(
        RANDOM, VOTE, "mean", "DARE (Yu et al., 2024) with the vote of TIES", defaults=SUM
    ),
    "della": thinned(BY_RANK, VOTE, "mean", "DELLA-Merging (Deep et al., 2024)", defaults=SUM),
    "della_linear": thinned(
        BY_RANK, ADD, "mean", "DELLA-Merging (Deep et al., 2024), without the vote"
    ),
    "breadcrumbs": thinned(MIDDLE, ADD, "mean", "Model Breadcrumbs (Davari and Belilovsky, 2024)"),
    "breadcrumbs_ties": thinned(
        MIDDLE,
        VOTE,
        "mean",
        "Model Breadcrumbs (Davari and Belilovsky, 2024) with the vote of TIES",
    ),
    "pcb": Method(
        "sparse.pcb", "ones", "Parameter Competition Balancing (Du et al., 2024)", spaces=ALL
    ),
    "consensus": Method(
        "sparse.consensus",
        "ones",
        "TALL masks and Consensus Merging (Wang et al., 2024)",
        spaces=ALL,
    ),
    "tsv_m": Method("spectral.tsv_m", "ones", "Task Singular Vectors (Gargiulo et al., 2025)"),
    "iso_c": Method(
        "spectral.iso_c",
        "ones",
        "No Task Left Behind: Isotropic Model Merging (Marczak et al., 2025), over the numerical rank",
    ),
    "iso_cts": Method(
        "spectral.iso_cts",
        "ones",
        "No Task Left Behind (Marczak et al., 2025), common and task-specific, over the numerical rank",
    ),
    "wudi": Method(
        "spectral.wudi",
        "ones",
        "WUDI-Merging (Cheng et al., 2025) and OptMerge (Wei et al., 2026), in closed form",
    ),
    "dc_merge": Method("spectral.dc_merge", "ones", "DC-Merge (2026), as released for LoRA"),
    "ctm": Method("spectral.ctm", "ones", "Compress-then-Merge (2026), Tucker-2 subspace and TIES"),
    "robustmerge": Method(
        "factorwise.robustmerge", "ones", "RobustMerge (Zeng et al., 2025)", **PAIRS
    ),
    "lorahub_factors": Method(
        "factorwise.lorahub_factors",
        "mean",
        "LoraHub (Huang et al., 2024), the released combination of factors",
        **PAIRS,
    ),
    "aligned_linear": Method(
        "factorwise.aligned_linear",
        "mean",
        "Git Re-Basin's weight matching (Ainsworth et al., 2023), on the rank axis",
        **PAIRS,
    ),
    "lego": Method(
        "factorwise.lego",
        "mean",
        "LoRA-LEGO (Zhao et al., 2025): rank-wise clustering, as the CtM authors re-implement it",
        **PAIRS,
    ),
}


def find_method(name: str, space: str | None = None) -> Method:
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3) or "none"
        raise ValueError(f"method: no such method {name!r}; near: {near}; method=list prints all")
    if space is not None and space not in METHODS[name].spaces:
        choices = list(METHODS[name].spaces)
        raise ValueError(f"space: method {name} is not defined in {space!r}; choices: {choices}")
    return METHODS[name]


def check_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options with the given ones put in; ValueError names an unknown or odd one."""
    known = METHODS[method].options
    for key, value in options.items():
        if key not in known:
            choices = sorted(known) or "none"
            raise ValueError(f"options.{key}: method {method} has no such option; it has {choices}")
        number = isinstance(known[key], float) and isinstance(value, int | float)
        if not number and type(value) is not type(known[key]):
            kind = type(known[key]).__name__
            raise ValueError(f"options.{key}: must be a {kind}, got {value!r}")
        if number and not -sys.float_info.max <= value <= sys.float_info.max:  # NaN is not
            raise ValueError(f"options.{key}: must be finite, got {str(value)[:40]}")
    return {**known, **options}
