"""Models small enough to build in milliseconds."""

import torch

from calm import AutoencoderConfig, CALMConfig
from calm.models import MODEL_CLASSES, Autoencoder
from calm.training.objectives.tempering import TemperatureObjective, TemperingArguments

VOCAB, LATENT = 31, 8


def autoencoder_config(**fields):
    sizes = {"hidden_size": 12, "intermediate_size": 20, "latent_size": LATENT, "patch_size": 4}
    return AutoencoderConfig(**{"vocab_size": VOCAB, "pad_token_id": 0, **sizes, **fields})


def config(**fields):
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "latent_size": LATENT,
        "noise_size": 6,
        "num_mlp_layers": 2,
        "num_samples": 4,
        "patch_size": 4,
        "head_init": "scaled",
    }
    return CALMConfig(**{"vocab_size": VOCAB, "pad_token_id": 0, **sizes, **fields})


def autoencoder(**fields):
    torch.manual_seed(1)
    return Autoencoder(autoencoder_config(**fields))


def model(head_type="energy", *, ae_fields=None, **fields):
    """A model of random weights, with an autoencoder of random weights."""
    fields = {"initializer_range": 0.2, **fields}
    shared = {name: fields[name] for name in ("vocab_size", "patch_size") if name in fields}
    ae_model = autoencoder(**{"initializer_range": 0.2, **shared, **(ae_fields or {})})
    torch.manual_seed(2)
    return MODEL_CLASSES[head_type].from_autoencoder(ae_model, config(**fields))


def tokens(batch=3, chunks=5, patch_size=4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, chunks * patch_size), generator=generator)


def tempered_model(**fields):
    """A model in evaluation mode whose tempered head has left its start."""
    made = model(**fields).eval()
    head = made.add_tempered_head((0.3, 0.8))
    torch.manual_seed(7)
    torch.nn.init.normal_(head.temperature_embd.weight, std=2.0)
    return made


def temperature_learner():
    """A model that learns temperatures, as its program makes it."""
    made = model()
    head = made.add_tempered_head((0.3, 0.8))
    made.requires_grad_(False)
    head.requires_grad_(True)
    made.objective = TemperatureObjective(TemperingArguments(min_draws=8, max_draws=12))
    return made
