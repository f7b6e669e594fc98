"""Flags: published ones, old ones, YAML and recipes; unknown names and wrong types are refused."""

import logging
import os

import pytest
from transformers import LlamaConfig

from calm.configuration import CALMConfig
from calm.errors import UserError
from calm.training.flags.arguments import parse_arguments
from calm.training.flags.config_overrides import build_config, parse_overrides
from calm.training.flags.old_flags import translate_old_flags
from calm.training.flags.recipe import (
    PRETRAINING,
    Stage,
    load_recipe,
    recipe_arguments,
    recipe_names,
    recipe_stages,
)
from calm.training.sharding.settings import check_processes

PRESETS = (
    "autoencoder baseline-10b baseline-l baseline-m baseline-s calm-10b calm-l calm-m "
    "calm-m-diffusion calm-m-flow calm-xl demo desk docstrings small tiny"
)

# Every flag that the published scripts take, under its name of then.
PUBLISHED = """
--ae_name_or_path ae --config_overrides hidden_size=64 --tokenizer_name t --cache_dir c
--use_fast_tokenizer True --model_revision main --token x --trust_remote_code False
--torch_dtype bfloat16 --low_cpu_mem_usage False --train_file a.jsonl,b.jsonl
--validation_file v.jsonl --max_train_samples 5 --max_eval_samples 5 --streaming --block_size 64
--overwrite_cache False --validation_split_percentage 5 --preprocessing_num_workers 2
--keep_linebreaks True --weight_decay 0.1 --warmup_steps 10 --learning_rate 3e-4
--lr_scheduler_type constant --adam_beta1 0.9 --adam_beta2 0.95 --max_grad_norm 1.0 --seed 1
--per_device_train_batch_size 8 --gradient_accumulation_steps 4 --max_steps 30
--save_strategy steps --save_steps 10 --evaluation_strategy steps --eval_steps 10
--logging_steps 10 --do_train --do_eval --save_safetensors False --output_dir out
--overwrite_output_dir --model_type energy --config_name c --dataset_name d
--dataset_config_name e
"""


def parse(*words, stage=Stage.CALM):
    return parse_arguments(["--use_cpu=True", *words], stage)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


class TestPublishedFlags:
    def test_all_are_accepted(self, caplog):
        job = parse(*PUBLISHED.split())
        assert (job.model.ae_name_or_path, job.data.train_file) == ("ae", "a.jsonl,b.jsonl")
        assert (job.training.eval_strategy, job.training.eval_steps) == ("steps", 10)
        assert job.training.do_train and job.training.do_eval and job.training.overwrite_output_dir
        assert job.corpus.streaming and job.corpus.cache_dir == "c" and job.corpus.token == "x"
        assert sum(record.levelno == logging.WARNING for record in caplog.records) == 1

    @pytest.mark.parametrize(
        ("stage", "size"), [("autoencoder", 2048), ("calm", 8192), ("baseline", 2048)]
    )
    def test_block_size_has_the_published_default(self, stage, size):
        assert parse(stage=Stage(stage)).block_size == size
        assert parse("--block_size", "64", stage=Stage(stage)).block_size == 64

    def test_training_is_what_happens_unless_evaluation_is_asked_for(self):
        assert parse().training.do_train
        assert parse("--eval_strategy", "steps", "--eval_steps", "5").training.do_train
        only = parse("--do_eval", "--model_name_or_path=x").training
        assert only.do_eval and not only.do_train
        with pytest.raises(UserError, match="would measure random weights"):
            parse("--do_eval")

    def test_a_filtered_loss_cannot_hide(self):
        assert parse("--logging_nan_inf_filter", "True").training.logging_nan_inf_filter is False


