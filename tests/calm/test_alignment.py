"""Latents aligned to a token model: the term, who learns from it, what is saved and counted."""

import pytest
import tiny
import torch
from cli_cases import error_of
from safetensors.torch import load_file
from tiny_models import tiny_baseline
from torch.utils.flop_counter import FlopCounterMode
from training_cases import MAIN, SIZES, flags, history, logs, make_trainer, train, write_corpus

from calm import Autoencoder
from calm.errors import UserError
from calm.flops import flops_of
from calm.models.loading import load_checked

FIELDS = {"alignment_weight": 0.7, "initializer_range": 0.2}
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "sequences": 16}


def teacher(layers=3):
    return tiny_baseline(vocab_size=tiny.VOCAB, num_hidden_layers=layers)


def aligned(**fields):
    model = tiny.autoencoder(**{**FIELDS, **fields})
    torch.manual_seed(7)
    model.attach_teacher(teacher())
    return model.train()


def test_the_loss_as_written():
    """The state after two of three layers, at each chunk's last token; chunks that count."""
    ids = tiny.tokens()
    labels = ids.clone()
    labels[1, 4:] = -100
    model = aligned(ae_dropout=0)
    with torch.no_grad():
        read = teacher().model(ids, output_hidden_states=True, use_cache=False)
        wanted = read.hidden_states[2][:, 3::4]
        mean = model.encoder(ids).chunk(2, -1)[0]
        projected = mean @ model.alignment.projection.weight.T + model.alignment.projection.bias
        cosine = (projected * wanted).sum(-1) / (projected.norm(dim=-1) * wanted.norm(dim=-1))
        gap = (1 - cosine)[labels[:, ::4] != -100].mean()
    output = model(ids, labels, seed=1)
    assert output.alignment.item() == pytest.approx(gap.item(), rel=1e-5)
    plain = tiny.autoencoder(**{**FIELDS, "alignment_weight": 0}, ae_dropout=0).train()
    without = plain(ids, labels, seed=1)
    assert without.alignment is None
    assert output.loss.item() == pytest.approx((without.loss + 0.7 * gap).item(), rel=1e-5)
    evaluated = model.eval()(ids, labels, seed=1)
    assert evaluated.alignment is None and evaluated.loss.equal(
        plain.eval()(ids, labels, seed=1).loss
    )


def test_the_teacher_reads_whole_tokens_and_learns_nothing():
    """The encoder's input has dropped tokens; only the encoder and the projection learn."""
    model, ids = aligned(ae_dropout=0.5), tiny.tokens()
    read = []
    model.alignment.teacher.embed_tokens.register_forward_hook(lambda *given: read.append(given[1]))
    output = model(ids, ids, seed=1)
    output.loss.backward()
    assert read[0][0].equal(ids)
    assert all(weight.grad is None for weight in model.alignment.teacher.parameters())
    assert model.alignment.projection.weight.grad.any()
    term = model.alignment(model.encoder(ids).chunk(2, -1)[0], ids).sum()
    gradient = torch.autograd.grad(term, model.encoder.embed_tokens.weight)[0]
    assert gradient.any() and not any(name.startswith("alignment.") and "projection" not in name
                                      for name in model.state_dict())  # fmt: skip


def test_the_teacher_goes_where_the_model_goes():
    model, ids = aligned().double(), tiny.tokens()
    assert model.alignment.teacher.embed_tokens.weight.dtype == torch.float64
    assert torch.isfinite(model(ids, ids, seed=1).alignment)
    assert not model.alignment.teacher.training


def test_it_moves_no_draw_and_parts_of_a_batch_add_up():
    model, ids, other = aligned(), tiny.tokens(batch=4), teacher()
    before = torch.get_rng_state()
    model.attach_teacher(other)
    assert torch.get_rng_state().equal(before)
    counts = model.loss_counts(ids)
    whole = model(ids, ids, seed=3, loss_counts=counts)
    parts = [model(ids[i : i + 2], ids[i : i + 2], seed=3, first_row=i, loss_counts=counts).loss
             for i in (0, 2)]  # fmt: skip
    assert torch.stack(parts).sum().item() == pytest.approx(whole.loss.item(), rel=1e-5)
    assert whole.terms["alignment"].counts.sum() == 20


