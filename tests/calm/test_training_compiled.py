"""Training with compiled decoder layers: one graph, and the numbers of eager training."""

from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch.nn.parallel import DistributedDataParallel
from training_cases import Sequences, history, make_trainer, tiny_baseline, train

from calm.errors import UserError
from calm.integrity import saved_shapes
from calm.models import backbone
from calm.models.backbone import compile_layers
from calm.training.flags.arguments import parse_arguments
from calm.training.flags.recipe import Stage

pytestmark = pytest.mark.filterwarnings("ignore:::torch")  # of its compiler about itself

STEPS = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
DATA = Sequences(24)
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 5}
SAVED = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(autouse=True)
def _one_graph():
    """Whatever a test does, layers compile once."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert counters["stats"]["unique_graphs"] <= 1


@pytest.mark.long
def test_losses_checkpoints_evaluation_and_generation(tmp_path):
    """Through inductor."""
    settings = {"data": DATA, **STEPS, **EVALUATED, **SAVED}
    eager = train(tiny.model(), tmp_path / "eager", **settings)
    compiled = train(tiny.model(), tmp_path / "compiled", torch_compile=True, **settings)
    assert counters["stats"]["unique_graphs"] == 1
    for name in ("loss", "grad_norm", "eval_loss"):
        values = [torch.tensor(history(trainer, name)) for trainer in (compiled, eager)]
        torch.testing.assert_close(*values, rtol=2e-5, atol=0)

    checkpoint = tmp_path / "compiled" / "checkpoint-2"
    assert saved_shapes(checkpoint) == saved_shapes(tmp_path / "eager" / "checkpoint-2")
    resumed = make_trainer(tiny.model(), tmp_path / "compiled", torch_compile=True, **settings)
    resumed.train(str(checkpoint))
    assert history(resumed, "loss") == history(compiled, "loss")

    ids = tiny.tokens(batch=2, chunks=3)
    written = [t.model.generate(ids, max_new_tokens=8, seed=0) for t in (compiled, eager)]
    assert torch.equal(*written)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable")  # no name fits all versions
@pytest.mark.parametrize("make", [tiny.model, tiny_baseline])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_and_gradient_checkpointing(make, checkpointing, monkeypatch, tmp_path):
    """Through AOTAutograd without a compiler behind it: the same operations, the same numbers."""
    run = torch.compile(backbone._run_layer, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(backbone, "_compiled_layer", lambda: run)
    losses = []
    for is_compiled in (True, False):
        model = make()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16):
            trainer = train(model, tmp_path, data=DATA, torch_compile=is_compiled, **STEPS)
        losses.append(torch.tensor(history(trainer, "loss")))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_layer_is_one_graph_in_several_processes_too(monkeypatch):
    """Torch would cut it where a bucket of gradients is full, here after every weight."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    buckets = SimpleNamespace(bucket_bytes_cap=1)
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", buckets)
    backbone._compiled_layer.cache_clear()
    try:
        with torch._dynamo.config.patch(optimize_ddp=True):
            model = tiny.model().train()
            compile_layers(model)
            model(tiny.tokens(), seed=1)
    finally:
        backbone._compiled_layer.cache_clear()
    assert counter.frame_count == 1


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(UserError, match="Autoencoder has none"):
        compile_layers(tiny.autoencoder())
    written_out = tiny.model()
    written_out.set_attn_implementation("eager")
    with pytest.raises(UserError, match="got attn_implementation='eager'"):
        compile_layers(written_out)
    for flags, message in (
        (["--torch_compile_mode=max-autotune"], "pass --torch_compile alone"),
        (["--torch_compile_backend=inductor"], "pass --torch_compile alone"),
    ):
        with pytest.raises(UserError, match=message):
            parse_arguments(["--output_dir=x", "--use_cpu", *flags], Stage.BASELINE)


def test_a_cpu_without_a_compiler_is_one_line():
    expected = pytest.raises(UserError, match=r"needs a C\+\+ compiler, and none is found: install")
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}), expected:
        parse_arguments(["--output_dir=x", "--use_cpu", "--torch_compile"], Stage.BASELINE)
