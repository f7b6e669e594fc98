"""What the models do beyond the published numbers: draws, masks, inputs, evaluation, errors."""

import pytest
import tiny
import torch

from calm.errors import UserError
from calm.models import MODEL_CLASSES
from calm.models.agreement import brier_terms
from calm_kernels import use_backend

HEADS = tuple(MODEL_CLASSES)
every_head = pytest.mark.parametrize("head", HEADS)


def loss_of(model, ids, **arguments):
    return model(ids, ids, **arguments).loss


# Random draws


@pytest.mark.parametrize("head", ["autoencoder", *HEADS])
def test_a_seed_decides_every_draw(head):
    """Training and evaluation; other seeds and offsets draw otherwise, `None` follows torch."""
    model = tiny.autoencoder(initializer_range=0.2) if head == "autoencoder" else tiny.model(head)
    ids = tiny.tokens()
    for mode in (True, False):
        model.train(mode)
        first = loss_of(model, ids, seed=7)
        assert torch.equal(first, loss_of(model, ids, seed=torch.tensor([7, 0])))
        assert not torch.equal(first, loss_of(model, ids, seed=8))
        assert not torch.equal(first, loss_of(model, ids, seed=torch.tensor([7, 1])))
    torch.manual_seed(5)
    first, second = loss_of(model, ids), loss_of(model, ids)
    torch.manual_seed(5)
    assert torch.equal(first, loss_of(model, ids))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("head", ["autoencoder", *HEADS])
@pytest.mark.parametrize("targets", ["analytic", "sample"])
def test_any_split_of_a_batch_draws_the_same_numbers(head, targets):
    """`first_row` is the index of the first sequence, so parts of a batch average to the whole."""
    if head == "autoencoder":
        model = tiny.autoencoder(initializer_range=0.2)
    else:
        model = tiny.model(head, targets=targets)
    model.train()
    ids = tiny.tokens(batch=4)
    whole = loss_of(model, ids, seed=3)
    parts = torch.stack([loss_of(model, ids[i : i + 1], seed=3, first_row=i) for i in range(4)])
    assert torch.allclose(parts.mean(), whole, rtol=1e-5)
    same_rows = torch.stack([loss_of(model, ids[i : i + 1], seed=3) for i in range(4)])
    assert not torch.allclose(same_rows.mean(), whole, rtol=1e-3)


# Masks


@every_head
def test_masked_chunks_do_not_change_the_loss(head):
    """Neither their tokens nor their draws change the loss; a sequence of padding is skipped."""
    model = tiny.model(head).train()
    ids = tiny.tokens(batch=2)
    labels = ids.clone()
    labels[1, 8:] = -100
    loss = model(ids, labels, seed=0).loss
    changed = ids.clone()
    changed[1, 12:] = 5  # tokens after the last prediction that counts
    assert torch.allclose(model(changed, labels, seed=0).loss, loss, rtol=1e-6)
    labels[1] = -100
    assert torch.allclose(
        model(ids, labels, seed=0).loss, loss_of(model, ids[:1], seed=0), rtol=1e-5
    )
    labels[:] = -100
    nothing = model(ids, labels, seed=0).loss
    nothing.backward()
    assert nothing == 0


def test_a_chunk_counts_by_its_first_label_and_is_encoded_from_the_input():
    """As published for padded blocks, whose tokens without a label are pad tokens."""
    model = tiny.model()
    ids = tiny.tokens(batch=1)
    labels, padded = ids.clone(), ids.clone()
    labels[0, -2:] = -100
    padded[0, -2:] = model.config.pad_token_id
    assert torch.equal(model(ids, labels, seed=0).loss, model(ids, ids, seed=0).loss)
    assert torch.equal(model(padded, labels, seed=0).loss, model(padded, padded, seed=0).loss)
    assert not torch.equal(model(ids, labels, seed=0).loss, model(padded, labels, seed=0).loss)


# Evaluation


@every_head
def test_brier_scores_are_those_of_two_draws(head):
    model = tiny.model(head).eval()
    ids = tiny.tokens()
    labels = ids.clone()
    labels[2, 12:] = -100
    with torch.no_grad():
        output = model(ids, labels, seed=6)
        hidden = model(ids).last_hidden_state[:, :-1]
        latents = model.generative_head.sample(hidden, num_samples=2, seed=6)
    draws = model.decode_latents(latents)  # [2, B, S, K]
    terms = brier_terms(draws, labels[:, 4:].reshape(3, 4, 4))
    expected = torch.stack([terms[0].mean(0), terms[1].mean(0), terms[2, :2].mean(0)])
    scores = torch.stack([output[f"brier{order}"] for order in (1, 2, 3, 4)], dim=1)
    assert torch.allclose(scores, expected, atol=1e-6)
    assert list(output)[-4:] == ["brier1", "brier2", "brier3", "brier4"]


