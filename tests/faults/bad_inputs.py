"""Bad inputs to every command: one line each, and nothing changed on disk."""

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from .commands import SIZES, TEXT, make_models, run_command
from .report import Result, choose

__all__ = ["cases", "run"]

Words = list[str]
HUGE = "9" * 5000
# Numbers that no flag of that kind takes.
BAD_COUNTS = ("0", "-1", "1.5", "nan", "inf", "1e3", "x", "", HUGE)
BAD_RATES = ("-1", "nan", "inf", "-inf", "1e999", "x", "")

COUNTS = {
    "eval": ("--batch-size", "--block-size", "--num-samples", "--brier-draws", "--max-blocks"),
    "generate": ("--max-new-tokens", "--num-samples", "--max-draws"),
    "experiment": ("--positions", "--repeats", "--max-draws", "--max-blocks"),
    "prepare": ("--workers",),
    "plan": ("--vocab-size",),
}
RATES = {
    "eval": ("--noise-scale", "--validation-split-percentage"),
    "generate": ("--noise-scale", "--temperature"),
    "prepare": ("--validation-split-percentage",),
    "demo": ("--minutes",),
}
BASES: dict[str, Words] = {
    "env": ["env"],
    "demo": ["demo", "--text", "text.txt", "--minutes", "0.01", "--output-dir", "out"],
    "prepare": ["prepare", "--data", "text.txt", "--tokenizer", "bytes", "--output", "out",
                "--cache-dir", "../cache"],
    "plan": ["plan"],
    "verify": ["verify"],
    "merge": ["merge"],
    "eval": ["eval", "--model", "calm", "--data", "text.txt", "--block-size", "32",
             "--max-blocks", "1"],
    "generate": ["generate", "--model", "calm", "--prompt", "the quick br",
                 "--max-new-tokens", "4"],
    "experiment": ["experiment", "temperature", "--model", "calm", "--data", "text.txt",
                   "--block-size", "32", "--quick", "--output-dir", "out"],
}  # fmt: skip
SHAPE = {
    "train-ae": f"{SIZES},latent_size=8",
    "train": f"{SIZES},num_hidden_layers=1,num_attention_heads=2,noise_size=4,num_mlp_layers=1,"
    "num_samples=2",
    "train-ar": f"{SIZES},num_hidden_layers=1,num_attention_heads=2",
}
OWN = {
    "train-ae": ["--tokenizer_name=bytes"],
    "train": ["--ae_name_or_path=ae"],
    "train-ar": ["--tokenizer_name=bytes"],
}
STAGES = tuple(SHAPE)

