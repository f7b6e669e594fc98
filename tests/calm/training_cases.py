"""Small texts, flags and models for the tests of training."""

import atexit
import gc
import json

import numpy as np
import tiny
import torch
from transformers import LlamaConfig

from calm import BaselineTransformer
from calm.training import (
    distill,
    distill_temperature,
    post_train,
    train_ar,
    train_autoencoder,
    train_calm,
)
from calm.training.flags.arguments import CALMTrainingArguments
from calm.training.trainer import CALMTrainer

# Each `train` collects garbage; what the imports left need not be looked at every time.
gc.freeze()
atexit.register(gc.unfreeze)

MAIN = {
    "autoencoder": train_autoencoder.main,
    "calm": train_calm.main,
    "baseline": train_ar.main,
    "temperature": distill_temperature.main,
    "post": post_train.main,
    "distillation": distill.main,
}
SIZES = {
    "autoencoder": "hidden_size=16,intermediate_size=24,latent_size=8",
    "calm": "hidden_size=16,intermediate_size=24,num_hidden_layers=1,num_attention_heads=2,"
    "noise_size=4,num_mlp_layers=1,num_samples=2,head_init=scaled",
    "baseline": "hidden_size=16,intermediate_size=24,num_hidden_layers=1,num_attention_heads=2",
    "temperature": "",
    "post": "",
    "distillation": "",
}


def write_corpus(folder, documents=60):
    """A jsonl file of short sentences; its path."""
    random = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "hat"]
    texts = [" ".join(random.choice(words, size=12)) for _ in range(documents)]
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def flags(folder, stage, *extra, text=None):
    """Command-line words of a job of a few steps in `folder`; `extra` ones win."""
    own = {"autoencoder": ["--tokenizer_name=bytes"], "baseline": ["--tokenizer_name=bytes"]}
    return [
        f"--train_file={text or write_corpus(folder)}",
        f"--cache_dir={folder / 'cache'}",
        f"--output_dir={folder / stage}",
        f"--config_overrides={SIZES[stage]}",
        "--validation_split_percentage=20",
        "--block_size=32",
        "--use_cpu",
        "--max_steps=4",
        "--logging_steps=1",
        "--save_steps=2",
        "--per_device_train_batch_size=2",
        "--learning_rate=1e-2",
        "--dataloader_pin_memory=False",
        "--disable_tqdm=True",
        *own.get(stage, []),
        *extra,
    ]


def logs(folder, name="loss"):
    """`name` of every log entry in a finished job's folder or a checkpoint."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


class Sequences(torch.utils.data.Dataset):
    """Random sequences of `tiny` tokens."""

    def __init__(self, count, chunks=4):
        self.ids = tiny.tokens(batch=count, chunks=chunks).numpy()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class UnevenSequences(Sequences):
    """Random sequences in which very different numbers of labels count.

    Padding begins anywhere, a start chunk stands in the middle, and some hold no label at all.
    """

    KEPT = (16, 1, 5, 16, 9, 0, 13, 2)

    def __init__(self, count):
        super().__init__(count)
        self.labels = self.ids.copy()
        for row, labels in enumerate(self.labels):
            labels[self.KEPT[row % len(self.KEPT)] :] = -100
        self.labels[3::8, 4:8] = -100

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def tiny_baseline():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return BaselineTransformer(LlamaConfig(vocab_size=tiny.VOCAB, num_attention_heads=2, **sizes))


TERMS = {"token_loss_weight": 0.3, "token_score_weight": 2.0, "token_score_start": 0.5}
MODELS = {
    "autoencoder": tiny.autoencoder,
    "energy": lambda: tiny.model("energy"),
    "terms": lambda: tiny.model(**TERMS),
    "diffusion": lambda: tiny.model("diffusion"),
    "flow": lambda: tiny.model("flow"),
    "baseline": tiny_baseline,
}


def make_trainer(model, folder, *, sequences=8, data=None, **settings):
    """A trainer of `model` on `data`, by default random sequences."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    data = data or Sequences(sequences)
    arguments = CALMTrainingArguments(**{**defaults, **settings})
    return CALMTrainer(model, arguments, train_dataset=data, eval_dataset=data)


def train(model, folder, **settings):
    """`make_trainer`, trained."""
    trainer = make_trainer(model, folder, **settings)
    trainer.train()
    return trainer


def history(trainer, name):
    """`name` of every log entry that has it."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
