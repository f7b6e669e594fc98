"""`calm env`: versions, devices, and the implementation chosen for each operation."""

import argparse
import json

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm env             for people
  calm env --json      for scripts and bug reports
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from calm.environment import collect, describe

    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else describe(facts))
    return 0
