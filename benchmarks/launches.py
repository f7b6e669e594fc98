"""``python -m benchmarks.launches``: operations that launch work on a GPU, counted without one.

A training micro-batch of CALM-M and of the token baseline by part, forward and backward pass, under
bfloat16 autocast; the optimizer's step; a decode step of both. Kernels of ours count one launch
each and do nothing. Every other operation of torch counts as one, though the library may need
several kernels for it (attention's backward pass, fused AdamW); views and allocations count none.

A decode step has a table of its own, with what it reads and its modelled time
(`benchmarks.decode_steps`).

Training runs on a CPU with the layers of CALM-M and narrow widths, on which no count depends, and
with the dtypes of CUDA's autocast. Decoding runs on the meta device at full size, where the size
chooses the head's kernels. Weights have gradients already, as in all micro-batches but the first.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch._inductor.utils import run_and_get_code

from benchmarks.counting import Launches, OnCuda, restored
from benchmarks.decode_steps import (
    CASES,
    count_decoding,
    decode_table,
    meta_models,
    part_weights,
)
from benchmarks.gpu.decoding import REFERENCE, make_baseline
from benchmarks.host_time import stub_launches
from benchmarks.models import autoencoder_config, calm_config
from benchmarks.tables import table, write_between
from calm import EnergyTransformer
from calm.models import baseline
from calm.models.backbone import compile_layers
from calm.models.heads import energy
from calm_kernels.linear_cross_entropy import api

__all__ = ["DOCUMENT", "RESULTS", "Launches", "counted", "faults", "main", "section"]

RESULTS = Path(__file__).parent / "results" / "launches.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "gpu.md"
MARKER = "launches"
NARROW = replace(
    REFERENCE, vocab_size=64, latent_size=8, ae_hidden_size=16, ae_intermediate_size=24,
    hidden_size=32, num_heads=2, intermediate_size=48, noise_size=8, baseline_hidden_size=32,
    baseline_intermediate_size=48,
)  # fmt: skip
OPTIMIZER = "optimizer, once a step"
SLACK = 0.1  # counts may be lower by this share; what is lower by more should be committed
BATCH, CHUNKS, DRAWS = 2, 8, 8


def _training_step(model: Any, watch: Callable[[Launches], None], stub: Any) -> Launches:
    """The second micro-batch, and the optimizer's step after it."""
    model.train()
    ids = torch.zeros(BATCH, CHUNKS * NARROW.patch_size, dtype=torch.int64)
    counts = model.loss_counts(ids)
    draws = {"seed": torch.zeros(2, dtype=torch.int64)} if hasattr(model, "ae_model") else {}

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss: torch.Tensor = model(ids, labels=ids, loss_counts=counts, **draws).loss
        return loss

    forward().backward()
    launches = Launches(stub, dict(model.named_parameters()))
    watch(launches)
    with launches, OnCuda(launches):
        forward().backward()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, fused=True)
    optimizer.step()  # makes its state
    launches.begin(OPTIMIZER)
    with launches:
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
    return launches


def calm_training(stub: Any) -> Launches:
    """CALM-M's layers, on narrow widths."""
    config = calm_config(
        NARROW, ae_config=autoencoder_config(NARROW), num_samples=DRAWS, targets="analytic"
    )
    torch.manual_seed(0)
    model = EnergyTransformer(config)
    with restored(energy, "gaussian_energy_score"):

        def watch(launches: Launches) -> None:
            launches.watch(model, "embed_patches", "embedding")
            launches.watch(model, "encode", "frozen encoder")
            launches.watch(model.transformer, "forward", "backbone")
            launches.watch(model.generative_head, "sample", "head")
            launches.watch(energy, "gaussian_energy_score", "energy score")

        return _training_step(model, watch, stub)


def baseline_training(stub: Any) -> Launches:
    """The baseline's layers, on narrow widths."""
    torch.manual_seed(0)
    model = make_baseline(NARROW, "cpu", torch.float32)
    with restored(baseline, "cross_entropy"), restored(api, "_check_range"):
        api._check_range = lambda *_: None  # which does nothing on a GPU

        def watch(launches: Launches) -> None:
            launches.watch(model.model, "forward", "backbone")
            launches.watch(baseline, "cross_entropy", "output layer and loss")

        return _training_step(model, watch, stub)