# Flags of training and values that are refused; they go to the three programs in turn.
TRAINING = {
    "max_steps": ("-5", "0", "1.5", "nan", HUGE),
    "block_size": ("0", "-4", "x", "30000"),
    "per_device_train_batch_size": ("0", "-1", "nan"),
    "per_device_eval_batch_size": ("0", "-1"),
    "gradient_accumulation_steps": ("0", "-2"),
    "eval_accumulation_steps": ("0",),
    "num_train_epochs": ("0", "-1", "nan", "inf"),
    "learning_rate": ("-1", "nan", "inf", "fast", ""),
    "muon_learning_rate": ("-1", "nan"),
    "weight_decay": ("-1", "nan"),
    "adam_beta1": ("1", "-0.1", "nan"),
    "adam_beta2": ("1", "2"),
    "adam_epsilon": ("-1", "nan"),
    "max_grad_norm": ("-1", "inf"),
    "warmup_steps": ("-1", "nan"),
    "max_train_seconds": ("-1", "nan", "inf"),
    "logging_steps": ("0", "-1", "nan"),
    "save_steps": ("0", "nan"),
    "eval_steps": ("0", "nan"),
    "save_total_limit": ("-1", "x"),
    "eval_num_samples": ("1", "-2", "nan", "1000000000000"),
    "eval_delay": ("-1", "nan"),
    "seed": ("-1", str(2**32), "x"),
    "data_seed": ("-1",),
    "eval_seed": ("-1", "1.5"),
    "max_train_samples": ("0", "-1"),
    "max_eval_samples": ("0",),
    "validation_split_percentage": ("-1", "100", "nan"),
    "preprocessing_num_workers": ("0", "-1"),
    "stream_lanes": ("0", "-1"),
    "dataloader_num_workers": ("-1",),
    "dataloader_prefetch_factor": ("0", "2"),
    "label_smoothing_factor": ("0.1", "nan"),
    "metric_for_best_model": ("nothing",),
    "report_to": ("X", "wandb"),
    "deepspeed": ("nowhere.json", "{}"),
    "fsdp": ("full_shard", "x"),
    "optim": ("x", "adamw_bnb_8bit"),
    "lr_scheduler_type": ("x",),
    "lr_scheduler_kwargs": ("{", "[1]", '{"x": 1}'),
    "optim_args": ("x",),
    "eval_strategy": ("sometimes",),
    "save_strategy": ("x", "best"),
    "logging_strategy": ("x",),
    "text_unit": ("word",),
    "backend": ("cuda", "triton"),
    "torch_dtype": ("float8", ""),
    "bf16": ("perhaps",),
    "do_train": ("perhaps",),
    "config": ("nowhere", "list.yaml", "self.yaml", "circle-a.yaml", "deep.yaml", "laughs.yaml",
               "anchor.yaml", "broken.yaml", "bytes.yaml", "nested.yaml", "flag.yaml", "text.txt",
               "tags.yaml", "extends.yaml", ".", ""),
    "config_name": ("nowhere", "broken-config", "list-config", "text.txt"),
    "tokenizer_name": ("nowhere", "bpe:0", "bpe:-1", "bpe:x", "bpe:99999999999999999999",
                       "broken-tokenizer", "text.txt", "."),
    "model_name_or_path": ("nowhere", "broken-config", "cut-weights", "no-weights", "text.txt",
                           "list-config", "fewer-layers", "zeros"),
    "resume_from_checkpoint": ("nowhere", "true", "ae"),
    "train_file": ("nowhere.txt", "*.none", "empty.txt", "broken.jsonl", "no-text.jsonl",
                   "latin1.txt", "broken.txt.gz", "ae", ""),
    "validation_file": ("nowhere.txt", "empty.txt"),
    "dataset_name": ("embedded:none", "nowhere/at-all"),
    "unknown_flag": ("1",),
    "learning_rat": ("1",),
    "ae_name_or_path": ("nowhere", "baseline", "text.txt"),
    "model_type": ("gan",),
    "output_dir": ("text.txt", "text.txt/out"),
    "tf32": ("x",),
    "hub_strategy": ("x",),
    "neftune_noise_alpha": ("nan",),
}  # fmt: skip
OVERRIDES = {
    "train-ae": (
        "hidden_act=nope", "embedding_std=nan", "embedding_std=-1", "latent_size=0",
        "num_encoder_layers=3", "patch_size=0", "patch_size=-4", "ae_dropout=1", "ae_dropout=nan",
        "kl_weight=inf", "kl_clamp=-1", "hidden_size=0", "hidden_size=99999999999",
        "hidden_size=9999999", "initializer=x", "rms_norm_eps=nan", "patch_size=5",
        "vocab_size=3", "vocab_size=x", "hidden_size", "=3",
    ),
    "train": (
        "hidden_act=nope", "num_key_value_heads=3", "embedding_std=nan", "beta=2", "beta=nan",
        "num_samples=1", "num_samples=1000000000", "noise_size=0", "num_mlp_layers=0",
        "max_position_embeddings=4", "num_hidden_layers=0", "num_attention_heads=0",
        "num_attention_heads=3", "num_targets=0", "targets=exact",
        "targets=antithetic,num_targets=3",
        "head_init=x", "input_type=x", "has_start_patch=maybe", "head_dim=7", "rope_theta=nan",
        "hidden_size=99999999", "attention_dropout=2", "ae_path=nowhere/x", "model_type=gan",
        "latent_size=9", "patch_size=2",
    ),
    "train-ar": (
        "hidden_act=nope", "num_key_value_heads=3", "embedding_std=nan", "hidden_size=0",
        "num_hidden_layers=-1", "num_attention_heads=0", "num_attention_heads=3",
        "max_position_embeddings=4", "hidden_size=99999999", "vocab_size=1", "initializer=7",
        "initializer_range=nan", "rope_theta=nan", "intermediate_size=0",
    ),
}  # fmt: skip
FOLDERS = ("nowhere", "text.txt", "", ".", "ae", "broken-config", "list-config", "cut-weights",
           "no-weights", "fewer-layers", "zeros", "no-tokenizer", "broken-tokenizer")  # fmt: skip
