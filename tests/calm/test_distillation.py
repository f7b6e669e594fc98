"""Distillation: what teachers read and draw, the target's expectation, the student's texts."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from tiny_models import prompt, tiny_baseline, tiny_calm

from calm.decoding.sampling.seeds import OFFSET_STRIDE, advance, row_seeds
from calm.errors import UserError
from calm.labels import IGNORE_INDEX
from calm.training.objectives import teachers
from calm.training.objectives.distilling import (
    DistillationArguments,
    DistillationObjective,
    own_texts,
)
from calm.training.objectives.teachers import ChunkTeacher, Documents, TokenTeacher
from calm_kernels.energy_score import gaussian_energy_score
from calm_kernels.noise import Stream, as_seed, uniform
from calm_kernels.softmax_draws import draw_tokens

VOCAB, K, M = 7, 4, 2
START, END = 5, 6
PLAIN, ALIGNED = Documents(None, END), Documents(START, END)
SEED = torch.tensor([11, 3])
# Documents 0 1 2 3 4 and 3 2 1, between them start chunks; the second sequence begins within one.
S, E = [START] * K, END
TEXTS = torch.tensor(
    [
        [*S, 0, 1, 2, 3, 4, E, E, E, *S, 3, 2, 1, E, *S],
        [4, 3, E, E, *S, 0, 1, 2, 3, E, E, E, E, *S, 3, 2, 1, E],
    ]
)


def contexts_of(texts, documents, unit):
    """What a teacher of so many tokens has read after each chunk, written with lists."""
    found = []
    for row in texts.tolist():
        read, by_chunk = [], []
        for begin in range(0, len(row), K):
            chunk = row[begin : begin + K]
            if documents.start_token_id is not None and chunk == S:
                kept = chunk[:2] if unit == 2 else [] if begin else [E]
            elif documents.start_token_id is not None:  # without what only fills the chunk
                end = chunk.index(E) + 1 if E in chunk else K
                kept = chunk[: -(-end // unit) * unit]
            else:
                kept = chunk
            read = read + kept
            by_chunk.append(read)
        found.append(by_chunk)
    return found


def filled(chunk, documents):
    """Its tokens, but end tokens after the first one where documents are filled up so."""
    if documents.start_token_id is None or E not in chunk:
        return chunk
    return (chunk[: chunk.index(E)] + [E] * K)[:K]


def token_by_token(model, context, seed, draw):
    """K tokens, each from the softmax after all before it."""
    drawn = []
    for slot in range(K):
        logits = model(torch.tensor([context + drawn])).logits[0, -1:]
        point = uniform(1, 1, stream=Stream.TEACHER, seed=advance(seed, slot)[None], num_draws=M)
        drawn.append(draw_tokens(logits.softmax(-1), point[draw].double()).item())
    return drawn


def chunk_by_chunk(model, context, seed, draw):
    """Two chunks of two tokens, each drawn by the head after all before it."""
    drawn = []
    for depth in range(K // 2):
        hidden = model(torch.tensor([context + drawn])).last_hidden_state[:, -1]
        if depth:
            own = advance(seed, depth + OFFSET_STRIDE * draw)[None]
            latent = model.generative_head.sample(hidden, seed=own)
        else:
            latent = model.generative_head.sample(hidden, num_samples=M, seed=seed[None])[draw]
        drawn += model.decode_latents(latent)[0].tolist()
    return drawn


class TestTeachers:
    @pytest.mark.parametrize("documents", [PLAIN, ALIGNED], ids=["plain", "aligned"])
    @pytest.mark.parametrize("kind", ["tokens", "chunks"])
    def test_branches_are_what_is_drawn_at_each_place_alone(self, kind, documents, monkeypatch):
        monkeypatch.setattr(teachers, "MAX_BRANCHES", 2 * M + 1)  # two chunks at a time
        if kind == "tokens":
            model, plain = tiny_baseline(vocab_size=VOCAB), token_by_token
            teacher = TokenTeacher(model, documents)
        else:
            model, plain = tiny_calm(vocab_size=VOCAB, patch_size=2), chunk_by_chunk
            teacher = ChunkTeacher(model, documents)
        options = {"num_draws": M, "length": K, "seed": SEED}
        drawn = teacher.continuations(TEXTS, **options, first_row=40)
        contexts, count = contexts_of(TEXTS, documents, teacher.unit), TEXTS.shape[1] // K
        assert drawn.shape == (M, len(TEXTS), count, K)
        places = list(product(range(len(TEXTS)), range(count)))
        with torch.no_grad():
            for index, (row, chunk) in enumerate(places):
                seed = row_seeds(SEED, torch.tensor(40 + index), Stream.TEACHER)
                draw = index % M
                wanted = filled(plain(model, contexts[row][chunk], seed, draw), documents)
                assert drawn[draw, row, chunk].tolist() == wanted, (draw, row, chunk)
        second = teacher.continuations(TEXTS[1:], **options, first_row=40 + count)
        assert second.equal(drawn[:, 1:])

    def test_draws_have_the_distribution_of_the_softmax(self):
        """All 9 chunks of two tokens of three, by enumeration."""
        model, ids, count = tiny_baseline(vocab_size=3), prompt(1, 2, vocab_size=3), 6000
        torch.nn.init.normal_(model.lm_head.weight, std=0.1)
        drawn = TokenTeacher(model, PLAIN).continuations(
            ids.expand(count // 20, -1), num_draws=20, length=2, seed=SEED
        )
        with torch.no_grad():
            pairs = torch.tensor(list(product(range(3), repeat=2)))
            chances = model(torch.cat([ids.expand(9, 2), pairs], 1)).logits.softmax(-1)
        first, second = chances[:, 1].gather(1, pairs[:, :1]), chances[:, 2].gather(1, pairs[:, 1:])
        exact = (first * second)[:, 0]
        seen = torch.bincount((drawn @ torch.tensor([3, 1])).flatten(), minlength=9) / count
        assert exact.max() < 0.8  # a distribution, not one answer
        assert ((seen - exact).abs() < 4.5 * (exact * (1 - exact) / count).sqrt() + 1e-9).all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("kind", ["tokens", "chunks"])
    def test_what_is_not_finite_is_an_error(self, kind, value):
        """Tokens drawn from it would be any."""
        if kind == "tokens":
            teacher = TokenTeacher(tiny_baseline(vocab_size=VOCAB), PLAIN)
            weight = teacher.model.lm_head.weight
        else:
            teacher = ChunkTeacher(tiny_calm(vocab_size=VOCAB, patch_size=2), PLAIN)
            weight = teacher.model.generative_head.output.weight
        weight.data[1, 2] = value
        with pytest.raises(UserError, match=r"teacher: the \w+Transformer must say what is finite"):
            teacher.continuations(TEXTS, num_draws=M, length=K, seed=SEED)

    def test_a_seed_of_a_row_is_its_own(self):
        rows = torch.arange(-1, 3)
        seeds = [row_seeds(torch.tensor([4, step]), rows, Stream.TEACHER) for step in (0, 1, 2**40)]
        assert len({tuple(seed) for each in seeds for seed in each.tolist()}) == 12
        assert all(each[:, 1].eq(0).all() for each in seeds)


class Saying:
    """A teacher that says what it is told to."""

    model = None

    def __init__(self, *chunks):
        self.chunks = torch.tensor(chunks)

    def continuations(self, input_ids, *, num_draws, length, seed, first_row=0):
        batch, chunks = len(input_ids), input_ids.shape[1] // length
        return self.chunks[:, None, None].expand(num_draws, batch, chunks, length)


def loss_of(model, teacher, ids, labels=None, **options):
    arguments = DistillationArguments(**options)
    model.objective = DistillationObjective(arguments, teacher, PLAIN)
    try:
        return model(ids, ids if labels is None else labels, seed=as_seed(5, "cpu")).loss
    finally:
        model.objective = None


class TestTarget:
    @pytest.mark.parametrize("share", [0.0, 0.25])
    def test_the_mean_over_draws_is_the_score_against_the_distribution(self, share):
        """All pairs of draws of a teacher that says four chunks with known probabilities."""
        model = tiny_calm(vocab_size=2, patch_size=2, num_samples=4)
        ids, size = prompt(2, 6, vocab_size=2), 2
        chunks = list(product(range(2), repeat=2))
        chances = torch.tensor([1, 2, 3, 5], dtype=torch.float64)
        chances /= chances.sum()
        with torch.no_grad():
            mean = sum(
                chances[i] * chances[j]
                * loss_of(model, Saying(chunks[i], chunks[j]), ids, teacher_draws=2,
                          data_weight=share)
                for i, j in product(range(4), repeat=2)
            )  # fmt: skip
            hidden = model(ids[:, :-size]).last_hidden_state
            samples = model.generative_head.sample(hidden, num_samples=4, seed=as_seed(5, "cpu"))
            said = torch.tensor(chunks).flatten()[None]
            mu, log_std = model.ae_model.encoder(said).chunk(2, -1)  # [1, 4, L]
            own = model.ae_model.encoder(ids[:, size:]).chunk(2, -1)
            targets = [
                torch.cat([all_[0][:, None, None].expand(-1, 2, 2, -1), text[None]])
                for all_, text in zip((mu, log_std), own, strict=True)
            ]
            weights = torch.cat([(1 - share) * chances, torch.tensor([share])]).float()
            score = gaussian_energy_score(
                samples, *targets, target_weights=weights[:, None, None].expand(-1, 2, 2)
            )
        assert mean.item() == pytest.approx(-score.mean().item(), rel=1e-5)

    def test_chunks_without_labels_do_not_count_and_the_student_alone_learns(self):
        model, ids = tiny_calm(vocab_size=VOCAB), prompt(2, 16, vocab_size=VOCAB)
        teacher = TokenTeacher(tiny_baseline(vocab_size=VOCAB), PLAIN)
        labels = ids.clone()
        labels[1, 4:] = IGNORE_INDEX
        whole = loss_of(model, teacher, ids, labels)
        assert whole.item() == pytest.approx(loss_of(model, teacher, ids[:1]).item(), rel=1e-6)
        whole.backward()
        for name, weight in model.named_parameters():
            assert (weight.grad is None) == name.startswith("ae_model."), name
        assert all(weight.grad is None for weight in teacher.model.parameters())

    @pytest.mark.parametrize("contexts", ["data", "student"])
    def test_a_batch_in_parts_learns_the_same(self, contexts):
        model, ids = tiny_calm(vocab_size=VOCAB).train(), prompt(4, 16, vocab_size=VOCAB)
        teacher = TokenTeacher(tiny_baseline(vocab_size=VOCAB), PLAIN)
        arguments = DistillationArguments(contexts=contexts, teacher_draws=2)
        model.objective = DistillationObjective(arguments, teacher, PLAIN)
        losses = [
            sum(
                model(part, part, seed=SEED, first_row=first, loss_counts=torch.tensor([12])).loss
                for first, part in zip(range(0, 4, size), ids.split(size), strict=True)
            ).item()
            for size in (4, 1)
        ]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class TestOwnTexts:
    def model(self, **fields):
        return tiny_calm(vocab_size=VOCAB, eos_token_id=END, bos_token_id=START, **fields)

    def test_each_text_is_the_students_own(self):
        model, ids = self.model(), prompt(6, 16, vocab_size=END)
        text, counted = own_texts(model, ids, PLAIN, seed=SEED, first_sequence=9)
        assert text.shape == ids.shape and counted.shape == (6, 3)
        assert text[:, :K].equal(ids[:, :K])
        ended = 0
        for row, (tokens, counts) in enumerate(zip(text, counted, strict=True)):
            seed = row_seeds(SEED, torch.tensor([9 + row]), Stream.SEQUENCE)
            wanted = model.generate(
                ids[row : row + 1, :K], max_length=16, temperature=1.0, seed=seed
            )[0]  # fmt: skip
            assert tokens[: len(wanted)].equal(wanted) and (tokens[len(wanted) :] == END).all()
            is_before = [END not in tokens[K : K * (s + 1)] for s in range(3)]
            assert counts.tolist() == is_before
            ended += not all(is_before)
        assert 0 < ended < 6
        later, _ = own_texts(model, ids[2:], PLAIN, seed=SEED, first_sequence=11)
        assert later.equal(text[2:])

    def test_start_chunks_and_prompts(self):
        """First a document that begins, then one that ends in the first chunk: no prompt."""
        model = self.model(has_start_patch=True)
        text, counted = own_texts(model, TEXTS, ALIGNED, seed=SEED, first_sequence=0)
        assert text[:, :K].eq(START).all()
        assert text[0, K : 2 * K].tolist() == [0, 1, 2, 3]
        for row, given in ((0, [0, 1, 2, 3]), (1, [])):
            seed = row_seeds(SEED, torch.tensor([row]), Stream.SEQUENCE)
            wanted = model.generate(
                [given], max_length=TEXTS.shape[1] - K, temperature=1.0, seed=seed
            )[0]  # fmt: skip
            assert text[row, K : K + len(wanted)].equal(wanted)
        assert counted[:, 0].all()

    def test_an_evaluation_is_on_the_text_that_is_held_out(self):
        model, ids = self.model(), prompt(2, 16, vocab_size=END)
        teacher = TokenTeacher(tiny_baseline(vocab_size=VOCAB), PLAIN)
        with torch.no_grad():
            own, text = (loss_of(model, teacher, ids, contexts=c) for c in ("student", "data"))
            assert own.equal(text)
            assert not loss_of(model.train(), teacher, ids, contexts="student").equal(text)

    def test_sequences_count_as_much_as_in_the_text(self):
        """Where texts end early, what is left of them stands for the whole."""
        model, ids = self.model().train(), prompt(6, 32, vocab_size=END)
        arguments = DistillationArguments(contexts="student")
        objective = DistillationObjective(arguments, Saying(*[[1, 2, 3, 4]] * 4), PLAIN)
        _, counted = own_texts(model, ids, PLAIN, seed=SEED, first_sequence=0)
        weight = torch.ones(6, 7)
        weight[0, 4:] = 0
        chunks = SimpleNamespace(model=model, input_ids=ids, weight=weight)  # no hidden states
        found = objective.loss(chunks, seed=SEED, first_row=0)
        assert found.loss.ne(0).equal(counted.bool())
        text, _ = own_texts(model, ids, PLAIN, seed=SEED, first_sequence=0)
        plain = DistillationObjective(DistillationArguments(), objective.teacher, PLAIN)
        own = model(text[:, :-K]).last_hidden_state
        chunks = SimpleNamespace(model=model, input_ids=text, weight=counted, hidden=own)
        each = plain.loss(chunks, seed=SEED, first_row=0)
        means = each.loss.sum(1) / counted.sum(1)
        torch.testing.assert_close(found.loss.sum(1), means * weight.sum(1))