def counted(stub: Any) -> Iterator[tuple[str, Launches]]:
    """Name and count of everything."""
    yield "training, CALM-M", calm_training(stub)
    yield "training, baseline", baseline_training(stub)
    models = meta_models()
    for case in CASES:
        yield case.title, count_decoding(models[case.model], case, stub)


def compiled_layer() -> dict[str, int]:
    """Kernels that inductor calls for a layer, as it compiles for a CPU; takes half a minute."""
    model = make_baseline(replace(NARROW, baseline_layers=1), "cpu", torch.float32).train()
    compile_layers(model)
    inputs = torch.zeros(BATCH, CHUNKS, NARROW.baseline_hidden_size, requires_grad=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        hidden.float().sum().backward()

    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(step)
    calls = r"(?:extern_kernels\.|torch\.ops\.aten\.|cpp_fused)[\w.]*\("
    found = [len(re.findall(calls, code[code.index("def call") :])) for code in codes]
    return dict(zip(("forward", "backward"), found, strict=True))


def versions() -> dict[str, str]:
    """What decides counts, besides this project."""
    return {name: version(name).partition("+")[0] for name in ("torch", "transformers")}


def section(results: dict[str, Any]) -> str:
    """The tables in Markdown."""
    tables, counts = [], dict(results["counts"])
    steps = {case.title: (case, counts.pop(case.title)) for case in CASES}
    for title, parts in (counts | results["compiled"]).items():
        once = {part: count for part, count in parts.items() if part == OPTIMIZER}
        total = sum(parts.values()) - sum(once.values())
        rows = {part: count for part, count in parts.items() if part not in once}
        rows |= {"**all**": total, **once}
        tables.append(table((title, "launches"), [(part, str(n)) for part, n in rows.items()]))
    for case, parts in steps.values():
        tables.append(decode_table(case, parts, results["weights"][case.model], REFERENCE))
    return "\n\n".join(tables)


def faults(title: str, launches: Launches, committed: Mapping[str, int]) -> Iterator[str]:
    """What a test should fail for: counts above those committed, waits, weights cast twice."""
    for part, count in launches.counts.items():
        before = committed.get(part, 0)
        if not (1 - SLACK) * before <= count <= before:
            yield f"{title}: {part} launches {count}, {before} are committed"
    if launches.host_reads:
        yield f"{title}: the host waits for the device: {', '.join(launches.host_reads)}"
    for name, count in launches.casts.items():
        if count > 1:
            yield f"{title}: {name} is cast {count} times"


def _check(results: dict[str, Any]) -> int:
    """Compare with `results`; what differs is printed."""
    if results["versions"] != versions():
        print(f"not compared: counts are of {results['versions']}, installed is {versions()}")
        return 0
    with stub_launches() as stub:
        found = [
            fault
            for title, launches in counted(stub)
            for fault in faults(title, launches, results["counts"].get(title, {}))
        ]
    for fault in found:
        print(fault)
    if found:
        print("if that is meant, commit what `python -m benchmarks.launches` writes")
    return int(bool(found))


def main(argv: list[str] | None = None) -> int:
    """Count, print, and write the results and the section of the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operations", action="store_true", help="print every operation, too")
    parser.add_argument("--check", action="store_true", help="compare with what is committed")
    arguments = parser.parse_args(argv)
    if arguments.check:
        return _check(json.loads(RESULTS.read_text(encoding="utf-8")))
    results: dict[str, Any] = {"versions": versions(), "counts": {}}
    results["compiled"] = {"one layer of the backbone, compiled": compiled_layer()}
    results["weights"] = {name: part_weights(model) for name, model in meta_models().items()}
    with stub_launches() as stub:
        for title, launches in counted(stub):
            results["counts"][title] = dict(launches.counts)
            for (part, name), count in launches.names.most_common() if arguments.operations else ():
                print(f"{title}: {part}: {count} {name}")
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_between(DOCUMENT, MARKER, section(results))
    print(section(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