class TestOldFlags:
    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("--evaluation_strategy steps", "--eval_strategy steps"),
            ("--evaluation-strategy=steps", "--eval_strategy steps"),
            ("--warmup_ratio 0.1", "--warmup_steps 0.1"),
            ("--warmup_ratio 0", ""),
            ("--no_cuda", "--use_cpu"),
            ("--no_cuda False", "--use_cpu False"),
            ("--group_by_length", "--train_sampling_strategy group_by_length"),
            ("--group_by_length False", ""),
            ("--save_safetensors False", ""),
            ("--tokenizer t", "--tokenizer_name t"),
            ("--per_gpu_train_batch_size 3", "--per_device_train_batch_size 3"),
            ("--low_cpu_mem_usage", ""),
        ],
    )
    def test_each_is_translated(self, old, new):
        assert translate_old_flags([*old.split(), "--seed", "1"]) == [*new.split(), "--seed", "1"]

    def test_one_warning_lists_them(self, caplog):
        translate_old_flags(["--no_cuda", "--save_safetensors", "False", "--warmup_ratio", "0.1"])
        (record,) = caplog.records
        for name in ("--no_cuda", "--save_safetensors", "--warmup_ratio"):
            assert name in record.getMessage()

    def test_recipes_may_hold_them(self, yaml_file, caplog):
        file = yaml_file("evaluation_strategy: steps\neval_steps: 5\nsave_safetensors: false\n")
        assert parse("--config", file, "--no_cuda").training.eval_strategy == "steps"
        (record,) = caplog.records
        assert "--evaluation_strategy" in record.getMessage() and "--no_cuda" in record.getMessage()

    def test_current_flags_pass_unchanged_and_silently(self, caplog):
        words = [
            "--learning_rate",
            "-1",
            "--streaming",
            "--config_overrides=a=1,b=2",
            "--x=",
            "--y",
        ]
        expected = [
            "--learning_rate",
            "-1",
            "--streaming",
            "--config_overrides",
            "a=1,b=2",
            "--x",
            "",
            "--y",
        ]
        assert translate_old_flags(words) == expected and not caplog.records

    def test_logging_dir_becomes_the_environment_variable(self, monkeypatch):
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")
        assert translate_old_flags(["--logging_dir", "logs"]) == []
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"


class TestYaml:
    def test_values_have_the_type_of_their_flag(self, yaml_file):
        file = yaml_file(
            "learning_rate: 3e-4\neval_strategy: no\nbf16: false\nstreaming: true\nmax_steps: 7\n"
            "label_names: [labels, input_ids]\ntrain_file: null\n"
            "config_overrides:\n  hidden_size: 64\n  beta: 1.5\n"
        )
        job = parse("--config", file)
        assert job.training.learning_rate == 3e-4 and job.training.eval_strategy == "no"
        assert job.training.bf16 is False and job.data.streaming is True
        assert job.training.max_steps == 7 and job.data.train_file is None
        assert job.model.config_overrides == "hidden_size=64,beta=1.5"
        assert job.training.label_names == ["labels", "input_ids"]

    def test_flags_override_the_file(self, yaml_file):
        file = yaml_file("seed: 3\nblock_size: 32\n")
        job = parse("--seed", "4", "--config", file)
        assert (job.training.seed, job.data.block_size) == (4, 32)

    def test_sections_and_what_they_extend(self, yaml_file):
        yaml_file("seed: 1\ncalm:\n  config_overrides: {beta: 1.0, noise_size: 8}\n", "base.yaml")
        file = yaml_file(
            "extends: base.yaml\ncommon: {seed: 2}\ncalm:\n  config_overrides: {beta: 1.5}\n"
        )
        assert load_recipe(file, Stage.CALM) == {
            "seed": "2", "config_overrides": {"beta": "1.5", "noise_size": "8"},
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            ("lerning_rate: 1", r"mine\.yaml: unknown flag .*did you mean --learning_rate"),
            ("learning_rate: 3e-4x", r"mine\.yaml: argument --learning_rate.*'3e-4x'"),
            ("max_steps: 1e3", r"mine\.yaml: argument --max_steps.*invalid int value: '1e3'"),
            ("bf16: perhaps", r"mine\.yaml: argument --bf16.*perhaps"),
            ("- a", r"must hold `flag: value` lines, got list"),
            ("a: [", r"not valid YAML"),
            ("autoencoder: {seed: 1}", r"has no stage 'calm'; it has: autoencoder"),
            ("calm: 3", r"section calm must hold"),
            ("extends: nowhere", r"'nowhere' is neither a YAML file nor a recipe"),
            ("extends: mine.yaml", r"mine\.yaml extends itself"),
            ("extends: [a]", r"extends must name a recipe or a file, got list"),
            ("seed: " + "[" * 5000 + "]" * 5000, r"nested too deeply"),
            ("seed: {a: {b: 1}}", r"seed must be a value, a list of values or"),
            ("seed: &a [*a]", r"not valid YAML"),
            ("calm: {seed: [[1]]}", r"seed must be a value, a list of values or"),
            ("learning_rate: nan", r"mine\.yaml: --learning_rate must be at least 0, got nan"),
        ],
    )
    def test_mistakes_are_named(self, yaml_file, content, complaint):
        with pytest.raises(UserError, match=complaint):
            parse("--config", yaml_file(content))

    def test_unknown_recipe_lists_the_known_ones(self):
        with pytest.raises(UserError, match=r"'calm-xxl' is neither .*calm-xl"):
            parse("--config", "calm-xxl")


