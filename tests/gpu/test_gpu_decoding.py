"""Generation on a GPU: steps captured as graphs against the same steps one by one."""

import pytest
import torch
from transformers import LlamaConfig

from calm import AutoencoderConfig, BaselineTransformer, CALMConfig
from calm.decoding import generate, loop, warmup
from calm.decoding.engine.cuda_graph import captured_step
from calm.decoding.engine.decode_step import decode_step
from calm.decoding.sampling.methods import build_method
from calm.models import MODEL_CLASSES
from calm_kernels.backend import use_overlap
from calm_kernels.overlap import overlaps_launches
from calm_kernels.tuning import architecture

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic")

VOCAB = 500
BACKBONE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": VOCAB,
    "initializer": "fan_in", "embedding_std": 1.0, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
SAMPLINGS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 0.4},
    {"temperature": 0.5, "method": "medoid"},
    {"temperature": 0.5, "method": "noise_scale"},
]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5, 6], list(range(20, 36))]


def make_model(head="energy", dtype=torch.float32, **fields):
    torch.manual_seed(0)
    if head == "baseline":
        return BaselineTransformer(LlamaConfig(**BACKBONE, **fields)).to("cuda", dtype).eval()
    autoencoder = AutoencoderConfig(
        vocab_size=VOCAB, latent_size=16, hidden_size=32, intermediate_size=48,
        initializer="fan_in", embedding_std=1.0,
    )  # fmt: skip
    config = CALMConfig(
        **BACKBONE, **fields, latent_size=16, noise_size=16, num_mlp_layers=2, head_init="scaled",
        ae_config=autoencoder,
    )  # fmt: skip
    return MODEL_CLASSES[head](config).to("cuda", dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head", ["energy", "flow", "baseline"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_captured_step_gives_the_same_text(monkeypatch, head, sampling, dtype):
    """Step by step on a fixed cache: the same kernels on the same numbers, so equal to the bit."""
    model = make_model(head, dtype)
    options = {"max_new_tokens": 50, "num_samples": 32, "seed": [1, 2, 3], **sampling}
    captured = generate(model, PROMPTS, return_details=True, **options)

    class SingleSteps:
        def __init__(self, step):
            self.state = step.state

        def replay(self):
            return decode_step(self.state)

    monkeypatch.setattr(
        loop, "captured_step", lambda *args, **kwargs: SingleSteps(captured_step(*args, **kwargs))
    )
    single = generate(model, PROMPTS, return_details=True, **options)
    for name in ("sequences", "new_tokens", "levels", "draws", "fallbacks"):
        assert torch.equal(getattr(captured, name), getattr(single, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head", ["energy", "flow", "baseline"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_launches_that_overlap_give_the_same_text(head, sampling, dtype):
    """Equal to the bit over many steps: a kernel that read too early would give another text."""
    model = make_model(head, dtype)
    with use_overlap(True):
        if not overlaps_launches(architecture(torch.device("cuda"))):
            pytest.skip("launches do not overlap on this GPU")
    length = 100 if head == "baseline" else 400  # 100 steps
    options = {"max_new_tokens": length, "num_samples": 32, **sampling}
    texts = {}
    for is_on in (False, True):
        with use_overlap(is_on):
            texts[is_on] = [generate(model, PROMPTS, seed=[n, 2, 3], **options) for n in range(5)]
    assert len({tuple(text[0].tolist()) for text in texts[False]}) > 1
    assert all(torch.equal(plain, other) for plain, other in zip(*texts.values(), strict=True))


def test_every_replay_draws_afresh():
    model = make_model()
    options = {"max_new_tokens": 64, "temperature": 1.0}
    texts = [generate(model, PROMPTS[:1], seed=seed, **options) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    chunks = texts[0][0, 8:].view(-1, 4)
    assert len(chunks.unique(dim=0)) > 1


def test_a_sequence_does_not_depend_on_its_batch():
    model = make_model()
    options = {"max_new_tokens": 40, "temperature": 0.5, "num_samples": 32}
    together = generate(model, PROMPTS, seed=[4, 5, 6], **options)
    for row, seed in enumerate((4, 5, 6)):
        alone = generate(model, [PROMPTS[row]], seed=[seed], **options)[0]
        assert torch.equal(together[row, : len(alone)], alone)


@pytest.mark.parametrize("head", ["energy", "flow", "diffusion", "baseline"])
@pytest.mark.parametrize("sampling", SAMPLINGS[1:4], ids=lambda s: "-".join(map(str, s.values())))
def test_a_step_never_waits_for_the_device(head, sampling):
    """No synchronisation, whether the step is replayed or runs kernel by kernel."""
    method = build_method(**{"num_samples": 16, **sampling})
    predictor = make_model(head).make_predictor(method, sampling["temperature"])
    with torch.no_grad():
        captured = captured_step(predictor, batch_size=2, capacity=64)
        captured.state.cache.begin([0, 0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            decode_step(captured.state)
            captured.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_the_exact_method_runs_without_a_graph():
    result = generate(
        make_model(), PROMPTS, max_new_tokens=12, temperature=0.7, method="exact", num_samples=16,
        max_draws=64, seed=0, return_details=True,
    )  # fmt: skip
    assert result.new_tokens.tolist() == [12, 12, 12] and (result.draws > 0).all()


def test_a_graph_reads_the_weights_in_place_and_is_captured_again_when_they_move():
    model = make_model()
    options = {"temperature": 1.0, "seed": 0, "max_new_tokens": 40}
    assert warmup(model, max_length=100, temperature=1.0) > 0
    warm = generate(model, PROMPTS[:1], return_details=True, **options)
    assert warm.warmup_seconds < 0.02
    weight = model.transformer.layers[0].mlp.up_proj.weight
    weight.data[1:].mul_(-2.0)
    changed = generate(model, PROMPTS[:1], return_details=True, **options)
    assert changed.warmup_seconds < 0.02
    assert not torch.equal(changed.sequences, warm.sequences)
    weight.data = weight.data.clone()
    moved = generate(model, PROMPTS[:1], return_details=True, **options)
    assert moved.warmup_seconds > changed.warmup_seconds
    assert torch.equal(moved.sequences, changed.sequences)


def test_ended_sequences_and_streams():
    """Reading every few steps runs past an end, which no text shows; a stream sees every chunk."""
    model = make_model()
    free = generate(model, PROMPTS, max_new_tokens=60, temperature=1.0, seed=[1, 2, 3])
    model.config.eos_token_id = free[0, 30].item()
    cut = generate(model, PROMPTS, max_new_tokens=60, temperature=1.0, seed=[1, 2, 3])
    for row, ids in enumerate(PROMPTS):
        new = free[row, len(ids) : len(ids) + 60].tolist()
        end = model.config.eos_token_id
        expected = new[: new.index(end) + 1] if end in new else new
        assert cut[row, len(ids) : len(ids) + len(expected)].tolist() == expected
        assert (cut[row, len(ids) + len(expected) :] == 0).all()
