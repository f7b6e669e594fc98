"""A training term of the autoencoder: latents that point where a token model's states point.

Shapes: B batch, P chunks of a sequence, K tokens of a chunk, L latent size.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calm.configuration import AutoencoderConfig
from calm.errors import UserError
from calm.models.backbone import Backbone
from calm.models.baseline import BaselineTransformer

__all__ = ["Alignment", "middle_of"]


def middle_of(baseline: BaselineTransformer) -> Backbone:
    """The first half of the layers of `baseline`, rounded up, without the last norm; frozen.

    It is taken from `baseline`, which is of no use afterwards.
    """
    teacher = baseline.model
    teacher.layers = teacher.layers[: (len(teacher.layers) + 1) // 2]
    teacher.norm = nn.Identity()
    return teacher.requires_grad_(False).eval()


class Alignment(nn.Module):
    """1 - cos(P μ + b, t): t is the teacher's state after the last token of the chunk.

    That is the first state of the teacher that has read all of the chunk; it has read all before
    it, too, so that μ, which has not, learns what is common to the contexts of a chunk. P and b are
    trained with the autoencoder and serve training alone; b takes up what all states share. The
    teacher gets no gradient, is no part of the module's weights and goes to its device and dtype.

    Cost: 6 L H operations a chunk, with the teacher's width H, and the teacher's forward pass over
    K tokens.

    Source: REPA (arXiv 2410.06940), which aligns states of a denoiser.

    Args:
        config: of the autoencoder.
        teacher: of `middle_of`.

    Raises:
        UserError: another vocabulary.
    """

    def __init__(self, config: AutoencoderConfig, teacher: Backbone) -> None:
        super().__init__()
        if teacher.config.vocab_size != config.vocab_size:
            raise UserError(
                f"teacher_name_or_path must have the autoencoder's {config.vocab_size} tokens, got "
                f"a model of {teacher.config.vocab_size}"
            )
        self.patch_size = config.patch_size
        with torch.random.fork_rng(devices=[]):  # it draws nothing that others would have drawn
            self.projection = nn.Linear(config.latent_size, teacher.config.hidden_size)
        self._teacher = (teacher,)  # in a tuple: neither registered nor saved

    @property
    def teacher(self) -> Backbone:
        """What the latent is aligned to."""
        return self._teacher[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, mean: Tensor, input_ids: Tensor) -> Tensor:
        """Means ``[B, P, L]`` and the chunks' tokens ``[B, P*K]`` to ``[B, P]``, in float32."""
        with torch.no_grad():
            states = self.teacher(input_ids=input_ids, use_cache=False).last_hidden_state
        wanted = states[:, self.patch_size - 1 :: self.patch_size]
        similarity = F.cosine_similarity(self.projection(mean).float(), wanted.float(), dim=-1)
        return 1 - similarity
