"""BrierLM: Brier-1 to Brier-4 of a model, their errors, and the protocol they were measured by."""

from calm.evaluation.brier import brier_scores
from calm.evaluation.protocol import Evaluation, evaluate

__all__ = ["Evaluation", "brier_scores", "evaluate"]