class TestRecipes:
    def test_all_presets_exist(self):
        assert recipe_names() == PRESETS.split()

    @pytest.mark.parametrize("name", PRESETS.split())
    def test_each_parses_for_each_of_its_stages(self, name):
        for stage in recipe_stages(name):
            words = recipe_arguments(load_recipe(name, stage))
            if stage not in PRETRAINING:
                words.append("--model_name_or_path=runs/calm")
            job = parse_arguments([*words, "--bf16", "False", "--use_cpu"], stage)
            assert job.training.do_train and job.training.seed == 1
            assert job.training.adam_beta2 == 0.95 and job.training.weight_decay == 0.1

    @pytest.mark.parametrize("flag", ["--train_file=a.jsonl", "--train-file=a.jsonl"])
    def test_a_text_on_the_command_line_replaces_the_recipes(self, flag):
        words = ["--config", "small", flag, "--output_dir", "out", "--use_cpu"]
        data = parse_arguments([*words, "--bf16", "False"], Stage.AUTOENCODER).data
        assert data.train_file == "a.jsonl" and not data.dataset_name
        words[2] = "--dataset_name=embedded:topics"
        data = parse_arguments([*words, "--bf16", "False"], Stage.AUTOENCODER).data
        assert data.dataset_name == "embedded:topics" and not data.train_file
        words[2:] = ["--output_dir", "train_file", "--use_cpu"]  # a value is no flag
        data = parse_arguments([*words, "--bf16", "False"], Stage.AUTOENCODER).data
        assert data.dataset_name == "embedded:docstrings"


class TestOverrides:
    def test_derived_fields_are_derived_anew(self):
        config = build_config(LlamaConfig, parse_overrides("hidden_size=128,num_attention_heads=4"))
        assert (config.head_dim, config.num_key_value_heads) == (32, 4)

    def test_derived_fields_of_a_base_are_derived_anew(self):
        base = LlamaConfig(hidden_size=256, num_attention_heads=8)
        assert (base.head_dim, base.num_key_value_heads) == (32, 8)
        narrow = build_config(LlamaConfig, {"hidden_size": "64", "num_attention_heads": "4"}, base)
        assert (narrow.head_dim, narrow.num_key_value_heads) == (16, 4)
        grouped = LlamaConfig(hidden_size=256, num_attention_heads=8, num_key_value_heads=2)
        assert (
            build_config(LlamaConfig, {"num_attention_heads": "4"}, grouped).num_key_value_heads
            == 2
        )

    def test_values_have_the_type_of_their_field(self):
        overrides = parse_overrides(
            "beta=1,noise_size=8, targets = sample,has_start_patch=true,embedding_std=none"
        )
        config = build_config(CALMConfig, overrides, extras={"rope_theta": float}, latent_size=16)
        assert (config.beta, config.noise_size, config.targets, config.latent_size) == (
            1,
            8,
            "sample",
            16,
        )
        assert config.has_start_patch is True and config.embedding_std is None

    def test_constructor_only_fields(self):
        overrides = {"rope_theta": "5e5"}
        config = build_config(CALMConfig, overrides, extras={"rope_theta": float})
        assert config.rope_parameters["rope_theta"] == 5e5

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("hiden_size=3", r"CALMConfig has no field 'hiden_size'; did you mean hidden_size"),
            ("transformers_version=4", "has no field 'transformers_version'"),
            ("hidden_size", "expected name=value pairs .* got 'hidden_size'"),
            ("beta=two", "beta expects int or float, got 'two'"),
            ("hidden_size=1.5", r"hidden_size expects int, got '1\.5'"),
            ("targets=exact", "targets expects 'analytic' or 'antithetic' or 'sample'"),
            ("has_start_patch=maybe", "has_start_patch expects bool"),
            ("beta=2", r"beta must lie in \(0, 2\)"),
            ("num_samples=1,head_type=energy", "num_samples must be at least 2"),
        ],
    )
    def test_mistakes_are_named(self, text, complaint):
        with pytest.raises(UserError, match=complaint):
            build_config(CALMConfig, parse_overrides(text))


