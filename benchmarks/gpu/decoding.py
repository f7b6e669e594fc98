"""``python -m benchmarks.gpu.decoding``: prompts continued on this GPU, one and a batch of them.

Ours stands beside itself with launches that overlap, where a GPU can, beside the published
algorithm on our reference backend, beside the baseline that writes single tokens, and beside the
time that reading the weights takes. Weights are random, at published
sizes. Parity is asserted in float32 before anything is timed in bfloat16. Times are of whole calls
of `generate` with a graph captured beforehand; a row's ``warmup_seconds`` is the capture. Results
go to benchmarks/results/<device>-decoding.json.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel

from benchmarks.gpu.ceilings import Ceilings, measure_ceilings
from benchmarks.gpu.command import make_parser, read_device
from benchmarks.gpu.environment import environment
from benchmarks.gpu.profiling import kernels_of
from benchmarks.gpu.run import RESULTS
from benchmarks.gpu.work import failure, write
from benchmarks.models import as_published, autoencoder_config, calm_config
from benchmarks.reference_decoding import reference_generate
from calm import BaselineTransformer, EnergyTransformer
from calm.decoding.engine.cuda_graph import captured_step
from calm.decoding.engine.decode_step import DecodeState, decode_step, prefill
from calm.decoding.engine.predictors import Predictor
from calm.decoding.generation import generate, make_predictor, warmup
from calm_kernels.backend import use_overlap
from calm_kernels.overlap import overlaps_launches
from calm_kernels.tuning import architecture

__all__ = ["QUICK", "REFERENCE", "Shape", "chunk_floor_ms", "main", "rows"]

REPEATS, PUBLISHED_REPEATS = 5, 2
OVERLAPPING = "ours, overlapping"
PARITY_TOKENS = 16
SEED = 3


@dataclass(frozen=True)
class Shape:
    """CALM-M and Transformer-S (paper, table 1), and the prompts that they continue."""

    vocab_size: int = 128256
    patch_size: int = 4
    latent_size: int = 128
    ae_hidden_size: int = 512
    ae_intermediate_size: int = 1280
    hidden_size: int = 1024
    num_layers: int = 16
    num_heads: int = 16
    intermediate_size: int = 2752
    num_blocks: int = 4
    noise_size: int = 64
    baseline_hidden_size: int = 768
    baseline_layers: int = 12
    baseline_intermediate_size: int = 2048
    prompt_tokens: int = 128
    new_tokens: int = 512
    batch_size: int = 64
    num_samples: int = 200


REFERENCE = Shape()
QUICK = Shape(
    vocab_size=101, latent_size=8, ae_hidden_size=16, ae_intermediate_size=24, hidden_size=32,
    num_layers=2, num_heads=4, intermediate_size=48, num_blocks=1, baseline_hidden_size=32,
    baseline_layers=2, baseline_intermediate_size=48, prompt_tokens=8, new_tokens=16, batch_size=3,
    num_samples=10,
)  # fmt: skip


def make_calm(shape: Shape, device: str, dtype: torch.dtype) -> EnergyTransformer:
    """A model with random weights, the same for every dtype; no token ends a text."""
    torch.manual_seed(0)
    scale = {"initializer": "fan_in", "embedding_std": 1.0}
    autoencoder = autoencoder_config(shape, **scale)
    config = calm_config(shape, ae_config=autoencoder, eos_token_id=None, **scale)
    return EnergyTransformer(config).eval().to(device, dtype)


def make_baseline(shape: Shape, device: str, dtype: torch.dtype) -> BaselineTransformer:
    """The token-by-token model that comes nearest in quality."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.baseline_hidden_size,
        intermediate_size=shape.baseline_intermediate_size,
        num_hidden_layers=shape.baseline_layers, num_attention_heads=shape.num_heads,
        max_position_embeddings=2048, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return BaselineTransformer(config).eval().to(device, dtype)


def prompts(shape: Shape, batch_size: int, device: str) -> torch.Tensor:
    """Random tokens ``[B, T]``."""
    size = (batch_size, shape.prompt_tokens)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.vocab_size, size, generator=generator).to(device)


