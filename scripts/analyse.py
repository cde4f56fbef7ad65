"""Which experts fight, and where? The fidelity report of LoRA adapters, without merging them.

    python -m scripts.analyse adapters=[A,B]
    python -m scripts.analyse "adapters=[runs/demo/checkpoints/step-000260/experts/*]" out=OUT

Prints a table of the experts and one of the pairs that meet most. A folder given as `out` also gets fidelity.json
(every number, by site, module and layer) and fidelity.html, a page with images that needs no other file.

    cosine             1: two experts want the same change, -1: they undo each other, 0: they do not meet
    disagree           of what both change, the share that pulls in opposite directions; 50% is chance
    overlap            share of input and output directions that both use
    crosstalk          what an expert adds to the outputs on another's samples, as a share of what that one adds; where
                       scripts.statistics has written the statistics of the inputs beside all of them
    idle ranks         whose row of A or column of B is zero
"""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from moa.cli.command import command, progress_bar
from moa.cli.ranges import FilePath
from moa.files.atomic import write_json


@dataclass(frozen=True, kw_only=True)
class AnalyseConfig:
    adapters: list[FilePath] = field(default_factory=list)  # PEFT folders; A/* means every one in A
    out: FilePath | None = None  # folder for fidelity.json and fidelity.html; null: print only


def analyse(settings: AnalyseConfig, console: Console) -> None:
    from moa.analysis.fidelity_page import details, summary, write_page
    from moa.merging.adapters import all_sites, check_experts
    from moa.merging.report.console import interference_tables
    from moa.merging.report.fidelity import measure
    from moa.merging.source import open_folders, with_known_statistics

    source = with_known_statistics(open_folders(settings.adapters))
    experts = source.experts
    check_experts(experts)
    with progress_bar("measuring", len(all_sites(experts)), console) as advance:
        record = measure(experts, shared=source.shared, on_site=advance)
    console.print(*interference_tables(record), sep="\n")
    console.print(*summary(record, {}), *details(record), sep="\n", soft_wrap=True)
    if settings.out is not None:
        out = Path(settings.out)
        write_json(out / "fidelity.json", {"adapters": settings.adapters, **record})
        write_page(out / "fidelity.html", record, {"adapters": ", ".join(settings.adapters)})
        console.print(f"page: {out / 'fidelity.html'}", soft_wrap=True)


main = command(AnalyseConfig, analyse, __doc__)

if __name__ == "__main__":
    main()
