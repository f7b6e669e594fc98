"""The autoencoder, the language models on top of it and the token baseline.

Importing them registers them with transformers' `AutoConfig` and `AutoModel`.
"""

from transformers import AutoConfig, AutoModel

from calm.configuration import AutoencoderConfig, CALMConfig
from calm.models.autoencoder import Autoencoder, AutoencoderOutput
from calm.models.baseline import BaselineTransformer
from calm.models.calm import (
    MODEL_CLASSES,
    DiffusionTransformer,
    EnergyTransformer,
    FlowTransformer,
)
from calm.models.continuous import CALMOutput, ContinuousTransformer

__all__ = [
    "MODEL_CLASSES",
    "Autoencoder",
    "AutoencoderOutput",
    "BaselineTransformer",
    "CALMOutput",
    "ContinuousTransformer",
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
