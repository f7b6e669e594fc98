"""``python3 -m benchmarks.gpu.campaign --budget SECONDS --output DIR``: everything, on this GPU.

Stages run one after the other, the most telling first, each in a process of its own with a limit of
its own, within the budget. A stage that fails, hangs or kills its process costs itself alone.
``report.json`` is written anew after each stage: how it ended, how long it took, the last lines of
its log, its rows; ``benchmarks/report.py`` makes tables and plots of it. ``--resume`` goes on where
an earlier call ended, ``--stages`` chooses, ``--tiny`` tries it all without a GPU.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import ROOT, import_beforehand, run_module
from benchmarks.machine import current_commit
from calm_kernels.backend import OPERATIONS

__all__ = ["Outcome", "Stage", "main", "run_campaign", "stages"]

REPORT = "report.json"
LAST_LINES = 25
LEAST_SECONDS = 5.0  # a stage that would get less is not started
IMPORTS = ("torch", "triton", "transformers.models.llama.modeling_llama", "benchmarks.models")
PASSED, FAILED, TIMED_OUT, KILLED = "passed", "failed", "timed out", "killed"
NO_TIME, LACKS = "no time left", "lacks"


@dataclass(frozen=True)
class Stage:
    """A program of the campaign.

    Attributes:
        name: unique; also that of its folder.
        module: what ``python -m`` runs.
        arguments: its command line; ``{folder}`` stands for the stage's folder, into which it
            writes JSON files with a list ``rows``.
        limit: seconds at most.
        needs: a program without which the stage is skipped.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    limit: float
    needs: str | None = None


@dataclass
class Outcome:
    """How a stage ended: passed, failed, timed out, killed, no time left, or lacks a program."""

    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""
    last_lines: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


def stages(*, is_tiny: bool = False) -> list[Stage]:
    """All stages, the most telling first."""
    tiny = ("--tiny",) if is_tiny else ()

    def stage(module: str, limit: float, *words: str, name: str = "", needs: str = "") -> Stage:
        words = (*words, *tiny, "--output", "{folder}")
        return Stage(name or module, f"benchmarks.gpu.{module}", words, limit, needs or None)

    names = [name for name in OPERATIONS if find_spec(f"benchmarks.gpu.{name}")]
    compiled = [name for name in names if name != "agreeing_patch"]  # a loop of the host

    def each(
        operations: list[str], name: str, module: str, limit: float, *words: str
    ) -> list[Stage]:
        return [stage(module, limit, *words, "--op", op, name=f"{name} {op}") for op in operations]

    return [
        stage("environment", 45),
        *each(names, "parity", "parity", 60),
        *each(names, "kernels", "run", 60, "--quick"),
        stage("decoding", 150),
        stage("training_step", 150),
        *each(compiled, "compiled", "run", 120, "--quick", "--compiled"),
        *each(names, "sweep", "run", 90, "--sweep"),
        stage("counters", 150, name="ncu", needs="ncu"),
        stage("suite", 400, name="tests"),
        stage("races", 200, needs="compute-sanitizer"),
    ]


def run_campaign(
    chosen: Sequence[Stage],
    output: Path,
    budget: float,
    *,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run the stages within `budget` seconds; the outcomes, those of earlier calls included.

    Args:
        chosen: stages, in order.
        output: folder of ``report.json`` and of the stages' folders.
        budget: seconds for all of them.
        resume: skip stages that passed in an earlier call, whose outcomes are kept.
        say: shows progress, a line a stage.
    """
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    past = _past(output) if resume else {}
    outcomes = {name: outcome for name, outcome in past.items() if outcome.status == PASSED}
    for stage in chosen:
        if stage.name in outcomes:
            continue
        outcome = _run(stage, output, end - time.monotonic())
        outcomes[stage.name] = outcome
        _write(output, budget, outcomes.values())
        say(_line(outcome))
    return list(outcomes.values())


def _run(stage: Stage, output: Path, left: float) -> Outcome:
    """Run one stage with `left` seconds to go; no exception comes out of it."""
    if stage.needs and shutil.which(stage.needs) is None:
        return Outcome(stage.name, f"{LACKS} {stage.needs}")
    limit = min(stage.limit, left)
    if limit < LEAST_SECONDS:
        return Outcome(stage.name, NO_TIME)
    folder = output / stage.name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = [word.replace("{folder}", str(folder)) for word in stage.arguments]
    log, began = folder / "log.txt", time.monotonic()
    try:
        status, detail = _ended(run_module(stage.module, words, log, limit), limit)
    except (OSError, EOFError) as error:
        status, detail = FAILED, f"not started: {error}"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    seconds = round(time.monotonic() - began, 2)
    lines = text.splitlines()[-LAST_LINES:]
    return Outcome(stage.name, status, seconds, detail, lines, _rows(folder))


def _ended(status: int | None, limit: float) -> tuple[str, str]:
    """Status and detail of a program with this exit status."""
    if status is None:
        return TIMED_OUT, f"after {limit:.0f} s"
    if status < 0:
        return KILLED, f"by {signal.Signals(-status).name}"
    return (PASSED, "") if status == 0 else (FAILED, f"exit status {status}")


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of all results in `folder`; a file that was cut short has none."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json")):
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            found += [row for row in rows if isinstance(row, dict)]
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _past(output: Path) -> dict[str, Outcome]:
    try:
        report = json.loads((output / REPORT).read_text(encoding="utf-8"))
        return {entry["name"]: Outcome(**entry) for entry in report["stages"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(output: Path, budget: float, outcomes: Iterable[Outcome]) -> None:
    report = {
        "budget": budget,
        "commit": current_commit(),
        "stages": [asdict(outcome) for outcome in outcomes],
    }
    partial = output / f".{REPORT}.partial"
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, output / REPORT)


def _line(outcome: Outcome) -> str:
    status = f"{outcome.status} {outcome.detail}".strip()
    return f"{outcome.name:32} {status:28} {outcome.seconds:7.1f} s {len(outcome.rows):5} rows"


def main(argv: list[str] | None = None) -> int:
    """Run the campaign; the exit status is 0 whatever fails, and failures are listed."""
    names = [stage.name for stage in stages()]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "campaign")
    parser.add_argument("--stages", nargs="+", choices=names, metavar="STAGE", help="default: all")
    parser.add_argument("--resume", action="store_true", help="skip stages that have passed")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes on the CPU, kernels interpreted"
    )
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    import_beforehand(IMPORTS)
    known = {stage.name: stage for stage in stages(is_tiny=arguments.tiny)}
    chosen = [known[name] for name in arguments.stages or known]
    output = arguments.output.resolve()
    outcomes = run_campaign(chosen, output, arguments.budget, resume=arguments.resume)
    wrong = [outcome for outcome in outcomes if outcome.status != PASSED]
    print(f"\n{len(outcomes) - len(wrong)} of {len(outcomes)} stages passed")
    for outcome in wrong:
        print(_line(outcome))
        print("".join(f"    {line}\n" for line in outcome.last_lines[-5:]), end="")
    print(output / REPORT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
