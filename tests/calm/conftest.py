"""Fixtures of the tests of `calm`."""

import datasets
import pytest
from cli_cases import EOS, PAD, TEXT
from tiny_models import tiny_baseline, tiny_calm

from calm import Autoencoder, pretrained
from calm.data.tokenizer import BYTE_VOCAB_SIZE, byte_tokenizer


def save(model, folder, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def package(folders, tmp_path_factory, monkeypatch):
    """Tiny models as those that come with the package."""
    root = tmp_path_factory.mktemp("package")
    for name, kind in zip(pretrained.PRETRAINED, ("readout", "baseline"), strict=True):
        (root / name).symlink_to(folders / kind)
    monkeypatch.setattr(pretrained, "FOLDER", root)


@pytest.fixture(scope="session")
def trained_calm(tmp_path_factory):
    """Folder of a CALM that was trained for two steps, ``calm``, and of its text."""
    from training_cases import MAIN, flags, write_corpus  # imports all of training

    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("trained")
    text = write_corpus(folder, 30)
    few = ("--max_steps=2", "--save_strategy=no")
    assert MAIN["autoencoder"](flags(folder, "autoencoder", *few, text=text)) == 0
    ae_flag = f"--ae_name_or_path={folder / 'autoencoder'}"
    assert MAIN["calm"](flags(folder, "calm", ae_flag, *few, text=text)) == 0
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A CALM, one with a readout, a baseline, an autoencoder, a byte tokenizer, and a text."""
    root = tmp_path_factory.mktemp("runs")
    special = {"eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": BYTE_VOCAB_SIZE}
    model = tiny_calm(**special)
    save(model, root / "calm", byte_tokenizer())
    readout = {"token_loss_weight": 1.0, "token_readout": "causal", "keep_token_readout": True}
    save(tiny_calm(**special, **readout), root / "readout", byte_tokenizer())
    save(tiny_baseline(**special, seed=2), root / "baseline", byte_tokenizer())
    save(Autoencoder(model.config.ae_config), root / "ae", byte_tokenizer())
    (root / "text.txt").write_text(TEXT * 30, encoding="utf-8")
    return root
