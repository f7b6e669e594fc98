"""What a model inherits to continue prompts: generation stands below the models."""

from calm.decoding.engine.predictors import Predictor
from calm.decoding.generation import generate
from calm.decoding.sampling.chunk_distribution import Method

__all__ = ["DecodingMixin"]


class DecodingMixin:
    """Gives a model `calm.decoding.generate` as its method `generate`."""

    generate = generate

    def make_predictor(self, method: Method, temperature: float) -> Predictor:
        """How this model's next chunk is chosen.

        Args:
            method: of a model that can only be sampled.
            temperature: T in (0, 1], for a model that knows its probabilities.

        Raises:
            UserError: the method does not suit the model.
        """
        raise NotImplementedError

    def make_token_predictor(self, temperature: float) -> Predictor:
        """How this model's next chunk is drawn token by token.

        Args:
            temperature: T >= 0, of each token's probabilities; 0 takes the likeliest.

        Raises:
            UserError: the model knows no probabilities of tokens.
        """
        raise NotImplementedError
