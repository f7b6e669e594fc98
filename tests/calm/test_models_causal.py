"""Training without masks: causal attention on its own, and nothing that the host waits for."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny_models import prompt, tiny_baseline, tiny_calm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import make_trainer

from calm.decoding.engine.decode_step import DecodeState, decode_step
from calm.decoding.sampling.methods import build_method

LANGUAGE_MODELS = ["energy", "diffusion", "flow", "baseline"]
HOST_READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero"}
attention = F.scaled_dot_product_attention


def language_model(kind, **fields):
    model = tiny_baseline(**fields) if kind == "baseline" else tiny_calm(kind, **fields)
    return model.train()


def training_step(model, ids):
    draws = {} if type(model).__name__ == "BaselineTransformer" else {"seed": 7}
    model(ids, labels=ids, **draws).loss.backward()


class Operations(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


class Attentions(TorchFunctionMode):
    """Keyword arguments of all attentions."""

    def __init__(self):
        super().__init__()
        self.arguments = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is attention:
            self.arguments.append(kwargs)
        return function(*args, **(kwargs or {}))


def assert_causal_without_mask(arguments):
    assert len(arguments) == 2, "one attention a layer"
    for given in arguments:
        assert given["attn_mask"] is None and given["is_causal"] is True


@pytest.mark.parametrize("kind", [*LANGUAGE_MODELS, "autoencoder"])
def test_a_training_step_reads_nothing_from_the_device(kind):
    """On the meta device, which has no values: what reads one raises, and is counted besides."""
    model = tiny.autoencoder() if kind == "autoencoder" else language_model(kind, vocab_size=31)
    model.train().to("meta")
    with Operations() as operations:
        training_step(model, tiny.tokens().to("meta"))
    assert len(operations.names) > 100
    assert not HOST_READS.intersection(operations.names)


@pytest.mark.parametrize(
    ("kind", "method", "temperature"),
    [
        ("energy", "direct", 1.0),
        ("flow", "direct", 1.0),  # diffusion takes its steps with the same code
        ("energy", "batch", 0.5),
        ("energy", "medoid", 0.5),
        ("energy", "noise_scale", 0.5),
        ("baseline", "direct", 1.0),
    ],
)
@torch.no_grad()
def test_a_decode_step_reads_nothing_from_the_device(kind, method, temperature):
    model = language_model(kind, vocab_size=31).eval().to("meta")
    chosen = build_method(method=method, temperature=temperature, num_samples=10)
    predictor = model.make_predictor(chosen, temperature)
    state = DecodeState.allocate(predictor, batch_size=2, capacity=16, is_fixed=True)
    with Operations() as operations:
        decode_step(state)
    assert len(operations.names) > 50
    assert not HOST_READS.intersection(operations.names)


def test_a_trainer_reads_no_more_from_the_device_in_more_steps(tmp_path):
    """Gradient norm, optimizer, schedule and losses that are kept, too; reading is for logs."""
    reads = []
    for steps in (1, 4):
        settings = {"max_steps": steps, "gradient_accumulation_steps": 2, "logging_steps": 100}
        model = tiny.model(targets="sample")
        trainer = make_trainer(
            model, tmp_path, sequences=64, per_device_train_batch_size=2, **settings
        )
        with Operations() as operations:
            trainer.train()
        reads.append(sum(name in HOST_READS for name in operations.names))
        assert operations.names.count("aten::_fused_adamw_") == 2 * steps  # two groups of weights
    assert reads[0] == reads[1] > 0


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable")  # no name fits all versions
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_attention_is_causal_without_a_mask(kind, checkpointing):
    model = language_model(kind)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = prompt(2, 20, vocab_size=3)
    with Attentions() as attentions:
        training_step(model, ids)
    assert_causal_without_mask(attentions.arguments[:2])  # checkpointing runs them again


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_compiled_backbone_is_one_graph_without_a_mask(kind):
    """And it computes what the eager one does, as does attention with a mask, written out."""
    model, graphs = language_model(kind), []
    backbone = model.model if kind == "baseline" else model.transformer
    inputs = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))

    def keep_graph(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(backbone, backend=keep_graph, fullgraph=True)
    hidden = compiled(inputs_embeds=inputs, use_cache=False).last_hidden_state
    (graph,) = graphs
    calls = [node.kwargs for node in graph.graph.nodes if node.target is attention]
    assert_causal_without_mask(calls)
    plain = backbone(inputs_embeds=inputs, use_cache=False).last_hidden_state
    assert torch.equal(hidden, plain)
    model.set_attn_implementation("eager")
    written_out = backbone(inputs_embeds=inputs, use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden, written_out)
    hidden.sum().backward()
    assert all(weight.grad is not None for weight in backbone.layers.parameters())


def test_masks_of_the_user_still_count():
    """Padding on the left, packed rows, and hidden states on request go through transformers."""
    model, ids = tiny_baseline(vocab_size=31), prompt(2, 12, vocab_size=31)
    plain = model.model(ids, use_cache=False).last_hidden_state
    alone = model.model(ids[:1, 4:], use_cache=False).last_hidden_state
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(padded[:1, 4:], alone)
    torch.testing.assert_close(padded[1], plain[1])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 4] = -100  # in a row of its own, this token is the first and is not predicted
    loss = model(ids[:1], attention_mask=mask[:1], labels=labels[:1]).loss
    torch.testing.assert_close(loss, model(ids[:1, 4:], labels=ids[:1, 4:]).loss)

    restart = torch.cat([torch.arange(4), torch.arange(8)])[None].expand(2, -1)
    packed = model.model(ids, position_ids=restart, use_cache=False).last_hidden_state
    torch.testing.assert_close(packed[:1, 4:], alone)

    for ask in ("argument", "configuration"):
        model.config.output_hidden_states = ask == "configuration"
        asked = {"output_hidden_states": True} if ask == "argument" else {}
        states = model.model(ids, use_cache=False, **asked).hidden_states
        assert len(states) == 3
        torch.testing.assert_close(states[-1], plain)


def test_a_backbone_takes_tokens_or_embeddings():
    backbone = tiny_baseline().model
    for wrong in ({}, {"input_ids": prompt(1, 4), "inputs_embeds": torch.zeros(1, 4, 32)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            backbone(**wrong, use_cache=False)