@pytest.mark.parametrize("stage", list(Stage))
def test_help_fits_three_screens_and_shows_each_flag_once(stage, capsys):
    with pytest.raises(SystemExit) as done:
        parse("--help", stage=stage)
    shown = capsys.readouterr().out
    assert done.value.code == 0 and len(shown.splitlines()) < 150
    first_words = [line.split()[0] for line in shown.splitlines() if line.strip()]
    for flag in ("--config", "--train_file", "--max_steps", "--max_train_seconds"):
        assert first_words.count(flag) == 1
    assert "--fsdp" not in shown and "TrainingArguments works too" in shown


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            ("--lerning_rate 1", r"unknown flag --lerning_rate; did you mean --learning_rate.*\?$"),
            ("stray", "unknown flag stray"),
            ("--learn 1", "unknown flag --learn"),
            ("--learning_rate fast", "argument --learning_rate.*'fast'"),
            ("--eval_strategy sometimes", "eval.strategy"),
            ("--text_unit word", "text_unit must be line, paragraph or file"),
            ("--backend cuda", "backend must be one of auto, reference, torch, triton"),
            ("--eval_num_samples 1", "eval_num_samples must be at least 2"),
            ("--max_train_seconds -1", "max_train_seconds must be at least 0"),
            ("--streaming", "a stream has no length: pass max_steps"),
            ('--accelerator_config {"split_batches":true}', "split_batches would give draws"),
            ("--max_steps -5", "--max_steps must be at least 1, or -1, got -5"),
            ("--block_size 0", "--block_size must be at least 1, got 0"),
            ("--per-device-train-batch-size 0", "batch_size must be at least 1"),
            ("--gradient_accumulation_steps 0", "accumulation_steps must be at least 1"),
            ("--max_train_seconds nan", "max_train_seconds must be at least 0, got nan"),
            ("--max_grad_norm inf", "max_grad_norm must be at least 0, got inf"),
            ("--neftune_noise_alpha nan", "neftune_noise_alpha must be a finite number, got nan"),
            ("--adam_beta1 1", r"adam_beta1 must be in \[0, 1\), got 1"),
            ("--seed -1", r"seed must be in \[0, 4294967295\], got -1"),
            ("--label_smoothing_factor 0.1", "label_smoothing_factor has no effect"),
            ("--eval_on_start", "eval_on_start needs text to evaluate on"),
            ("--report_to nobody", "report_to: no tracker 'nobody' is installed here"),
            ("--lr_scheduler_kwargs [1]", "lr_scheduler_kwargs must be JSON such as"),
            ('--lr_scheduler_kwargs {"x":1}', "lr_scheduler_kwargs: wrong for .*=linear"),
            ("--deepspeed x.json", "deepspeed is not installed"),
        ],
    )
    def test_with_a_reason(self, words, complaint):
        with pytest.raises(UserError, match=complaint):
            parse(*words.split())

    def test_copies_of_a_published_recipe_wait_on_a_cpu(self):
        """Where pinned memory and copies beside the work have no use, and warn."""
        training = parse("--config", "baseline-s", "--bf16", "False", stage=Stage.BASELINE).training
        loading = training.accelerator_config
        assert loading.dispatch_batches is False and loading.non_blocking is False
        assert training.dataloader_pin_memory is False

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            ("--muon_learning_rate 1e-3", "muon_learning_rate=0.001 needs whole matrices"),
            ("--save_only_model", "save_only_model=True would leave shards"),
            ("--do_eval --model_name_or_path x", "fsdp shards the weights of a training"),
            ("--torch_compile", "torch_compile compiles layers whose weights are whole"),
            ('--fsdp_config {"cpu_offload":true}', "cpu_offload is not supported"),
            ('--fsdp_config {"min_num_params":9}', "min_num_params has no effect.*got 9"),
            ('--fsdp_config {"state_dict_type":"FULL_STATE_DICT"}', "must be SHARDED_STATE_DICT"),
        ],
    )
    def test_with_shards(self, words, complaint):
        with pytest.raises(UserError, match=complaint):
            parse("--fsdp", *words.split())

    def test_of_a_launcher(self, monkeypatch):
        """What `accelerate launch --use_fsdp` puts into the environment counts as the flag."""
        assert not parse().training.is_sharded
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(UserError, match=r"fsdp version must be 2 .*, got 1"):
            parse()
        monkeypatch.setenv("FSDP_VERSION", "2")
        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
        training = parse().training
        assert training.is_sharded and os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
        with pytest.raises(UserError, match="this one is alone: start them with torchrun"):
            check_processes(training)
        monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
        with pytest.raises(UserError, match="cpu_offload is not supported"):
            parse()

    def test_autoencoder_flag_where_it_means_nothing(self):
        with pytest.raises(UserError, match="ae_name_or_path belongs to the language model"):
            parse("--ae_name_or_path", "x", stage=Stage.BASELINE)