TEXTS = ("nowhere.txt", "*.none", "empty.txt", "broken.jsonl", "no-text.jsonl", "latin1.txt",
         "broken.txt.gz", "embedded:none", "", ",")  # fmt: skip
OTHERS: dict[str, tuple[Words, ...]] = {
    "env": (["--jsn"], ["extra"], ["--json=1"]),
    "demo": (
        ["--minutes", "0"], ["--text", "nowhere.txt"], ["--text", "empty.txt"],
        ["--text", "broken.jsonl"], ["--recipe", "nowhere"], ["--recipe", "list.yaml"],
        ["--recipe", "self.yaml"], ["--output-dir", "text.txt"], ["--seed", "-1"],
        ["--text-unit", "word"], ["extra"],
    ),
    "prepare": (
        *(["--tokenizer", name] for name in
          ("nowhere", "bpe:0", "bpe:x", "bpe:99999999999999999999", "broken-tokenizer", "")),
        ["--output", "text.txt"], ["--output", ""], ["--text-unit", "word"],
        ["--cache-dir", "text.txt"],
    ),
    "plan": (
        *([name] for name in
          ("nowhere", "", "list.yaml", "self.yaml", "circle-a.yaml", "deep.yaml", "laughs.yaml",
           "broken.yaml", "bytes.yaml", "nested.yaml", "bad-sizes.yaml", "huge.yaml", "text.txt",
           "broken-config", "list-config", "zeros", "bad-heads", ".")),
        ["--jsn"],
    ),
    "verify": ([], ["nowhere"], ["text.txt"], [""], ["ae", "--x"]),
    "merge": (
        ["ae"], *([name, "--output", "out"] for name in ("nowhere", "text.txt", "", "ae", ".")),
    ),
    "eval": (
        ["--dtype", "int8"], ["--device", "tpu"], ["--device", "cuda:x"], ["--seed", "-1"],
        ["--num-samples", "100000000000"], ["--json", "nowhere/x.json"], ["--json", "."],
        ["--block-size", "30"], ["--block-size", "99999"], ["--tokenizer", "nowhere"],
        ["--tokenizer", "bpe:300"], ["--text-unit", "word"], ["--backend", "triton"],
    ),
    "generate": (
        ["--temperature", "0"], ["--temperature", "2"], ["--temperature", "1/0"],
        ["--temperature", "1/2/3"], ["--num-samples", "100000000000"], ["--seed", "-1"],
        ["--seed", str(2**70)], ["--method", "greedy"], ["--max-draws", "1"],
        ["--method", "direct", "--temperature", "0.5"], ["--device", "tpu"], ["--dtype", "int8"],
        ["--prompt", ""], ["--prompt", "x" * 1000], ["--prompt-file", "nowhere.txt"],
        ["--prompt-file", "."], ["--prompt-file", "latin1.txt"], ["--stop", ""],
        ["--max-new-tokens", "100000"], ["--tokenizer", "nowhere"], ["--prompt", "a\ud800b"],
        ["--prompt-alignment", "x"], ["stray"],
    ),
    "experiment": (
        ["--seed", "-1"], ["--model", "baseline"], ["--positions", "1"],
        ["--positions", "999999999999"], ["--output-dir", "text.txt"], ["--block-size", "30"],
    ),
}  # fmt: skip


def training_words(command: str, *extra: str) -> Words:
    """A job of one step of a tiny model; `extra` flags win."""
    return [
        command, "--train_file=text.txt", "--cache_dir=../cache", "--output_dir=out",
        f"--config_overrides={SHAPE[command]}", "--block_size=32", "--use_cpu", "--max_steps=1",
        "--validation_split_percentage=20",
        "--per_device_train_batch_size=1", "--dataloader_pin_memory=False", "--disable_tqdm=True",
        *OWN[command], *extra,
    ]  # fmt: skip


def cases() -> list[Words]:
    """The words of every case."""
    found = [["evla"], ["--jsn"]]
    for command, base in BASES.items():
        found += [[*base, *words] for words in OTHERS[command]]
        for flags, values in ((COUNTS, BAD_COUNTS), (RATES, BAD_RATES)):
            found += [
                [*base, f"{flag}={value}"] for flag in flags.get(command, ()) for value in values
            ]
    for command in ("eval", "generate", "experiment"):
        found += [[*BASES[command], "--model", name] for name in FOLDERS]
    for command in ("eval", "prepare"):
        found += [[*BASES[command], "--data", name] for name in TEXTS]
    refused = [(flag, value) for flag, values in TRAINING.items() for value in values]
    for index, (flag, value) in enumerate(refused):
        command = "train" if flag in ("ae_name_or_path", "model_type") else STAGES[index % 3]
        found.append(training_words(command, *_evaluated(flag), f"--{flag}={value}"))
    for command, texts in OVERRIDES.items():
        found += [
            training_words(command, f"--config_overrides={SHAPE[command]},{text}") for text in texts
        ]
    return found


