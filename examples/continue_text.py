"""Load a CALM and let it continue a text: drawn by its head, and by its readout if it has one.

    python examples/continue_text.py [FOLDER [PROMPT]]

Without FOLDER it takes the model that comes with the package. Runs in seconds on a CPU.
"""

import sys

from transformers import AutoModel, AutoTokenizer

from calm import pretrained_path


def main(folder: str | None = None, prompt: str = "Returns the ") -> None:
    """Print the text at two temperatures, and what it cost."""
    if folder is None:
        folder = str(pretrained_path())
        print("model: calm-docstrings, which comes with the package", file=sys.stderr)
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(prompt)["input_ids"]]
    methods = ["batch"] if model.token_readout is None else ["batch", "readout"]
    for method in methods:
        for temperature in (1.0, 0.5):
            found = model.generate(
                ids,
                max_new_tokens=48,
                method=method,
                temperature=temperature,
                seed=1,
                return_details=True,
            )
            text = tokenizer.decode(found.sequences[0], skip_special_tokens=True)
            print(f"{method}, T = {temperature:g}, {found.tokens_per_second:.0f} tokens/s: {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
