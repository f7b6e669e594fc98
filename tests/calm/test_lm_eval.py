"""The models in the lm-evaluation-harness; `make test-harness` installs it and runs these tests."""

import json

import pytest
import torch
import yaml
from test_decoding_readout import calm_with_readout
from tiny_models import tiny_baseline, tiny_calm

from calm.data.tokenizer import load_tokenizer
from calm.errors import UserError
from calm.evaluation.likelihood import continuation_likelihoods

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra 'harness'")
from lm_eval.api.instance import Instance  # noqa: E402 (not without the extra)
from lm_eval.tasks import TaskManager  # noqa: E402 (not without the extra)

from calm.integrations.lm_eval import CALMHarness  # noqa: E402 (not without the extra)

VOCAB = 259
QUESTIONS = [
    {"question": "One and one is", "choices": [" two", " three"], "gold": 0},
    {"question": "A cat is an", "choices": [" animal", " engine", " island"], "gold": 0},
    {"question": "Snow", "choices": [" is hot", " is cold"], "gold": 1},
]
CHOICE = {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
COMPLETION = {
    "task": "tiny_completion",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[gold]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of models that read and write bytes."""
    root, tokenizer = tmp_path_factory.mktemp("models"), load_tokenizer("bytes")
    ids = {
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 64,
    }  # fmt: skip
    made = {
        "baseline": tiny_baseline(vocab_size=VOCAB, **ids),
        "head": tiny_calm(vocab_size=VOCAB, has_start_patch=True, **ids),
        "readout": calm_with_readout(vocab_size=VOCAB, has_start_patch=True, **ids),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in made}


def harness(folders, name, **options):
    method = {"method": "readout"} if name == "readout" else {}
    return CALMHarness(folders[name], device="cpu", **method, **options)


def request(*arguments):
    return Instance("loglikelihood", {}, arguments, 0)


@pytest.mark.parametrize("name", ["baseline", "readout"])
def test_a_task_of_choices_and_one_of_completions(folders, name, tmp_path):
    """The harness's own evaluation, offline; a choice is right if its likelihood is the largest."""
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    for task in (CHOICE, COMPLETION):
        fields = {
            **task, "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
        }  # fmt: skip
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(fields))
    model = harness(folders, name)
    found = lm_eval.simple_evaluate(
        model=model, tasks=[CHOICE["task"], COMPLETION["task"]], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    encode = model.encoder.prompt
    right = 0
    for entry in QUESTIONS:
        pairs = [(encode(entry["question"]), encode(choice)) for choice in entry["choices"]]
        scores = [each.log_probability for each in continuation_likelihoods(model.model, pairs)]
        right += scores.index(max(scores)) == entry["gold"]
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    samples = found["samples"]["tiny_completion"]
    assert len(samples) == len(QUESTIONS)
    assert all("\n" not in sample["resps"][0][0] for sample in samples)


@pytest.mark.parametrize("name", ["baseline", "head", "readout"])
def test_texts_are_those_of_generate_and_end_at_a_stop_string(folders, name):
    model = harness(folders, name, batch_size=2)
    contexts = ["Return the", "A", "If the file is"]
    options = {"until": [], "max_gen_toks": 24, "temperature": 0.7, "do_sample": True}
    texts = model.generate_until([request(context, options) for context in contexts])
    for index, (context, text) in enumerate(zip(contexts, texts, strict=True)):
        prompt = model.encoder.prompt(context)
        ids = model.model.generate(
            [prompt], max_new_tokens=24, temperature=0.7, method=model.method, seed=index
        )
        assert text == model.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
    stop = texts[0][len(texts[0]) // 2 :][:1]
    stopped = model.generate_until([request(contexts[0], {**options, "until": [stop]})])
    assert stopped == [texts[0][: texts[0].index(stop)]]


@pytest.mark.parametrize("name", ["baseline", "head", "readout"])
def test_temperature_zero_leaves_nothing_to_chance(folders, name):
    options = {"until": [], "max_gen_toks": 16}
    texts = [
        harness(folders, name, seed=seed).generate_until([request("Return", options)])
        for seed in (0, 5)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["baseline", "readout"])
def test_windows_of_a_long_text_cover_it_once(folders, name):
    model = harness(folders, name)
    ids = list(range(3 * model.max_length + 5))
    pairs = [(context, scored) for _, context, scored in model._windows(ids)]
    assert [token for _, scored in pairs for token in scored] == ids
    for context, scored in pairs[1:]:
        assert len(context) + len(scored) <= model.max_length
        assert context == ids[scored[0] - len(context) : scored[0]]
    text = "Returns the number of bytes. " * 30
    (total,) = model.loglikelihood_rolling([request(text)])
    assert -len(text) * 20 < total < 0
    short = "Returns the"
    (total,) = model.loglikelihood_rolling([request(short)])
    ((alone, _),) = model.loglikelihood([request("", short)])
    assert total == pytest.approx(alone)


def test_a_head_without_likelihood_says_so(folders):
    with pytest.raises(NotImplementedError, match="trained without likelihood"):
        harness(folders, "head").loglikelihood([request("One", " two")])


def test_bad_input(folders):
    with pytest.raises(UserError, match="batch_size must be a whole number"):
        harness(folders, "head", batch_size="auto")
    with pytest.raises(UserError, match="chat template"):
        harness(folders, "head").apply_chat_template([{"role": "user", "content": "Hello"}])
    assert torch.is_grad_enabled()
