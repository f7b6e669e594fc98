"""The worker with the published models: run by the interpreter of their environment.

``INTERPRETER -m benchmarks.workers.published_code --checkout DIR --threads 2``

The checkout is imported as it stands. What a CPU in float32 needs is set from outside:

* training mode leaves the autoencoder in evaluation mode; in training mode its encoder casts to
  bfloat16, which needs autocast;
* no token ends or pads a text: both ids are -1;
* for parity the draws are given: `torch.rand`, `torch.randn` and `random.choices` are replaced
  while a command runs. Nothing is replaced while anything is timed.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.workers.model_work import Draws, ModelWork
from benchmarks.workers.protocol import reply_channel, serve


@contextmanager
def given_draws(uniform: Sequence[Tensor] = (), normal: Sequence[Tensor] = ()) -> Iterator[None]:
    """`torch.rand` and `torch.randn` return these tensors in turn.

    Raises:
        AssertionError: other shapes are drawn, or not all tensors are used.
    """
    left = {"rand": list(uniform), "randn": list(normal)}

    def drawing(name: str) -> Any:
        def draw(*size: Any, **_: Any) -> Tensor:
            wanted = torch.Size(size[0] if isinstance(size[0], Sequence) else size)
            assert left[name], f"torch.{name} draws {tuple(wanted)}, but nothing is left to give"
            value = left[name].pop(0)
            assert value.shape == wanted, (
                f"torch.{name} draws {tuple(wanted)}, but {tuple(value.shape)} is given"
            )
            return value

        return draw

    with (
        mock.patch.object(torch, "rand", drawing("rand")),
        mock.patch.object(torch, "randn", drawing("randn")),
    ):
        yield
    unused = {name: len(values) for name, values in left.items() if values}
    assert not unused, f"given draws were not used: {unused}"


class PublishedWork(ModelWork):
    """The published energy model."""

    def __init__(self, threads: int, model_class: Any) -> None:
        super().__init__(threads)
        self.model_class = model_class

    def versions(self) -> dict[str, str]:
        import transformers

        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def read_model(self, folder: str, autoencoder: str) -> nn.Module:
        model, info = self.model_class.from_pretrained(
            folder, ae_path=autoencoder, torch_dtype=torch.float32, output_loading_info=True
        )
        names = {name for name, _ in model.named_parameters()}  # each shared tensor once
        missing = names & set(info["missing_keys"])
        assert not missing and not info["unexpected_keys"], f"the checkpoint does not fit: {info}"
        model.padding_idx = model.eos_token_id = -1
        return model

    def output(self, input_ids: Tensor, draws: Draws | None) -> Any:
        given = nullcontext() if draws is None else self._given(draws)
        with given:
            return self.model(input_ids, labels=input_ids)

    def parts(self, input_ids: Tensor, draws: Draws) -> dict[str, Tensor]:
        size, model = self.model.patch_size, self.model
        tokens = model.transformer.embed_tokens(input_ids[:, :-size])
        inputs = model.embed_proj(tokens.unflatten(1, (-1, size)).flatten(2))
        hidden = model.transformer(inputs_embeds=inputs)[0].flatten(0, 1)
        count = len(draws["head_noise"])
        with given_draws([draws["head_noise"] + 0.5]):
            latents = model.generative_head.sample(hidden.expand(count, -1, -1))
        logits = model.ae_model.decoder(latents[0][:, None])
        return {
            "posterior": model.ae_model.encoder(input_ids=input_ids[:, size:]).flatten(0, 1),
            "hidden states": hidden,
            "latents": latents,
            "logits": logits,
        }

    def text(self, prompt: Tensor, new_tokens: int, temperature: float, seed: int) -> Tensor:
        torch.manual_seed(seed)
        random.seed(seed)
        return self.model.generate(
            prompt, max_length=prompt.shape[1] + new_tokens, temperature=temperature
        )

    def follow_text(self, inputs: str, temperature: float, text: str) -> float:
        """Write another's text with its noise; the published vote may choose what it chose.

        Args:
            inputs: file of the prompt.
            temperature: of the text.
            text: file of the text and its noise.

        Returns: share of the text's chunks that follow.

        Raises:
            AssertionError: a chunk of the text is none that the published vote could choose, or,
                at temperature 1, not the one that is drawn.
        """
        self.model.eval()
        prompt, given, size = torch.load(inputs), torch.load(text), self.model.patch_size
        wanted = given["text"][0, prompt.shape[1] :].unflatten(0, (-1, size)).tolist()
        chunks = iter(map(tuple, wanted))

        def choose(population: list[Any], **_: Any) -> list[Any]:
            chunk = next(chunks)
            assert chunk in population, f"the published vote cannot choose {chunk}"
            return [chunk]

        noise = [each + 0.5 for each in given["noise"]]
        if temperature < 1:
            noise = [each[None] for each in noise]
        with given_draws(noise), mock.patch.object(random, "choices", choose):
            found = self.model.generate(
                prompt, max_length=given["text"].shape[1], temperature=temperature
            )
        same = found[0, prompt.shape[1] :].unflatten(0, (-1, size)) == torch.tensor(wanted)
        return same.all(-1).float().mean().item()

    def _given(self, draws: Draws) -> Any:
        return given_draws([draws["head_noise"] + 0.5], [draws["target_noise"]])


def main() -> None:
    """Answer commands on standard input."""
    replies = reply_channel()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkout", required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.checkout)
    from models.modeling_energy import EnergyTransformer  # of the checkout

    work = PublishedWork(arguments.threads, EnergyTransformer)
    serve({**work.handlers(), "follow_text": work.follow_text}, sys.stdin, replies)


if __name__ == "__main__":
    main()
