"""Training terms: a readout of tokens, and a score of tokens through the decoder."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from training_cases import MODELS, TERMS, UnevenSequences, history, make_trainer, train

from calm import EnergyTransformer
from calm.integrity import find_damage
from calm.models.loading import load_checked
from calm.models.token_score import token_scores

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "sequences": 16}


def trained_readout(**fields):
    """A model whose readout is no longer zero."""
    model = tiny.model(**{**TERMS, **fields})
    torch.nn.init.normal_(model.token_readout.slots.weight, std=0.3)
    return model.train()


def uneven():
    data = UnevenSequences(8)
    return torch.from_numpy(data.ids), torch.from_numpy(data.labels)


class TestLoss:
    def test_off_there_is_nothing(self):
        """Weights that both have start at the same values."""
        off, on = tiny.model(), tiny.model(**TERMS)
        weights, others = dict(off.named_parameters()), dict(on.named_parameters())
        assert others.keys() - weights.keys() == {"token_readout.slots.weight"}
        assert all(weight.equal(others[name]) for name, weight in weights.items())
        causal = dict(tiny.model(**TERMS, token_readout="causal").named_parameters())
        assert all(weight.equal(causal[name]) for name, weight in weights.items())
        ids, labels = uneven()
        output = off.train()(ids, labels, seed=3, loss_counts=off.loss_counts(labels))
        assert off.loss_counts(labels).shape == (1,)
        assert output.terms.keys() == {"loss", "fidelity", "diversity"}
        assert output.token_loss is None and output.token_score is None

    def test_it_is_the_sum_of_its_terms(self):
        model, (ids, labels) = trained_readout(), uneven()
        output = model(ids, labels, seed=3)
        head = model.eval()(ids, labels, seed=3)
        energy = (output.fidelity - output.diversity).item()
        assert head.loss.item() == pytest.approx(energy, rel=1e-6)
        expected = head.loss + 0.3 * output.token_loss - 2.0 * output.token_score
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert head.token_loss.item() == pytest.approx(output.token_loss.item(), rel=1e-6)
        assert head.token_score is None

    @pytest.mark.parametrize("head", ["energy", "diffusion", "flow"])
    def test_the_readout_as_written(self, head):
        """Cross-entropy of the labels that count in the chunks that count, of every head."""
        torch.manual_seed(0)
        model = tiny.model(head, token_loss_weight=0.3).train()
        assert model(*uneven(), seed=3).token_loss.item() == pytest.approx(math.log(31))
        torch.nn.init.normal_(model.token_readout.slots.weight, std=0.3)
        ids, labels = uneven()
        labels[0, 4] = -100  # the second chunk's first label: none of it counts
        hidden = model(ids[:, :-4]).last_hidden_state
        slots = F.linear(hidden, model.token_readout.slots.weight).unflatten(-1, (4, 16))
        logits = slots @ model.transformer.embed_tokens.weight.T
        targets = labels[:, 4:].reshape(8, 3, 4)
        targets = torch.where(targets[..., :1] == -100, -100, targets)
        expected = F.cross_entropy(logits.flatten(0, 2), targets.flatten())
        found = model(ids, labels, seed=3).token_loss
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        assert model.loss_counts(labels).tolist() == [
            (targets[..., 0] != -100).sum(), (targets != -100).sum(),
        ]  # fmt: skip

    def test_slot_causal_as_written(self):
        """Cross-entropy of each label given those before it; an input token where there is none."""
        torch.manual_seed(0)
        model = tiny.model(token_loss_weight=0.3, token_readout="causal").train()
        assert model(*uneven(), seed=3).token_loss.item() == pytest.approx(math.log(31))
        readout, table = model.token_readout, model.transformer.embed_tokens.weight
        assert not readout.down.weight.any()
        for weight in readout.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        ids, labels = uneven()
        labels[0, 6] = -100  # the third token of the second chunk
        hidden = model(ids[:, :-4]).last_hidden_state
        targets = labels[:, 4:].reshape(8, 3, 4)
        tokens = torch.where(targets == -100, ids[:, 4:].reshape(8, 3, 4), targets)
        logits = []
        for slot in range(4):
            x = hidden @ readout.slots.weight[16 * slot : 16 * (slot + 1)].T
            for before in range(slot):
                x = x + table[tokens[..., before]] @ readout.earlier[slot - before - 1].weight.T
            normed = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * readout.norm.weight
            gated = F.silu(normed @ readout.gate.weight.T) * (normed @ readout.up.weight.T)
            x = x + gated @ readout.down.weight.T
            logits.append(x @ table.T)
        logits = torch.stack(logits, dim=2)
        expected = F.cross_entropy(logits.flatten(0, 2), targets.flatten())
        assert model(ids, labels, seed=3).token_loss.item() == pytest.approx(expected.item())

    def test_the_score_takes_the_first_draws_of_the_energy_loss(self):
        model, (ids, labels) = trained_readout(token_score_samples=3), uneven()
        with torch.no_grad():
            found = model(ids, labels, seed=3)
            hidden = model(ids[:, :-4]).last_hidden_state
            draws = model.generative_head.sample(hidden, num_samples=4, seed=3)[:3]
            targets = labels[:, 4:].reshape(8, 3, 4)
            targets = torch.where(targets[..., :1] == -100, -100, targets)
            scores = token_scores(model.ae_model.decoder, draws, targets)
        chunks = (targets[..., 0] != -100).sum()
        assert found.token_score.item() == pytest.approx((scores.sum() / chunks).item(), rel=1e-5)

    def test_gradients_reach_all_but_the_autoencoder(self):
        """Of the score alone: head and backbone, through the draws."""
        model, (ids, labels) = trained_readout(), uneven()
        model(ids, labels, seed=3).token_score.backward()
        for name, weight in model.named_parameters():
            is_reached = weight.grad is not None and bool(weight.grad.any())
            assert is_reached != name.startswith(("ae_model.", "token_readout.")), name

    def test_it_starts_with_the_share_of_the_training(self):
        model, (ids, labels) = trained_readout(), uneven()
        outputs = [model(ids, labels, seed=3, progress=p) for p in (0.0, 0.49, 0.5, 1.0)]
        assert [output.token_score is not None for output in outputs] == [False, False, True, True]
        assert outputs[0].loss == outputs[1].loss != outputs[2].loss == outputs[3].loss


class TestRun:
    def test_parts_are_logged_and_the_score_starts_where_it_should(self, tmp_path):
        """In training and, except for the score, in evaluation, whose loss is that of the head."""
        trainer = train(MODELS["terms"](), tmp_path, max_steps=4, sequences=32)
        steps = [entry["step"] for entry in trainer.state.log_history if "token_score" in entry]
        assert steps == [3, 4] and len(history(trainer, "token_loss")) == 4
        for entry in trainer.state.log_history[:4]:
            expected = entry["fidelity"] - entry["diversity"] + 0.3 * entry["token_loss"]
            expected -= 2.0 * entry.get("token_score", 0.0)
            assert entry["loss"] == pytest.approx(expected, rel=1e-5)
        metrics = trainer.evaluate()
        config = trainer.model.config
        config.token_loss_weight, config.token_score_weight = 7.0, 7.0
        assert trainer.evaluate()["eval_loss"] == metrics["eval_loss"]
        assert metrics["eval_token_loss"] < 2 * math.log(31)
        assert "eval_token_score" not in metrics and "eval_spread_ratio" in metrics

    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_it_resumes_to_the_bit_across_the_start(self, tmp_path, step):
        whole = train(MODELS["terms"](), tmp_path, **SAVING)
        again = make_trainer(MODELS["terms"](), tmp_path, **SAVING)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for name in ("loss", "grad_norm", "token_loss", "token_score"):
            assert history(again, name) == history(whole, name), name
        for left, right in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert left.equal(right)

    def test_by_time_it_starts_with_the_share_of_the_time(self, tmp_path):
        trainer = make_trainer(MODELS["terms"](), tmp_path, max_train_seconds=100.0)
        for elapsed in (0.0, 49.0, 51.0):
            trainer.clock.elapsed = elapsed
            assert trainer._progress() == {"progress": elapsed / 100}


class TestSaved:
    def test_the_final_model_never_had_a_readout(self, tmp_path):
        """Checkpoints have it; the trained model generates as before."""
        trainer = train(MODELS["terms"](), tmp_path / "run", **SAVING)
        trainer.save_model()
        for name, has_readout in (("run", False), ("run/checkpoint-4", True)):
            folder = tmp_path / name
            assert find_damage(folder) is None
            model = load_checked(EnergyTransformer, str(folder), "model")  # no weight too many
            assert (model.token_readout is not None) == has_readout
            assert model.config.token_loss_weight == (0.3 if has_readout else 0)
            ids = tiny.tokens(batch=2)
            found = model.eval().generate(ids, max_new_tokens=8, seed=4)
            assert found.equal(trainer.model.eval().generate(ids, max_new_tokens=8, seed=4))
        assert trainer.model.config.token_loss_weight == 0.3  # the model itself is as it was
        assert "token_readout.slots.weight" in trainer.model.state_dict()
        trainer.model.save_pretrained(tmp_path / "again")
        assert EnergyTransformer.from_pretrained(tmp_path / "again").token_readout is not None

    def test_it_can_be_kept(self, tmp_path):
        model = tiny.model(token_loss_weight=0.3, keep_token_readout=True)
        trainer = train(model, tmp_path)
        trainer.save_model()
        loaded = load_checked(EnergyTransformer, str(tmp_path), "model")
        kept = model.token_readout.slots.weight
        assert kept.any() and loaded.token_readout.slots.weight.equal(kept)
