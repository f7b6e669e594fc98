"""Injects faults into training and commands, and counts what they do.

python -m tests.faults                     everything, about an hour on two cores
python -m tests.faults kills --count 20    one part, twenty cases of it
"""

import argparse
import importlib
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.faults.report import Result

PARTS = ("kills", "prepare", "sharded", "damage", "contract", "disk", "bad_inputs", "hostile")


def main() -> int:
    """Run the parts, print counts and every case that is not right; 1 if there is one."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--count", type=int, metavar="N", help="cases of each part; default: all")
    args = parser.parse_args()
    wrong: list[Result] = []
    for part in args.parts or PARTS:
        outcomes: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as folder:
            for result in importlib.import_module(f"tests.faults.{part}").run(
                Path(folder) / part, args.count
            ):
                outcomes[result.outcome if result.ok else f"WRONG: {result.outcome}"] += 1
                if not result.ok:
                    wrong.append(result)
                    print(f"\nWRONG {part}: {result.case}: {result.outcome}\n{result.detail}")
                elif sys.stderr.isatty():
                    print(f"\r{part}: {outcomes.total()}", end="", file=sys.stderr)
        listed = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common())
        print(f"\n{part}: {outcomes.total()} cases: {listed}", flush=True)
    print(f"\n{len(wrong)} cases went wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
