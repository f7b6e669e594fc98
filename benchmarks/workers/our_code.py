"""The worker with this project's models: ``python -m benchmarks.workers.our_code --threads 2``."""

import argparse
import sys
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.reference_decoding import chunk_noise
from benchmarks.workers.model_work import Draws, ModelWork
from benchmarks.workers.protocol import reply_channel, serve
from calm import EnergyTransformer
from calm_kernels import energy_head


class OurWork(ModelWork):
    """With the defaults of the library, except where draws are given."""

    model: EnergyTransformer

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def read_model(self, folder: str, autoencoder: str) -> nn.Module:
        return EnergyTransformer.from_pretrained(folder, ae_path=autoencoder, dtype=torch.float32)

    def output(self, input_ids: Tensor, draws: Draws | None) -> Any:
        return self.model(input_ids, labels=input_ids, **(draws or {}))

    def parts(self, input_ids: Tensor, draws: Draws) -> dict[str, Tensor]:
        size = self.model.patch_size
        hidden = self.model(input_ids[:, :-size]).last_hidden_state.flatten(0, 1)
        latents = energy_head(hidden, draws["head_noise"], self.model.generative_head)
        decoder = self.model.ae_model.decoder
        return {
            "posterior": self.model.ae_model.encoder(input_ids=input_ids[:, size:]).flatten(0, 1),
            "hidden states": hidden,
            "latents": latents,
            "logits": nn.functional.linear(decoder.decode(latents[0]), decoder.output_weight),
        }

    def text(self, prompt: Tensor, new_tokens: int, temperature: float, seed: int) -> Tensor:
        return self.model.generate(
            prompt, max_new_tokens=new_tokens, temperature=temperature, seed=seed
        )

    def write_text(
        self, inputs: str, new_tokens: int, temperature: float, seed: int, draws: int, result: str
    ) -> None:
        """A text, and the head's noise ``[draws, noise_size]`` at each of its chunks, as a file."""
        self.model.eval()
        text = self.text(torch.load(inputs), new_tokens, temperature, seed)
        size = self.model.config.noise_size
        count = new_tokens // self.model.patch_size
        noise = [chunk_noise(seed, index, draws, size)[:, 0] for index in range(count)]
        torch.save({"text": text, "noise": noise}, result)


def main() -> None:
    """Answer commands on standard input."""
    replies = reply_channel()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    work = OurWork(parser.parse_args().threads)
    serve({**work.handlers(), "write_text": work.write_text}, sys.stdin, replies)


if __name__ == "__main__":
    main()
