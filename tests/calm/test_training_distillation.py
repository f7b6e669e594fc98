"""Training of a distilled model: a whole job, resuming it, what it refuses."""

import json
import shutil

import datasets
import pytest
import tiny
from cli_cases import error_of
from tiny_models import tiny_baseline
from training_cases import MAIN, Sequences, flags, history, logs, make_trainer, train, write_corpus

from calm import EnergyTransformer
from calm.data.tokenizer import byte_tokenizer, train_bpe_tokenizer
from calm.training.flags.recipe import Stage, load_recipe, recipe_stages
from calm.training.objectives.distilling import DistillationArguments, DistillationObjective
from calm.training.objectives.teachers import Documents, TokenTeacher

DOCUMENTS = Documents(None, 0)
BYTES = 259


def student(**options):
    """A model that learns from a teacher, as the program makes it."""
    model = tiny.model()
    teacher = TokenTeacher(tiny_baseline(vocab_size=tiny.VOCAB), DOCUMENTS)
    arguments = DistillationArguments(**{"teacher_draws": 2, **options})
    model.objective = DistillationObjective(arguments, teacher, DOCUMENTS)
    return model


class TestRun:
    @pytest.mark.parametrize(
        "options", [{"data_weight": 0.5}, {"contexts": "student"}], ids=["data", "student"]
    )
    def test_a_resumed_run_is_that_which_never_stopped(self, options, tmp_path):
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "sequences": 16}
        whole = train(student(**options), tmp_path, **saving)
        again = make_trainer(student(**options), tmp_path, **saving)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        for name in ("loss", "grad_norm", "fidelity"):
            assert history(again, name) == history(whole, name), name
        for left, right in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert left.equal(right)

    def test_the_score_against_draws_after_other_texts_improves(self, tmp_path):
        settings = {"max_steps": 20, "learning_rate": 1e-2, "sequences": 64}
        trainer = make_trainer(student(), tmp_path, lr_scheduler_type="constant", **settings)
        trainer.eval_dataset = Sequences(72)
        trainer.eval_dataset.ids = trainer.eval_dataset.ids[64:]  # that it does not learn from
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        assert after["eval_loss"] < before["eval_loss"] - 0.2
        assert trainer.evaluate()["eval_loss"] == after["eval_loss"]
        assert 0 <= after["eval_brier_lm"] <= 100


def save(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)


