"""What a compiled kernel costs: registers, spills, shared memory, and instructions from its
disassembly.

Instructions are counted dynamically: every instruction once, and those of a loop once per trip. A
loop is a backward branch with neither an exit nor a jump past it between its ends; its trips are
declared by the configuration, in the order of the code. Where two nested loops have become one,
what a forward branch jumps over belongs to the outer one. Code after the last exit is skipped:
there the compiler puts the slow path of warp shuffles for diverged warps, which these kernels never
take. A loop that the compiler unrolled in part is counted as if it were not, which is too much.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Self

__all__ = [
    "Cost",
    "Fixed",
    "Flattened",
    "Loop",
    "count_instructions",
    "inspect_kernel",
    "parse_amdgcn",
    "parse_sass",
    "waits_first",
]

_SASS_LABEL = re.compile(r"^\.(L_x_\d+):")
_SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_SASS_BRANCH = re.compile(r"`\(\.(L_x_\d+)\)")
# A loop with one of these waits for hardware; it counts once.
_WAITS = {"NANOSLEEP"}
# The wait for the kernel before; what accesses memory, but for launch arguments and shared memory.
_GRID_WAIT = "ACQBULK"
_ACCESS = re.compile(r"(LD(?!CU?\b|S)|ST(?!S)|ATOM(?!S)|RED|UTMA|UBLK|TEX|SU(LD|ST))")
_PREDICATE = re.compile(r"@|\bU?!?U?P\d")
_AMD_LABEL = re.compile(r"^(\.LBB\d+_\d+):")
_AMD_LINE = re.compile(r"^\t([a-z]\w*)(.*)")
_AMD_BRANCH = re.compile(r"(\.LBB\d+_\d+)")


@dataclass(frozen=True)
class Loop:
    """Instructions ``first..last`` of the listing, and those that forward branches jump over."""

    first: int
    last: int
    optional: frozenset[int] = field(default=frozenset(), compare=False)


@dataclass(frozen=True)
class Cost:
    """What one program of a kernel takes."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int  # of one warp
    num_warps: int
    num_loops: int
    mnemonics: frozenset[str]
    waits_first: bool


def _parse(
    lines: Sequence[str],
    label: re.Pattern[str],
    line: re.Pattern[str],
    branch: re.Pattern[str],
    exit_name: str,
) -> tuple[list[str], list[Loop]]:
    """Mnemonics up to the last unconditional exit, and the loops among them."""
    names: list[str] = []
    places: dict[str, int] = {}
    loops: list[Loop] = []
    exits: list[int] = []
    jumps: list[tuple[int, str]] = []  # unconditional
    branches: list[tuple[int, str]] = []  # conditional
    for text in lines:
        if found := label.match(text):
            places[found[1]] = len(names)
        elif found := line.match(text):
            name, operands = found[1], found[2]
            target = branch.search(operands)
            names.append(name)
            if target:
                is_always = name in ("BRA", "s_branch") and not _PREDICATE.search(text)
                (jumps if is_always else branches).append((len(names) - 1, target[1]))
            if target and target[1] in places:
                loops.append(Loop(places[target[1]], len(names) - 1))
            if name == exit_name and "@" not in text:
                exits.append(len(names))
    end = exits[-1] if exits else len(names)
    kept = [
        loop
        for loop in loops
        if loop.first < loop.last < end  # one instruction: where code that has ended is held
        and not any(loop.first < place <= loop.last for place in exits)
        and not any(
            loop.first <= place < loop.last and places.get(label, end) > loop.last
            for place, label in jumps
        )
        and not _WAITS & set(names[loop.first : loop.last + 1])
    ]
    # Branches to one place close one loop.
    ends = {loop.first: loop.last for loop in sorted(kept, key=lambda loop: loop.last)}
    joined = _joined(Loop(first, ends[first]) for first in sorted(ends))
    over = [(index + 1, places.get(label, end)) for index, label in branches]
    return names[:end], [_with_optional(loop, over) for loop in joined]


def _joined(loops: Iterable[Loop]) -> list[Loop]:
    """Loops of which each starts later; two that overlap without nesting are one, entered twice."""
    joined: list[Loop] = []
    for loop in loops:
        if joined and joined[-1].first < loop.first <= joined[-1].last < loop.last:
            joined[-1] = Loop(joined[-1].first, loop.last)
        else:
            joined.append(loop)
    return joined


def _with_optional(loop: Loop, over: Iterable[tuple[int, int]]) -> Loop:
    """`loop` with what branches inside it jump over, from the first place to before the second."""
    optional = (
        range(start, stop) for start, stop in over if loop.first < start and stop <= loop.last
    )
    return replace(loop, optional=frozenset(chain.from_iterable(optional)))


