"""Trains and evaluates every model on uneven sequences, in one process or in two."""

import json

from torch.utils.data import IterableDataset
from training_cases import MODELS, UnevenSequences, history, make_trainer

EXACT = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_grad_norm": 1e9,
    "lr_scheduler_type": "constant",
}
MEASURES = (
    "loss", "grad_norm", "kl", "reconstruction_loss", "collapsed", "fidelity", "diversity",
    "token_loss", "token_score",
)  # fmt: skip


class Stream(IterableDataset):
    """Sequences of a dataset, one after the other."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return (self.data[index] for index in range(len(self.data)))


def scores(metrics):
    """Without times and speeds."""
    timed = ("runtime", "_per_", "preparation", "epoch")
    return {name: value for name, value in metrics.items() if not any(t in name for t in timed)}


def run(folder, train_batch, eval_batch):
    """What each model logs in two epochs of three steps, and how it scores, also on a stream."""
    results = {}
    for name, build in MODELS.items():
        trainer = make_trainer(
            build(),
            folder / name,
            data=UnevenSequences(10),
            max_steps=6,
            per_device_train_batch_size=train_batch,
            per_device_eval_batch_size=eval_batch,
            eval_num_samples=2,
            prediction_loss_only=name == "diffusion",  # its draws take a hundred steps
            **EXACT,
        )
        output = trainer.train()
        results[name] = {
            "logs": {measure: history(trainer, measure) for measure in MEASURES},
            "train_loss": output.training_loss,
            "scores": scores(trainer.evaluate()),
            "stream": scores(trainer.evaluate(Stream(UnevenSequences(10)))),
        }
    return results, trainer.is_world_process_zero()


def main(folder, train_batch, eval_batch):
    """In each of several processes: `run`, whose results go to FOLDER/results.json."""
    found, is_first = run(folder, train_batch, eval_batch)
    if is_first:
        (folder / "results.json").write_text(json.dumps(found))
