"""Fine-tune a trained CALM, such as a published checkpoint, and compare it with what it was.

    python examples/fine_tune.py MODEL TEXT OUTPUT [FLAG ...]

MODEL is a folder or a hub name, TEXT what `calm prepare --data` takes. OUTPUT/text gets the
prepared text, OUTPUT/model the model. Further flags go to `calm train`: --max_steps 2000, --bf16,
or --ae_name_or_path FOLDER for a checkpoint that holds no autoencoder. Started again, each part
goes on where it was.
"""

import sys

from transformers import PretrainedConfig

from calm import cli

BLOCK_SIZE = 2048  # tokens, unless the model's context is less
# A tenth of the published learning rate, over few steps.
SETTINGS = """
--learning_rate 3e-5 --lr_scheduler_type linear --warmup_steps 50 --adam_beta2 0.95
--weight_decay 0.1 --per_device_train_batch_size 4 --max_steps 500 --do_train --do_eval
--eval_strategy steps --eval_steps 100 --save_steps 100
"""


def main(model: str, text: str, output: str, *flags: str) -> int:
    """Prepare the text, train, compare; the exit status of the first that fails, else 0."""
    config, _ = PretrainedConfig.get_config_dict(model)
    chunk = config.get("patch_size", 4)
    block_size = str(min(BLOCK_SIZE, chunk * config["max_position_embeddings"]))
    prepared, tuned = f"{output}/text", f"{output}/model"
    reading = ["--tokenizer", model, "--patch-size", str(chunk)]
    learning = ["--model_name_or_path", model, "--train_file", prepared, "--block_size", block_size]
    commands = [
        ["prepare", "--data", text, *reading, "--output", prepared],
        ["train", *learning, *SETTINGS.split(), "--output_dir", tuned, *flags],
        ["compare", model, tuned, "--data", prepared, "--block-size", block_size],
    ]
    for command in commands:
        if status := cli.main(command):
            return status
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    raise SystemExit(main(*sys.argv[1:]))