def chunk_floor_ms(
    model: EnergyTransformer, num_samples: int, batch_size: int, ceilings: Ceilings
) -> float:
    """Time of a chunk if every weight is read once and GEMMs run at full rate."""
    backbone = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.startswith(("transformer.layers", "embed_proj"))
    )
    head = sum(parameter.numel() for parameter in model.generative_head.parameters())
    decoder = sum(parameter.numel() for parameter in model.ae_model.decoder.parameters())
    decoder -= model.ae_model.decoder.output_weight.numel()
    projection = model.ae_model.decoder.output_weight.numel()
    traffic = 2 * (backbone + head + decoder + projection)  # bytes, bf16
    by_draw = head + decoder + model.patch_size * projection
    flops = 2 * batch_size * (backbone + num_samples * by_draw)
    return ceilings.floor_ms(traffic, flops)


def assert_parity(shape: Shape, device: str) -> None:
    """Without noise, in float32, ours and the published algorithm write the same text."""
    model, ids = make_calm(shape, device, torch.float32), prompts(shape, 2, device)

    def no_noise(index: int, count: int) -> torch.Tensor:
        return torch.zeros(count, len(ids), model.config.noise_size, device=device)

    options = {"max_new_tokens": PARITY_TOKENS, "temperature": 1.0}
    ours = generate(model, ids, noise_scale=0.0, seed=0, **options)
    theirs = reference_generate(as_published(model), ids, noise=no_noise, **options)
    assert torch.equal(ours, theirs), "ours and the published algorithm differ; nothing is timed"


