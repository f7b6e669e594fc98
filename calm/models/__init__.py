"""The autoencoder, the language models on top of it and the token baseline."""

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
