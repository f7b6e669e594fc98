"""Continuous autoregressive language models."""

from transformers import AutoConfig, AutoModel

from calm.configuration import AutoencoderConfig, CALMConfig
from calm.decoding import generate
from calm.models import (
    Autoencoder,
    BaselineTransformer,
    ContinuousTransformer,
    DiffusionTransformer,
    EnergyTransformer,
    FlowTransformer,
)

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "BaselineTransformer",
    "CALMConfig",
    "DiffusionTransformer",
    "EnergyTransformer",
    "FlowTransformer",
]

AutoConfig.register(AutoencoderConfig.model_type, AutoencoderConfig, exist_ok=True)
AutoConfig.register(CALMConfig.model_type, CALMConfig, exist_ok=True)
AutoModel.register(AutoencoderConfig, Autoencoder, exist_ok=True)
# The class is the one that a checkpoint's `architectures` names.
AutoModel.register(
    CALMConfig, (EnergyTransformer, DiffusionTransformer, FlowTransformer), exist_ok=True
)

# Models know nothing of decoding; this is where the two meet.
ContinuousTransformer.generate = generate  # type: ignore[attr-defined]