def calm_of(patch_size, **fields):
    special = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    return tiny.model(vocab_size=BYTES, patch_size=patch_size, **special, **fields)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of a student, of teachers, of what can be neither, and of a text."""
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("models")
    write_corpus(folder, 30)
    readout = {"token_loss_weight": 1.0, "token_readout": "causal", "keep_token_readout": True}
    save(folder / "student", calm_of(4, **readout))
    save(folder / "flow", tiny.model("flow", vocab_size=BYTES))
    save(folder / "baseline", tiny_baseline(vocab_size=BYTES))
    for size in (2, 3):
        save(folder / f"calm{size}", calm_of(size))
    save(folder / "starting", calm_of(2, has_start_patch=True))
    save(folder / "autoencoder", tiny.autoencoder(vocab_size=BYTES))
    save(folder / "large", tiny_baseline(vocab_size=BYTES + 5))
    save(folder / "short", tiny_baseline(vocab_size=BYTES, max_position_embeddings=16))
    merged = train_bpe_tokenizer(["the cat sat on the mat"] * 9, BYTES + 1)
    save(folder / "merged", tiny_baseline(vocab_size=BYTES + 1), merged)
    moved = train_bpe_tokenizer(["the cat"], BYTES)
    save(folder / "moved", tiny_baseline(vocab_size=BYTES), moved)
    tiny_baseline(vocab_size=BYTES).save_pretrained(folder / "mute")
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "bert"}')
    return folder


def distill(models, folder, *extra, teacher="baseline"):
    words = (
        f"--model_name_or_path={models / 'student'}", "--teacher_draws=2",
        f"--teacher_name_or_path={models / teacher}", *extra,
    )  # fmt: skip
    text = str(models / "text.jsonl")
    return MAIN["distillation"](flags(folder, "distillation", *words, text=text))


class TestProgram:
    @pytest.mark.parametrize("teacher", ["baseline", "calm2"])
    def test_from_a_trained_model_and_a_teacher_to_a_student(self, teacher, models, tmp_path):
        folder = tmp_path / "distillation"
        last = f"--max_steps={4 if teacher == 'baseline' else 1}"
        assert distill(models, tmp_path, "--do_train", "--do_eval", last, teacher=teacher) == 0
        old = EnergyTransformer.from_pretrained(models / "student").eval()
        new = EnergyTransformer.from_pretrained(folder).eval()
        assert old.token_readout is not None and new.token_readout is None
        for name, weight in new.state_dict().items():
            assert weight.equal(old.state_dict()[name]) == name.startswith("ae_model."), name
        protocol = json.loads((folder / "protocol.json").read_text())
        assert protocol["stage"] == "distillation" and protocol["teacher"]
        assert protocol["options"] == {"teacher_draws": 2, "data_weight": 0.0, "contexts": "data"}
        results = json.loads((folder / "eval_results.json").read_text())
        assert {"eval_loss", "eval_brier_lm", "eval_spread_ratio"} <= results.keys()
        assert "has learned from draws" in (folder / "README.md").read_text()
        if teacher == "baseline":
            weights, losses = (folder / "model.safetensors").read_bytes(), logs(folder)
            shutil.rmtree(folder / "checkpoint-4")  # stopped, and started again
            assert distill(models, tmp_path) == 0
            assert (folder / "model.safetensors").read_bytes() == weights and logs(folder) == losses

    def test_another_teacher_is_another_run(self, models, tmp_path, capsys):
        few = ("--max_steps=1", "--save_steps=1", "--contexts=student")
        assert distill(models, tmp_path, *few) == 0
        assert distill(models, tmp_path, *few, teacher="calm2") == 2
        assert "teacher was" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "teacher", "part"),
        [
            (["--teacher_name_or_path="], "", "teacher_name_or_path is needed"),
            ([], "missing", "cannot load"),
            ([], "autoencoder", "autoencoder holds an autoencoder"),
            ([], "other", "must be a language model, a CALM or a token baseline; "),
            ([], "merged", "merged differs from that of the student, "),
            ([], "merged", "student: it has 260 entries, the student's 259"),
            ([], "moved", "the token 'Ā' is 191 there and 0 here"),
            ([], "mute", "mute holds no tokenizer"),
            ([], "large", "has a vocabulary of 264 tokens, the student one of 259"),
            ([], "short", "short reads 16 tokens, and a block has 32"),
            ([], "calm3", "draws chunks of 3 tokens, which do not fill the student's chunks of 4"),
            ([], "starting", "has token 256, the student's None"),
            (["--data_weight=1"], "baseline", "data_weight must lie in [0, 1)"),
            (["--data_weight=nan"], "baseline", "data_weight"),
            (["--teacher_draws=0"], "baseline", "teacher_draws must be at least 1"),
            (["--teacher_draws=100000000000"], "baseline", "teacher_draws=100000000000"),
            (["--contexts=web"], "baseline", "contexts must be data or student, got 'web'"),
            (["--contexts=student", "--data_weight=0.5"], "baseline", "must be 0 with contexts"),
            (["--contexts=student", "--block_size=4"], "baseline", "block_size must be at least 8"),
            (["--config_overrides=beta=1.5"], "baseline", "describes a new model"),
            (["--metric_for_best_model=kl"], "baseline", "must be one of loss, brier1"),
        ],
    )  # fmt: skip
    def test_mistakes(self, words, teacher, part, models, tmp_path, capsys):
        assert distill(models, tmp_path, *words, teacher=teacher) == 2
        assert part in capsys.readouterr().err

    def test_another_head(self, models, tmp_path, capsys):
        assert distill(models, tmp_path, f"--model_name_or_path={models / 'flow'}") == 2
        assert "flow has a flow head; an energy head alone" in capsys.readouterr().err

    def test_a_stage_without_a_teacher(self, capsys):
        message = error_of(capsys, "train", "--teacher_name_or_path=runs/baseline")
        assert "belongs to calm train-ae and calm distill, not to the calm" in message

    def test_recipes_of_the_demo_have_the_stage(self):
        for name in ("tiny", "desk", "demo"):
            assert Stage.DISTILLATION in recipe_stages(name)
            assert load_recipe(name, Stage.DISTILLATION)["tokenizer_name"] == "bytes"