def timed(run: Callable[[], object], repeats: int, device: str) -> float:
    """Median milliseconds of a call, without the first."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[1:])


def row_of(
    model: PreTrainedModel, name: str, shape: Shape, batch_size: int, device: str, **options: Any
) -> dict[str, Any]:
    """`generate` of any of our models on `batch_size` prompts."""
    ids = prompts(shape, batch_size, device)
    length = shape.prompt_tokens + shape.new_tokens
    seconds = warmup(model, batch_size=batch_size, max_length=length, **options)

    def run() -> object:
        return generate(model, ids, max_new_tokens=shape.new_tokens, seed=SEED, **options)

    return _row(name, shape, batch_size, timed(run, REPEATS, device), seconds, options)


def overlapping_row(
    model: PreTrainedModel, shape: Shape, batch_size: int, device: str, **options: Any
) -> dict[str, Any]:
    """Ours with launches that overlap, once it has written the same texts."""
    ids = prompts(shape, batch_size, device)

    def write_texts() -> torch.Tensor:
        return generate(model, ids, max_new_tokens=shape.new_tokens, seed=SEED, **options)

    expected = write_texts()
    with use_overlap(True):
        assert torch.equal(write_texts(), expected), "texts differ where launches overlap"
        return row_of(model, OVERLAPPING, shape, batch_size, device, **options)


def can_overlap(device: str) -> bool:
    """Whether launches overlap on this device where that is asked for."""
    with use_overlap(True):
        return overlaps_launches(architecture(torch.device(device)))


def published_row(
    model: EnergyTransformer, shape: Shape, batch_size: int, device: str, **options: Any
) -> dict[str, Any]:
    """The published algorithm."""
    ids = prompts(shape, batch_size, device)

    def run() -> object:
        return reference_generate(model, ids, max_new_tokens=shape.new_tokens, **options)

    return _row("published", shape, batch_size, timed(run, PUBLISHED_REPEATS, device), 0.0, options)


def _row(
    name: str, shape: Shape, batch_size: int, call_ms: float, warm: float, options: dict[str, Any]
) -> dict[str, Any]:
    tokens = batch_size * shape.new_tokens
    return {
        "name": name, "batch_size": batch_size, **options, "call_ms": call_ms,
        "chunk_ms": call_ms * shape.patch_size / shape.new_tokens,
        "tokens_per_second": 1e3 * tokens / call_ms, "warmup_seconds": warm,
    }  # fmt: skip


def graph_row(
    model: PreTrainedModel, shape: Shape, batch_size: int, device: str, **options: Any
) -> dict[str, Any]:
    """Nodes of the captured decode step, their time on the device, and the longest of them."""
    predictor = make_predictor(model, **options)
    ids = prompts(shape, batch_size, device)
    chunks = (shape.prompt_tokens + shape.new_tokens) // shape.patch_size
    state, step = _step(predictor, batch_size, chunks, device)
    with torch.no_grad():
        prefill(state, ids, [0] * batch_size, torch.zeros_like(state.seed))
        step()
        found = kernels_of(step, device)
    return {"name": "graph", "batch_size": batch_size, **options,
            "nodes": found.pop("launches"), **found}  # fmt: skip


def _step(
    predictor: Predictor, batch_size: int, chunks: int, device: str
) -> tuple[DecodeState, Callable[[], object]]:
    """Memory of a decode step, and the replay of its graph; on a CPU the step itself."""
    if device == "cpu":
        state = DecodeState.allocate(predictor, batch_size=batch_size, capacity=chunks)
        return state, partial(decode_step, state)
    captured = captured_step(predictor, batch_size=batch_size, capacity=chunks)
    return captured.state, captured.replay


def rows(shape: Shape, device: str, ceilings: Ceilings | None) -> Iterator[dict[str, Any]]:
    """T = 1 and 1/2, one prompt and a batch: ours, the published algorithm, the baseline.

    The graphs of ours come last: should a profiler end the process, all times have been written. A
    row that failed holds its error; without parity it is the only one.
    """
    try:
        assert_parity(shape, device)
    except Exception as error:
        yield {"name": "parity", **failure(error)}
        return
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for name, make in _measurements(shape, device, make_calm(shape, device, dtype), ceilings):
        try:
            row = make()
        except Exception as error:
            row = {"name": name, **failure(error)}
        yield row


def _measurements(
    shape: Shape, device: str, model: EnergyTransformer, ceilings: Ceilings | None
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names of the rows, and what makes them."""

    def ours(batch_size: int, count: int, **options: Any) -> dict[str, Any]:
        row = row_of(model, "ours", shape, batch_size, device, **options)
        if ceilings is not None:
            floor_ms = chunk_floor_ms(model, count, batch_size, ceilings)
            row |= {"floor_ms": floor_ms, "share_of_floor": floor_ms / row["chunk_ms"]}
        return row

    cases = [
        (size, count, {"temperature": temperature, "num_samples": shape.num_samples})
        for size in (1, shape.batch_size)
        for temperature, count in ((1.0, 1), (0.5, shape.num_samples))
    ]
    for size, count, options in cases:
        yield "ours", partial(ours, size, count, **options)
    for _, _, options in cases[:2] if can_overlap(device) else ():  # of one prompt: most launches
        yield OVERLAPPING, partial(overlapping_row, model, shape, 1, device, **options)
    baseline = make_baseline(shape, device, model.dtype)
    for size in (1, shape.batch_size):
        yield (
            "token by token",
            partial(row_of, baseline, "token by token", shape, size, device, temperature=1.0),
        )
    rival = as_published(model)
    for size, _, options in cases:
        yield "published", partial(published_row, rival, shape, size, device, **options)
    for size, _, options in cases:
        yield "graph", partial(graph_row, model, shape, size, device, **options)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 if a row failed."""
    parser = make_parser(__doc__, RESULTS)
    arguments = parser.parse_args(argv)
    device = read_device(parser, arguments)
    shape = QUICK if arguments.tiny else REFERENCE
    found, ceilings = environment(device), measure_ceilings(device)
    path = arguments.output / f"{found['device'].lower().replace(' ', '-')}-decoding.json"
    results = {
        "environment": found, "ceilings": asdict(ceilings), "shape": asdict(shape), "rows": [],
    }  # fmt: skip
    for row in rows(shape, device, ceilings):
        results["rows"].append(row)
        print(json.dumps({**row, "longest_kernels": None}), flush=True)
        write(path, results)
    print(path)
    return int(any("error" in row for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