def parse_sass(listing: str) -> tuple[list[str], list[Loop]]:
    """Mnemonics and loops of an NVIDIA disassembly, no-operations included."""
    return _parse(listing.splitlines(), _SASS_LABEL, _SASS_LINE, _SASS_BRANCH, "EXIT")


def parse_amdgcn(listing: str) -> tuple[list[str], list[Loop]]:
    """Mnemonics and loops of AMD assembly."""
    return _parse(listing.splitlines(), _AMD_LABEL, _AMD_LINE, _AMD_BRANCH, "s_endpgm")


class Fixed(int):
    """Trips that the compiler knows: it may unroll the loop, which then is not in the code."""


class Flattened(int):
    """Trips of one loop that was two; what branches jump over runs `outer` times."""

    outer: int

    def __new__(cls, outer: int, inner: int) -> Self:
        """``outer * inner`` trips."""
        trips = super().__new__(cls, outer * inner)
        trips.outer = outer
        return trips


def _match_trips(num_loops: int, trips: Sequence[int]) -> list[int]:
    """Trips of the loops that remain in the code."""
    kept = [count for count in trips if not isinstance(count, Fixed)]
    for expected in (list(trips), kept):
        if len(expected) == num_loops:
            return expected
    declared = f"{len(trips)} declared" + (f", {len(kept)} if unrolled" * (kept != list(trips)))
    raise ValueError(f"{num_loops} loops in the code, {declared}")


def count_instructions(
    names: Sequence[str], loops: Sequence[Loop], trips: Sequence[int] | None
) -> int:
    """Instructions that one warp issues; loops of `Fixed` trips may have been unrolled, and with
    None for the trips every instruction counts once.

    Raises:
        ValueError: the code has another number of loops than were declared.
    """
    times = [1] * len(names)
    counts = [1] * len(loops) if trips is None else _match_trips(len(loops), trips)
    for loop, count in zip(loops, counts, strict=True):
        for index in range(loop.first, loop.last + 1):
            if isinstance(count, Flattened) and index in loop.optional:
                times[index] *= count.outer
            else:
                times[index] *= count
    return sum(
        count for name, count in zip(names, times, strict=True) if name not in ("NOP", "s_nop")
    )


def waits_first(listing: str) -> bool:
    """Whether a disassembled NVIDIA kernel waits for the kernel before it, and only then accesses
    memory that others see.

    What jumps ahead of the wait lands ahead of it, so that all threads come by. No load may go
    through the cache of constants, which is for memory that does not change while the kernel runs:
    here it already runs while the kernel before it writes.
    """
    ahead, wait, _ = listing.partition(_GRID_WAIT)
    lines = ahead.splitlines()
    names = [found[1] for line in lines if (found := _SASS_LINE.match(line))]
    places = {found[1] for line in lines if (found := _SASS_LABEL.match(line))}
    return (
        bool(wait)
        and not any(_ACCESS.match(name) or name.startswith(("EXIT", "RET")) for name in names)
        and places.issuperset(_SASS_BRANCH.findall(ahead))
        and not re.search(r"\bLDG\S*CONSTANT", listing)
    )


@lru_cache(maxsize=1)
def _tools() -> Path:
    """Folder of the disassembler that Triton ships."""
    import triton.backends.nvidia as nvidia

    return Path(str(nvidia.__file__)).parent / "bin"


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(_tools() / tool), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def _inspect_nvidia(compiled: Any) -> tuple[int, int, bool, list[str], list[Loop]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(path))
        listing = _run("nvdisasm", "-c", str(path))
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    stack = int(re.findall(r"STACK:(\d+)", usage)[-1])
    return registers, stack, waits_first(listing), *parse_sass(listing)


def _inspect_amd(compiled: Any) -> tuple[int, int, bool, list[str], list[Loop]]:
    listing = compiled.asm["amdgcn"]
    registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", listing)[-1])
    spills = int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", listing)[-1])
    return registers, 4 * spills, False, *parse_amdgcn(listing)


def inspect_kernel(compiled: Any, trips: Sequence[int] | None) -> Cost:
    """The cost of a compiled kernel whose loops run `trips` times, in the order of the code."""
    is_nvidia = "cubin" in compiled.asm
    inspected = _inspect_nvidia(compiled) if is_nvidia else _inspect_amd(compiled)
    registers, spilled, is_waiting, names, loops = inspected
    return Cost(
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        instructions=count_instructions(names, loops, trips),
        num_warps=compiled.metadata.num_warps,
        num_loops=len(loops),
        mnemonics=frozenset(names),
        waits_first=is_waiting,
    )
