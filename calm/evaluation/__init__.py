"""BrierLM: Brier-1 to Brier-4 of a model, their standard errors, and the measurement protocol."""

from calm.evaluation.brier import brier_scores
from calm.evaluation.protocol import Evaluation, evaluate

__all__ = ["Evaluation", "brier_scores", "evaluate"]