def test_mistakes():
    ids = tiny.tokens()
    with pytest.raises(UserError, match=r"alignment_weight=0\.7 needs a teacher"):
        tiny.autoencoder(**FIELDS).train()(ids, ids)
    with pytest.raises(UserError, match=r"the autoencoder's 31 tokens, got a model of 9"):
        tiny.autoencoder(**FIELDS).attach_teacher(tiny_baseline(vocab_size=9))


def test_checkpoints_hold_the_projection_and_the_trained_model_never_had_it(tmp_path):
    trainer = train(aligned(), tmp_path / "run", **SAVING)
    trainer.save_model()
    assert len(history(trainer, "alignment")) == 4
    projection = {f"alignment.projection.{part}" for part in ("weight", "bias")}
    saved = [set(load_file(tmp_path / name / "model.safetensors"))
             for name in ("run", "run/checkpoint-4")]  # fmt: skip
    assert saved[1] - saved[0] == projection
    for name, weight in (("run", 0), ("run/checkpoint-4", 0.7)):
        loaded = load_checked(Autoencoder, str(tmp_path / name), "model")
        assert loaded.config.alignment_weight == weight and loaded.alignment is None
    assert trainer.model.config.alignment_weight == 0.7
    resumed = make_trainer(aligned(), tmp_path / "other", **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert history(resumed, "alignment") == history(trainer, "alignment")
    weights = trainer.model.state_dict()
    assert all(weights[name].equal(value) for name, value in resumed.model.state_dict().items())


def test_its_operations_by_hand_and_as_counted():
    """Two layers of width 32 read 20 tokens; latents of 8 to 32."""
    model = aligned()
    model.alignment.teacher.set_attn_implementation("eager")
    plain, flops = flops_of(tiny.autoencoder()), flops_of(model, context=5)
    assert flops.projection == 2 * 8 * 32
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert flops.teacher == 4 * (2 * layers + 4 * 20 * 32 * 2)
    assert flops.training_terms() == {"alignment": (3 * flops.projection + flops.teacher) / 4}
    assert flops.training() == plain.training() + flops.training_terms()["alignment"]
    assert flops.inference() == plain.inference() and plain.training_terms() == {}
    mean = torch.zeros(2, 5, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model.alignment(mean, tiny.tokens(batch=2)).sum().backward()
    with FlopCounterMode(display=False) as rotation:  # which older transformers compute by matmul
        model.alignment.teacher.rotary_emb(torch.zeros(1, 20, 32), torch.arange(20)[None])
    expected = 40 * flops.training_terms()["alignment"] + rotation.get_total_flops()
    assert counter.get_total_flops() == expected


def test_a_job_with_a_teacher(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text = write_corpus(tmp_path)
    assert MAIN["baseline"](flags(tmp_path, "baseline", "--max_steps=2", text=text)) == 0
    named = f"--teacher_name_or_path={tmp_path / 'baseline'}"
    weight = f"--config_overrides={SIZES['autoencoder']},alignment_weight=0.5"
    words = flags(tmp_path, "autoencoder", text=text)
    assert MAIN["autoencoder"]([*words, named, weight]) == 0
    losses = logs(tmp_path / "autoencoder", "alignment")
    assert len(losses) == 4 and losses[-1] < losses[0]
    for extra in (named, weight):
        assert MAIN["autoencoder"]([*words, extra, "--overwrite_output_dir"]) == 2
        assert "teacher_name_or_path and alignment_weight go together" in capsys.readouterr().err
    plan = tmp_path / "recipe.yaml"
    plan.write_text("autoencoder:\n  config_overrides: {alignment_weight: 0.5, vocab_size: 259}\n")
    assert "alignment_weight needs teacher_name_or_path" in error_of(capsys, "plan", plan)
