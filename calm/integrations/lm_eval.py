"""Models of this package in EleutherAI's lm-evaluation-harness (extra ``harness``).

    python -m calm.integrations.lm_eval run --model calm \
        --model_args pretrained=runs/demo/calm,method=readout --tasks lambada_openai

is the harness's own command with one more model, ``calm``: a CALM or the token baseline.
``generate_until`` works for all. Likelihoods are exact for the baseline and for a CALM that has
kept its readout; other CALMs have none, and say so. BrierLM needs several draws of one position,
which no task of the harness asks for: `calm eval` gives it.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs
from tqdm import tqdm

from calm.commands.model_flags import add_model_arguments, load_model, load_tokenizer_of
from calm.data.encoding import Encoder
from calm.decoding.sampling.methods import READOUT
from calm.errors import UserError, run_program
from calm.evaluation.likelihood import continuation_likelihoods
from calm.models import ContinuousTransformer

__all__ = ["CALMHarness"]


@register_model("calm")
class CALMHarness(TemplateLM):
    """A CALM or the token baseline as a model of the harness.

    Sampling at temperature 0, the harness's default, is what comes without randomness: the head's
    draw without noise (``noise_scale=0``), and the likeliest token of a readout or of the baseline.

    Args:
        pretrained: folder of the model.
        tokenizer: folder, hub name or ``bytes``; None for the one saved with the model.
        method: how chunks are chosen, see `calm.decoding.generate`.
        num_samples: N, likewise.
        batch_size: texts at once.
        max_gen_toks: new tokens where a task does not say.
        seed: of the first text; the next one has ``seed + 1``.
        device: as ``--device`` of the commands.
        dtype: likewise.
        max_batch_size: not used; the harness passes it.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        method: str = "batch",
        num_samples: int = 200,
        batch_size: int | str = 8,
        max_gen_toks: int = 128,
        seed: int = 0,
        device: str | None = None,
        dtype: str = "auto",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        flags = [f"--model={pretrained}", f"--device={device or 'auto'}", f"--dtype={dtype}"]
        flags += [f"--tokenizer={tokenizer}"] if tokenizer else []
        parser = argparse.ArgumentParser()
        add_model_arguments(parser, is_required=True)
        args = parser.parse_args(flags)
        self.model: Any = load_model(args)
        self.tokenizer: Any = load_tokenizer_of(args, self.model)
        self.encoder = Encoder(self.tokenizer)
        self.method, self.num_samples = method, int(num_samples)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size must be a whole number, at least 1; got {batch_size!r}")
        self.batch_size, self.max_gen_toks, self.seed = int(batch_size), int(max_gen_toks), seed

    @property
    def eot_token_id(self) -> int:
        """The end token, which also stands before a text without context."""
        token = self.tokenizer.eos_token_id
        if token is None:
            raise UserError("the tokenizer has no end token, which the harness needs")
        return int(token)

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return int(self.model.config.max_position_embeddings) * self._chunk

    @property
    def _chunk(self) -> int:
        return int(getattr(self.model, "patch_size", 1))

    @property
    def _before_text(self) -> list[int]:
        """Tokens before a text without context: a CALM has a start chunk, or cannot begin."""
        return [] if isinstance(self.model, ContinuousTransformer) else [self.eot_token_id]

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text that goes on; by the rule of `calm.data.encoding`, unless told."""
        if add_special_tokens is None:
            return self.encoder.prompt(string)
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """By the tokenizer's template."""
        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template: leave out --apply_chat_template")
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        batches = [
            requests[begin : begin + self.batch_size]
            for begin in range(0, len(requests), self.batch_size)
        ]
        try:
            return [
                found
                for batch in tqdm(batches, desc="Likelihoods", disable=disable_tqdm)
                for found in continuation_likelihoods(
                    self.model, [self._pair(*request) for request in batch],
                    batch_size=self.batch_size,
                )
            ]  # fmt: skip
        except UserError as error:
            if isinstance(self.model, ContinuousTransformer) and self.model.token_readout is None:
                raise NotImplementedError(str(error)) from error
            raise

    def _pair(
        self, texts: tuple[str, str], context: list[int], continuation: list[int]
    ) -> tuple[list[int], list[int]]:
        """Without the token that the harness puts where there is no context."""
        return context if texts[0] else self._before_text, continuation

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log likelihood of whole texts; a window has half of the one before it as context."""
        totals = []
        for request in requests:
            pairs = list(self._windows(self.encoder.prompt(request.args[0])))
            found = self._loglikelihood_tokens(pairs, disable_tqdm=True)
            totals.append(sum(log_probability for log_probability, _ in found))
        return totals

    def _windows(self, ids: list[int]) -> Iterator[tuple[tuple[str, str], list[int], list[int]]]:
        """Contexts and continuations that cover a text; they meet between chunks."""
        before = self._before_text
        shared = max(1, self.max_length // self._chunk // 2) * self._chunk
        begin = min(len(ids), self.max_length - (len(before) or self._chunk))
        if begin:
            yield ("", ""), before, ids[:begin]
        while begin < len(ids):
            end = begin + self.max_length - shared
            yield ("text", ""), ids[begin - shared : begin], ids[begin:end]
            begin = end

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of their stop strings."""
        numbered = [(*request.args, index) for index, request in enumerate(requests)]
        ordered = Collator(
            numbered, sort_fn=lambda entry: -len(entry[0]), group_by="gen_kwargs",
            group_fn=lambda entry: entry[1],
        )  # fmt: skip
        texts: list[str] = []
        with tqdm(total=len(requests), desc="Texts", disable=disable_tqdm) as bar:
            for batch in ordered.get_batched(n=self.batch_size):
                texts += self._continue(batch)
                bar.update(len(batch))
        found: list[str] = ordered.get_original(texts)
        return found

    def _continue(self, batch: Sequence[tuple[str, dict[str, Any], int]]) -> Iterator[str]:
        options = normalize_gen_kwargs(batch[0][1], self.max_gen_toks)
        end = self.tokenizer.decode([self.eot_token_id])
        stops = [stop for stop in handle_stop_sequences(options["until"], eos=end) if stop]
        prompts = [self.encoder.prompt(context) or [self.eot_token_id] for context, *_ in batch]
        found = self.model.generate(
            prompts, max_new_tokens=int(options["max_gen_toks"]), stop_strings=stops,
            tokenizer=self.tokenizer, truncate=True, return_details=True,
            seed=[self.seed + index for *_, index in batch], num_samples=self.num_samples,
            **self._sampling(float(options.get("temperature", 0.0))),
        )  # fmt: skip
        for row, prompt, count in zip(found.sequences, prompts, found.new_tokens, strict=True):
            ids = row[len(prompt) : len(prompt) + int(count)]
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            yield text[: min([text.find(stop) for stop in stops if stop in text], default=None)]

    def _sampling(self, temperature: float) -> dict[str, Any]:
        """Arguments of `generate`."""
        if temperature > 0:
            return {"method": self.method, "temperature": temperature}
        if isinstance(self.model, ContinuousTransformer) and self.method != READOUT:
            return {"method": "direct", "temperature": 1.0, "noise_scale": 0.0}
        return {"method": READOUT, "temperature": 0.0}


def main() -> int:
    """The harness's command with the model ``calm``; the exit status."""
    cli_evaluate()
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
