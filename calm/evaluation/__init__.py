"""BrierLM: Brier-1 to Brier-4 of a model, their standard errors, and the measurement protocol."""

from calm.evaluation.brier import brier_scores
from calm.evaluation.protocol import Evaluation, evaluate, summarise
from calm.evaluation.scores import TextScores, score_text

__all__ = ["Evaluation", "TextScores", "brier_scores", "evaluate", "score_text", "summarise"]