def test_brier_scores_of_a_model_that_knows_the_text():
    """One token over and over: the draws agree with it, and each score is 1."""
    model = tiny.model().eval()
    decoder = model.ae_model.decoder
    decoder.latent_to_hidden.weight.data.zero_()  # every latent decodes to the same chunk
    chunk = model.decode_latents(torch.zeros(1, tiny.LATENT))[0]
    ids = chunk.repeat(2, 5)
    output = model(ids, ids, seed=0)
    for order in (1, 2, 3, 4):
        assert torch.equal(output[f"brier{order}"], torch.ones(2))
    other = (ids + 1) % tiny.VOCAB
    assert torch.equal(model(ids, other, seed=0).brier1, -torch.ones(2))


@pytest.mark.parametrize("mode", ["train", "short chunks"])
def test_no_brier_scores_in_training_or_for_short_chunks(mode):
    model = tiny.model(patch_size=2) if mode == "short chunks" else tiny.model()
    model.train(mode == "train")
    ids = tiny.tokens(patch_size=model.patch_size)
    assert list(model(ids, ids)) == ["loss", "fidelity", "diversity"]


def test_the_parts_of_the_energy_loss():
    model = tiny.model()
    ids = tiny.tokens()
    output = model(ids, ids, seed=0)
    assert torch.allclose(output.fidelity - output.diversity, output.loss, rtol=1e-6)
    assert output.fidelity > 0
    assert output.diversity > 0
    assert not output.fidelity.requires_grad


def test_analytic_targets_are_the_mean_of_sampled_ones():
    model, ids = tiny.model(), tiny.tokens(batch=2)
    head_noise = torch.rand(4, 8, 6) - 0.5
    exact = model(ids, ids, head_noise=head_noise).loss
    sampled = torch.stack(
        [
            model(ids, ids, head_noise=head_noise, target_noise=torch.randn(100, 8, 8)).loss
            for _ in range(40)
        ]
    )
    standard_error = sampled.std() / 40**0.5
    assert (sampled.mean() - exact).abs() < 4 * standard_error


@every_head
def test_the_reference_backend_gives_the_same_loss_and_gradients(head):
    model = tiny.model(head).train()
    ids = tiny.tokens()
    gradients = []
    for backend in ("torch", "reference"):
        with use_backend(backend):
            model.zero_grad()
            loss_of(model, ids, seed=0).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-5), name


# Inputs


@pytest.mark.parametrize("input_type", ["tokens", "latent", "both"])
def test_inputs_are_causal_and_every_parameter_learns(input_type):
    model = tiny.model(input_type=input_type)
    ids = tiny.tokens()
    hidden = model.eval()(ids).last_hidden_state
    assert hidden.shape == (3, 5, 16)
    changed = ids.clone()
    changed[:, 8:12] = (changed[:, 8:12] + 1) % tiny.VOCAB
    difference = (model(changed).last_hidden_state - hidden).abs().amax((0, 2))
    assert (difference[:2] == 0).all()
    assert (difference[2:] > 0).all()
    loss_of(model.train(), ids, seed=0).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_a_latent_input_has_no_token_embedding_and_sees_what_the_autoencoder_sees():
    model = tiny.model(input_type="latent")
    assert not any("embed_tokens" in name for name in model.transformer.state_dict())
    assert not any(name.startswith("embed_proj") for name in model.state_dict())
    mean, _ = model.ae_model.encoder(input_ids=tiny.tokens()).chunk(2, dim=-1)
    assert torch.equal(model.embed_patches(tiny.tokens()), model.latent_proj(mean))


def test_both_inputs_are_summed():
    model, ids = tiny.model(input_type="both"), tiny.tokens()
    embeds = model.embed_patches(ids)
    model.config.input_type = "tokens"
    tokens = model.embed_patches(ids)
    model.config.input_type = "latent"
    assert torch.allclose(embeds, tokens + model.embed_patches(ids))


def test_a_start_chunk_is_a_chunk_of_begin_tokens():
    model = tiny.model(has_start_patch=True, bos_token_id=7)
    assert model.start_token_id == 7
    without = tiny.model(bos_token_id=7)
    assert without.start_token_id is None
    assert model.state_dict().keys() == without.state_dict().keys()
    ids = tiny.tokens(batch=2)
    assert torch.equal(model(ids).last_hidden_state, without(ids).last_hidden_state)


@pytest.mark.parametrize("bos_token_id", [None, tiny.VOCAB, -1])
def test_a_start_chunk_needs_a_begin_token(bos_token_id):
    with pytest.raises(UserError, match=r"has_start_patch needs bos_token_id.*add_special_tokens"):
        tiny.config(has_start_patch=True, bos_token_id=bos_token_id)


