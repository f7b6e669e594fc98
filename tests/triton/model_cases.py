"""What tests of whole models share: tiny ones, and the names of the kernels that run."""

import torch

from calm import Autoencoder, AutoencoderConfig, CALMConfig, EnergyTransformer


class Launches:
    """Names of the kernels that `modules` launched while it is in use."""

    def __init__(self, monkeypatch, *modules):
        self.names = []
        for module in modules:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, self._watched(name, getattr(module, name)))

    def _watched(self, name, kernel):
        class Watched:
            def __getitem__(_, grid):
                self.names.append(name)
                return kernel[grid]

        return Watched()


def tiny_autoencoder(latent_size=8):
    torch.manual_seed(0)
    config = AutoencoderConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        latent_size=latent_size,
        patch_size=2,
    )
    return Autoencoder(config)


def tiny_model(latent_size=8, **changes):
    torch.manual_seed(0)
    config = CALMConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_mlp_layers=1, noise_size=8,
        latent_size=latent_size, patch_size=2, num_samples=3, num_targets=4, head_init="scaled",
        **changes,
    )  # fmt: skip
    return EnergyTransformer.from_autoencoder(tiny_autoencoder(latent_size), config)
