"""Launches of a decode step by part, and its time, modelled from launches, bytes and operations.

An H200 reads 4.3 TB/s and multiplies bfloat16 at 790 TFLOP/s; a kernel of a replayed graph costs
1.3 µs beside what it reads. The floor of a part is the longer of its bytes and its operations; its
modelled time adds the launches. Bytes are those of the weights and of the cache that attention
reads. Activations are not counted.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.counting import REST, Launches, OnCuda, restored
from benchmarks.gpu.decoding import REFERENCE, Shape, make_baseline, make_calm
from benchmarks.tables import table
from calm.decoding.engine import backbone
from calm.decoding.engine.decode_step import DecodeState, decode_step
from calm.decoding.sampling.methods import build_method

__all__ = [
    "BEFORE", "CASES", "DecodeCase", "count_decoding", "decode_table", "meta_models",
    "part_weights",
]  # fmt: skip

LAUNCH_US, BANDWIDTH, RATE = 1.3, 4.3e12, 0.79e15
CONTEXT = 2048  # tokens; half of it is filled
CHUNKS, TOKENS = "decoder, chunks", "decoder, tokens"
LAYERS, CANDIDATES = "layers", 200
# Parts that run once for each draw, and whether they do so for each of its tokens.
PER_DRAW = {"head": False, CHUNKS: False, TOKENS: True, "output layer": True}

# Launches of parts before layers were fused, with few rows. What launches more than that, or is
# missing, has not changed.
BEFORE: dict[str, dict[str, int]] = {
    "CALM-M": {
        REST: 15, LAYERS: 16 * 22, "rest of the backbone": 11, "head": 26, CHUNKS: 9, TOKENS: 8,
    },
    "baseline": {REST: 190, LAYERS: 12 * 22, "rest of the backbone": 11},
}  # fmt: skip
VOTE = 3  # more in the rest, where draws vote


@dataclass(frozen=True)
class DecodeCase:
    """A decode step that is counted: of CALM-M with N draws a chunk, or of the token baseline."""

    model: str
    batch_size: int
    num_draws: int = 1

    @property
    def title(self) -> str:
        """As tables and results name it."""
        sampling = f", T = 1/2, N = {self.num_draws}" if self.num_draws > 1 else ", T = 1"
        return f"decode step, {self.model}{sampling * (self.model == 'CALM-M')}" + (
            f", batch {self.batch_size}" * (self.batch_size > 1)
        )

    def rows(self, part: str, shape: Shape) -> int:
        """Rows that the weights of a part are multiplied with."""
        if self.model == "baseline" or part not in PER_DRAW:
            return self.batch_size
        return self.batch_size * self.num_draws * (shape.patch_size if PER_DRAW[part] else 1)

    def cache_bytes(self, shape: Shape, *, is_whole: bool) -> int:
        """What attention reads of the cache in bfloat16: the filled half, or all of it."""
        width, layers, step = shape.hidden_size, shape.num_layers, shape.patch_size
        if self.model == "baseline":
            width, layers, step = shape.baseline_hidden_size, shape.baseline_layers, 1
        columns = CONTEXT // step // (1 if is_whole else 2)
        return 4 * self.batch_size * columns * width * layers


CASES = [
    DecodeCase(model, batch, draws)
    for batch in (1, 64)
    for model, draws in (("CALM-M", 1), ("CALM-M", CANDIDATES), ("baseline", 1))
]


@torch.no_grad()
def count_decoding(model: Any, case: DecodeCase, stub: Any) -> Launches:
    """The second step of a captured decode step."""
    is_plain, count = case.num_draws == 1, max(case.num_draws, 2)
    temperature = 1.0 if is_plain else 0.5
    method = build_method(
        method="direct" if is_plain else "batch", temperature=temperature, num_samples=count
    )
    predictor = model.make_predictor(method, temperature)
    state = DecodeState.allocate(
        predictor, batch_size=case.batch_size, capacity=1024, is_fixed=True
    )
    decode_step(state)
    launches = Launches(stub)
    launches.watch(state.backbone, "decode_step", "rest of the backbone")
    with restored(backbone, "fused_layer"), _unwatched(model):
        launches.watch(backbone, "fused_layer", LAYERS)
        for owner, name, part in _parts(model):
            launches.watch(owner, name, part)
        with launches, OnCuda(launches):
            decode_step(state)
    return launches


def _parts(model: Any) -> list[tuple[Any, str, str]]:
    """What is watched of a model, and its part."""
    if not hasattr(model, "ae_model"):
        return [(model.lm_head, "forward", "output layer")]
    decoder = model.ae_model.decoder
    return [
        (model, "embed_patches", "embedding"), (model.generative_head, "sample", "head"),
        (decoder, "expand", CHUNKS), (decoder, "finish", TOKENS),
        (decoder, "tokens", "output layer"),
    ]  # fmt: skip


@contextmanager
def _unwatched(model: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for owner, name, _ in _parts(model):
            vars(owner).pop(name, None)


def part_weights(model: Any) -> dict[str, int]:
    """Elements of the weights that each part of a decode step reads once."""
    if not hasattr(model, "ae_model"):
        parts = {LAYERS: [model.model.layers], "output layer": [model.lm_head]}
    else:
        decoder = model.ae_model.decoder
        middle = len(decoder.decoder_layers) // 2
        chunks, tokens = decoder.decoder_layers[:middle], decoder.decoder_layers[middle:]
        parts = {
            "embedding": [model.embed_proj], LAYERS: [model.transformer.layers],
            "head": [model.generative_head],
            CHUNKS: [decoder.latent_to_hidden, chunks, decoder.expand_layer], TOKENS: [tokens],
            "output layer": [model.ae_model.encoder.embed_tokens],
        }  # fmt: skip
    return {
        part: sum(parameter.numel() for module in modules for parameter in module.parameters())
        for part, modules in parts.items()
    }


def meta_models() -> dict[str, Any]:
    """Both models at full size, without memory, by the names of `DecodeCase`."""
    with torch.device("meta"):
        calm = make_calm(REFERENCE, "meta", torch.bfloat16)
        return {"CALM-M": calm, "baseline": make_baseline(REFERENCE, "meta", torch.bfloat16)}


def decode_table(
    case: DecodeCase, counts: Mapping[str, int], weights: Mapping[str, int], shape: Shape
) -> str:
    """Launches, bytes, floor and modelled time of each part, before and now.

    Args:
        case: which step.
        counts: launches of each part.
        weights: elements of the weights that each part reads.
        shape: sizes of both models.
    """
    rows, sums = [], [0.0] * 6
    before = BEFORE[case.model]
    for part in dict.fromkeys([*counts, *weights]):
        now = counts.get(part, 0)
        has_vote = part == REST and case.num_draws > 1
        was = max(now, before.get(part, 0) + VOTE * has_vote)
        has_cache = part == LAYERS
        read, was_read = (
            2 * weights.get(part, 0) + has_cache * case.cache_bytes(shape, is_whole=is_whole)
            for is_whole in (False, True)
        )
        operations = 2 * weights.get(part, 0) * case.rows(part, shape) / RATE
        floor, was_floor = (max(count / BANDWIDTH, operations) * 1e6 for count in (read, was_read))
        cells = [was, now, read / 1e6, floor, was_floor + LAUNCH_US * was, floor + LAUNCH_US * now]
        sums = [total + cell for total, cell in zip(sums, cells, strict=True)]
        rows.append(_row(part, cells))
    times = ("floor, µs", "modelled before, µs", "now")
    return table(
        (case.title, "launches before", "now", "MB", *times), [*rows, _row("**all**", sums)]
    )


def _row(name: str, cells: list[float]) -> list[str]:
    was, now, read, floor, was_time, time = cells
    numbers = [f"{was:.0f}", f"{now:.0f}", f"{read:.1f}"]
    return [name, *numbers, f"{floor:.1f}", f"{was_time:.0f}", f"{time:.0f}"]