def _evaluated(flag: str) -> Iterator[str]:
    """What makes a flag of evaluation count."""
    if flag.startswith(("eval", "metric", "save_strategy")):
        yield from ("--do_train", "--do_eval", "--eval_strategy=steps", "--eval_steps=1")


def run(folder: Path, count: int | None = None) -> list[Result]:
    """Every case, or `count` of them spread evenly, in a new folder below `folder`."""
    work = folder / "work"
    work.mkdir(parents=True)
    make_models(work)
    make_broken_files(work)
    return [_judge(words, work) for words in choose(cases(), count)]


def _judge(words: Words, work: Path) -> Result:
    done = run_command(words, work, is_offline=True)
    case = " ".join(word if len(word) < 60 else word[:40] + "..." for word in words)
    if done.status == 0:
        outcome, is_right = "accepted", done.is_clean
    elif not done.is_clean:
        outcome, is_right = "no single line", False
    elif done.changed:
        outcome, is_right = "refused, but files changed", False
    else:
        outcome, is_right = "refused in one line", True
    if done.connections and "nowhere" not in case:
        outcome, is_right = "a connection was tried", False
    for name in done.changed:  # the next case finds the folder as this one did
        path = work / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return Result(case, outcome, is_right, f"{done.changed[:4]} {done.last_line}")


def make_broken_files(work: Path) -> None:
    """Texts, recipes and model folders, each broken in one way."""
    (work / "empty.txt").write_text("")
    (work / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (work / "no-text.jsonl").write_text('{"body": "a"}\n')
    (work / "latin1.txt").write_bytes("café\n".encode("latin-1") * 20)
    zipped = gzip.compress(TEXT.encode() * 200)
    (work / "broken.txt.gz").write_bytes(zipped[: len(zipped) // 2] + b"x" * 50)
    laughs = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    recipes = {
        "list": "- a\n- b\n",
        "self": "extends: self.yaml\n",
        "circle-a": "extends: circle-b.yaml\n",
        "circle-b": "extends: circle-a.yaml\n",
        "deep": "learning_rate: " + "[" * 5000 + "]" * 5000 + "\n",
        "laughs": "\n".join(laughs) + "\n",
        "anchor": "learning_rate: &a [*a]\n",
        "broken": "learning_rate: [\n",
        "nested": "learning_rate: {a: {b: 1}}\n",
        "flag": "lerning_rate: 1\n",
        "tags": "learning_rate: !!python/object/apply:os.getcwd []\n",
        "extends": "extends: [a]\n",
        "bad-sizes": "calm:\n  config_overrides: {num_key_value_heads: 5}\n",
        "huge": "calm:\n  config_overrides: {hidden_size: 1600000000000}\n",
    }
    for name, content in recipes.items():
        (work / f"{name}.yaml").write_text(content)
    (work / "bytes.yaml").write_bytes(b"\xff\xfe\x00learning_rate: 1")
    _break_folders(work)


def _break_folders(work: Path) -> None:
    for name in ("broken-config", "list-config", "cut-weights", "no-weights", "fewer-layers",
                 "zeros", "bad-heads", "no-tokenizer", "broken-tokenizer"):  # fmt: skip
        shutil.copytree(work / "calm", work / name)
    (work / "broken-config" / "config.json").write_text('{"model_type": ')
    (work / "list-config" / "config.json").write_text("[1]")
    weights = work / "cut-weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (work / "no-weights" / "model.safetensors").unlink()
    zeros = work / "zeros" / "model.safetensors"
    zeros.write_bytes(bytes(zeros.stat().st_size))
    (work / "zeros" / "config.json").write_bytes(bytes(100))
    for name, change in (
        ("fewer-layers", {"num_hidden_layers": 1}), ("bad-heads", {"num_key_value_heads": 3})
    ):  # fmt: skip
        path = work / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (work / "broken-tokenizer" / "tokenizer.json").write_text("{")
    for file in (work / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