def test_a_start_chunk_is_read_but_not_predicted():
    """What follows it depends on it; the loss at it does not count."""
    model, ids = tiny.model(), tiny.tokens(batch=1, chunks=6)
    labels = ids.clone()
    labels[:, 8:12] = -100
    loss = model(ids, labels, seed=0).loss
    other = ids.clone()
    other[:, 8:12] = 1
    assert not torch.allclose(model(other, labels, seed=0).loss, loss)
    # Were it predicted, this loss alone would see which token it holds.
    only_first = labels.clone()
    only_first[:, 12:] = -100
    assert torch.equal(model(other, only_first, seed=0).loss, model(ids, only_first, seed=0).loss)


def test_an_n_gram_that_leaves_the_document_is_not_scored():
    model, ids = tiny.model().eval(), tiny.tokens(batch=2)
    labels = ids.clone()
    labels[:, 18:] = -100
    noise = torch.rand(4, 2, 4, 6, generator=torch.Generator().manual_seed(0)) - 0.5
    ended = model(ids, labels, head_noise=noise, seed=0)
    shorter = model(ids[:, :16], ids[:, :16], head_noise=noise[:, :, :3], seed=0)
    for order in range(1, 5):
        assert torch.allclose(ended[f"brier{order}"], shorter[f"brier{order}"])


def test_decoding_takes_the_likeliest_token():
    model = tiny.model()
    latents = torch.randn(3, 2, 5, tiny.LATENT)
    tokens = model.decode_latents(latents)
    logits = model.ae_model.decoder(latent_states=latents.flatten(0, 1))
    assert tokens.shape == (3, 2, 5, 4)
    assert torch.equal(tokens.reshape(6, 20), logits.argmax(-1))


# Precision


@every_head
def test_autocast_and_double_precision(head):
    model = tiny.model(head).train()
    ids = tiny.tokens()
    single = loss_of(model, ids, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss_of(model, ids, seed=0)
    half.backward()
    assert torch.allclose(half, single, rtol=0.1)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    double = loss_of(model.double(), ids, seed=0)
    assert torch.allclose(double.float(), single, rtol=1e-4)


# Errors


@pytest.mark.parametrize("head", ["autoencoder", *HEADS])
def test_a_misspelt_draw_raises(head):
    model = tiny.autoencoder() if head == "autoencoder" else tiny.model(head)
    with pytest.raises(TypeError, match="haed_noise"):
        model(tiny.tokens(), tiny.tokens(), haed_noise=torch.zeros(1))


@pytest.mark.parametrize("head", ["autoencoder", *HEADS])
def test_a_length_that_is_no_multiple_of_the_chunk(head):
    model = tiny.autoencoder() if head == "autoencoder" else tiny.model(head)
    ids = tiny.tokens()[:, :-1]
    with pytest.raises(
        ValueError, match=r"input_ids must have shape .*patch_size 4, got \(3, 19\)"
    ):
        model(ids, ids)


def test_labels_and_lengths_that_do_not_fit():
    model, ids = tiny.model(), tiny.tokens()
    with pytest.raises(ValueError, match=r"labels must have the shape of input_ids.*\(3, 16\)"):
        model(ids, ids[:, 4:])
    with pytest.raises(ValueError, match="at least two chunks of 4 tokens"):
        model(ids[:, :4], ids[:, :4])


@pytest.mark.parametrize(
    ("head", "draw"),
    [
        ("energy", {"head_noise": torch.zeros(4, 11, 6)}),
        ("energy", {"head_noise": torch.zeros(4, 12, 5)}),
        ("energy", {"target_noise": torch.zeros(100, 7, 8)}),
        ("flow", {"head_noise": torch.zeros(47, 8)}),
        ("flow", {"target_noise": torch.zeros(4, 12, 9)}),
        ("diffusion", {"timesteps": torch.zeros(13, dtype=torch.long)}),
        ("flow", {"sample_noise": torch.zeros(23, 8)}),
        ("diffusion", {"sample_noise": torch.zeros(24, 8)}),
        ("autoencoder", {"token_keep": torch.ones(14, 4, dtype=torch.bool)}),
        ("autoencoder", {"latent_noise": torch.zeros(15, 7)}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_a_draw_of_the_wrong_shape_is_named(head, draw):
    """Three sequences of five chunks: twelve predicted chunks."""
    model = tiny.autoencoder() if head == "autoencoder" else tiny.model(head)
    (name,) = draw
    expected = "noise" if name == "sample_noise" else name
    with pytest.raises(ValueError, match=f"{expected} must"):
        model.eval()(tiny.tokens(), tiny.tokens(), **draw)
