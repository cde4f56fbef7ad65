"""Which experts fight, and where? The fidelity report of adapters, without merging them.

    python scripts/analyse.py adapters=[A,B] out=OUT
    python scripts/analyse.py "adapters=[runs/demo/checkpoints/step-000260/experts/*]" out=OUT

Writes fidelity.json and fidelity.html (pictures inside), and prints the findings.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.progress import Progress

from moa.analysis.fidelity_page import findings, write_page
from moa.atomic import write_json
from moa.merging.fidelity import measure
from moa.merging.inputs import open_adapters
from moa.merging.plan import all_sites, check_experts
from moa.settings import describe, load


@dataclass(frozen=True, kw_only=True)
class AnalyseConfig:
    adapters: list[str] = field(default_factory=list)  # PEFT folders; A/* means every one in A
    out: str | None = None  # folder for fidelity.json and fidelity.html


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    try:
        analyse(load(AnalyseConfig, args.config, args.overrides))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def analyse(settings: AnalyseConfig) -> None:
    if settings.out is None:
        raise ValueError("out: names no folder")
    experts = open_adapters(settings.adapters)
    check_experts(experts)
    with Progress() as progress:
        bar = progress.add_task("measuring", total=len(all_sites(experts)))
        record = measure(experts, on_site=lambda site: progress.advance(bar))
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "fidelity.json", {"adapters": settings.adapters, **record})
    write_page(out / "fidelity.html", record, {"adapters": settings.adapters})
    print(*findings(record), f"page: {out / 'fidelity.html'}", sep="\n")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"settings:\n{describe(AnalyseConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML file of the settings below")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see the settings below")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    main()
