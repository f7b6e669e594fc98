"""``python -m benchmarks.launches``: operations that launch work on a GPU, counted without one.

A training micro-batch of CALM-M and of the token baseline by part, forward and backward pass, under
bfloat16 autocast; the optimizer's step; a decode step of both. Kernels of ours count one launch
each and do nothing. Every other operation of torch counts as one, though the library may need
several kernels for it (attention's backward pass, fused AdamW); views and allocations count none.

Training runs on a CPU with the layers of CALM-M and narrow widths, on which no count depends, and
with the dtypes of CUDA's autocast. Decoding runs on the meta device at full size, where the size
chooses the head's kernels. Weights have gradients already, as in all micro-batches but the first.
"""

import argparse
import json
import re
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.decoding import REFERENCE, make_baseline, make_calm
from benchmarks.host_time import stub_launches
from benchmarks.models import autoencoder_config, calm_config
from benchmarks.tables import table, write_between
from calm import EnergyTransformer
from calm.decoding.engine.decode_step import DecodeState, decode_step
from calm.decoding.sampling.methods import build_method
from calm.models import baseline
from calm.models.backbone import compile_layers
from calm.models.heads import energy
from calm_kernels.linear_cross_entropy import api

__all__ = ["DOCUMENT", "RESULTS", "Launches", "counted", "faults", "main", "section"]

RESULTS = Path(__file__).parent / "results" / "launches.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "gpu.md"
MARKER = "launches"
# Operations that return a view, or memory without contents.
FREE = """
_reshape_alias _unsafe_view alias as_strided detach diagonal empty empty_like empty_strided expand
imag lift_fresh new_empty new_empty_strided permute real select slice split split_with_sizes squeeze
t transpose unbind unfold unsqueeze view view_as_complex view_as_real
"""
HOST_READS = frozenset({"_local_scalar_dense", "item", "is_nonzero", "nonzero"})
NARROW = replace(
    REFERENCE, vocab_size=64, latent_size=8, ae_hidden_size=16, ae_intermediate_size=24,
    hidden_size=32, num_heads=2, intermediate_size=48, noise_size=8, baseline_hidden_size=32,
    baseline_intermediate_size=48,
)  # fmt: skip
REST, OPTIMIZER = "rest", "optimizer, once a step"
SLACK = 0.1  # counts may be lower by this share; what is lower by more should be committed
BATCH, CHUNKS, DRAWS, CANDIDATES = 2, 8, 8, 200


COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Launches(TorchDispatchMode):
    """Counts launches by part; operations of a backward pass belong to the part of their forward.

    Attributes:
        counts: launches of each part.
        names: operations that were counted.
        host_reads: operations that wait for the device.
        casts: of each weight to another dtype, by name.

    Args:
        stub: stands for our kernels.
        weights: by name, whose casts are counted.
    """

    def __init__(
        self, stub: Any, weights: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> None:
        super().__init__()
        self.casts: Counter[str] = Counter()
        self._names = {weight.data_ptr(): name for name, weight in weights.items()}
        self._stub, self._seen = stub, stub.count
        self.counts: Counter[str] = Counter()
        self.names: Counter[tuple[str, str]] = Counter()
        self.host_reads: list[str] = []
        self._part = REST
        self._began = [0]  # numbers of autograd's nodes at which parts begin
        self._parts = [REST]

    def watch(self, owner: Any, name: str, part: str) -> None:
        """What the function `name` of `owner` does from now on belongs to `part`."""
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            before = self._part
            self.begin(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.begin(before)

        setattr(owner, name, watched)

    def begin(self, part: str) -> None:
        """What follows belongs to `part`."""
        self._part = part
        self._began.append(torch._C._autograd._get_sequence_nr())
        self._parts.append(part)

    def count(self, name: str) -> None:
        """One launch, and those of our kernels since the last."""
        part = self._current_part()
        self.counts[part] += 1
        self.names[part, name] += 1
        self._count_kernels(part)

    def _count_kernels(self, part: str) -> None:
        self.counts[part] += self._stub.count - self._seen
        self.names[part, "kernels of ours"] += self._stub.count - self._seen
        self._seen = self._stub.count

    def _current_part(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return self._part
        if node.name().endswith("AccumulateGrad"):
            return "adding gradients up"
        return self._parts[bisect_right(self._began, node._sequence_nr()) - 1]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        kwargs = kwargs or {}
        if namespace == "calm_kernels":
            with self:  # what it does is counted, on any device
                result = function.redispatch(CPU_KEYS, *args, **kwargs)
            self._count_kernels(self._current_part())
            return result
        has_own = function.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU)
        if function.has_kernel_for_dispatch_key(COMPOSITE) and not has_own:
            with self:  # inside the operators above, where autograd does not take it apart
                return function.decompose(*args, **kwargs)
        if name in HOST_READS:
            self.host_reads.append(name)
        elif name not in FREE.split() and namespace == "aten":
            self.count(name)
        if name == "_to_copy" and (weight := self._names.get(args[0].data_ptr())):
            self.casts[weight] += 1
        return function(*args, **kwargs)


class OnCuda(TorchFunctionMode):
    """Attention and norms as CUDA has them: a launch each, norms in float32 under autocast."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and args[0].is_meta:
            self.launches.count("scaled_dot_product_attention")
            return args[0].new_empty(args[0].shape)
        if function is F.rms_norm:  # whose pieces a CPU runs one by one
            return F.layer_norm(*args, kwargs["weight"], None, kwargs["eps"])
        if function is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return function(*args, **kwargs)


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
    with _restored(energy, "gaussian_energy_score"):

        def watch(launches: Launches) -> None:
            launches.watch(model, "embed_patches", "embedding")
            launches.watch(model, "_encode", "frozen encoder")
            launches.watch(model.transformer, "forward", "backbone")
            launches.watch(model.generative_head, "sample", "head")
            launches.watch(energy, "gaussian_energy_score", "energy score")

        return _training_step(model, watch, stub)


def baseline_training(stub: Any) -> Launches:
    """The baseline's layers, on narrow widths."""
    torch.manual_seed(0)
    model = make_baseline(NARROW, "cpu", torch.float32)
    with _restored(baseline, "cross_entropy"), _restored(api, "_check_range"):
        api._check_range = lambda *_: None  # which does nothing on a GPU

        def watch(launches: Launches) -> None:
            launches.watch(model.model, "forward", "backbone")
            launches.watch(baseline, "cross_entropy", "output layer and loss")

        return _training_step(model, watch, stub)


@contextmanager
def _restored(module: Any, name: str) -> Iterator[None]:
    function = getattr(module, name)
    try:
        yield
    finally:
        setattr(module, name, function)


@torch.no_grad()
def decoding(model: Any, temperature: float, stub: Any) -> Launches:
    """The second step of a captured decode step, batch 1."""
    method = build_method(
        method="direct" if temperature == 1 else "batch", temperature=temperature,
        num_samples=CANDIDATES,
    )  # fmt: skip
    predictor = model.make_predictor(method, temperature)
    state = DecodeState.allocate(predictor, batch_size=1, capacity=1024, is_fixed=True)
    decode_step(state)
    launches = Launches(stub)
    launches.watch(state.backbone, "decode_step", "backbone")
    if hasattr(model, "ae_model"):
        launches.watch(model, "embed_patches", "embedding")
        launches.watch(model.generative_head, "sample", "head")
        launches.watch(model.ae_model.decoder, "expand", "decoder")
        launches.watch(model.ae_model.decoder, "project", "decoder")
    else:
        launches.watch(model.lm_head, "forward", "output layer")
    with launches, OnCuda(launches):
        decode_step(state)
    return launches


def counted(stub: Any) -> Iterator[tuple[str, Launches]]:
    """Name and count of everything."""
    yield "training, CALM-M", calm_training(stub)
    yield "training, baseline", baseline_training(stub)
    with torch.device("meta"):
        calm = make_calm(REFERENCE, "meta", torch.bfloat16)
        token_model = make_baseline(REFERENCE, "meta", torch.bfloat16)
    yield "decode step, CALM-M, T = 1", decoding(calm, 1.0, stub)
    yield f"decode step, CALM-M, T = 1/2, N = {CANDIDATES}", decoding(calm, 0.5, stub)
    yield "decode step, baseline", decoding(token_model, 1.0, stub)


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
    tables = []
    for title, parts in (results["counts"] | results["compiled"]).items():
        once = {part: count for part, count in parts.items() if part == OPTIMIZER}
        total = sum(parts.values()) - sum(once.values())
        rows = {part: count for part, count in parts.items() if part not in once}
        rows |= {"**all**": total, **once}
        tables.append(table((title, "launches"), [(part, str(n)) for part, n in rows.items()]))
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
