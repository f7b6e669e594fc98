# Everything runs in .venv, which `make setup` creates from constraints.txt; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# The CPU build of torch is fetched from here when the machine has no NVIDIA or AMD GPU.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=
BUDGET ?= 540
# OpenMP threads that wait spin. With two cores or fewer another program would then slow training many
# times over, so they sleep there.
ifndef OMP_WAIT_POLICY
WAIT := $(shell [ "$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)" -gt 2 ] || echo OMP_WAIT_POLICY=PASSIVE)
endif

BIN := $(VENV)/bin
# Without byte code, which Python writes for the modules that it imports: half the time.
INSTALL := $(BIN)/pip --disable-pip-version-check install -q --no-compile
READY := $(VENV)/.ready
OLDEST := .venv-oldest
# Tests on every core, one thread each; threads of programs that they start sleep while they wait.
PARALLEL := -n auto --dist worksteal --benchmark-disable
TESTS = OMP_WAIT_POLICY=PASSIVE $(1)/bin/python -m pytest -q $(PARALLEL)

# The theme's notice of its end of life (mkdocs.yml says when) is not repeated in every build.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

.DEFAULT_GOAL := help
.PHONY: help setup demo pretrained test suite test-long test-oldest test-harness test-browser test-gpu lint format types check bench bench-gpu \
  audit docs docs-serve notebook compile-report clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv and install the package with its tested dependencies

$(READY): pyproject.toml setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(0 if (3, 11) <= v < (3, 13) else f"Python 3.11 or 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null || command -v rocm-smi >/dev/null; then \
	  $(INSTALL) --no-deps -c $(CONSTRAINTS) torch; \
	else \
	  echo "no GPU found: installing the CPU build of torch"; \
	  $(INSTALL) --no-deps --retries 0 --timeout 30 --index-url $(TORCH_CPU_INDEX) -c $(CONSTRAINTS) torch \
	  || { echo "$(TORCH_CPU_INDEX) did not provide it: installing torch from the default index"; \
	       $(INSTALL) --no-deps -c $(CONSTRAINTS) torch; }; \
	fi
	$(INSTALL) -c $(CONSTRAINTS) -e '.[dev,triton]'
	@touch $@

demo: $(READY) ## train, evaluate and sample a small CALM on two cores in minutes; writes runs/demo
	$(WAIT) $(BIN)/calm demo $(ARGS)

# Trained in runs/docstrings; a stage that was stopped goes on. ARGS are flags of training.
PRETRAINED = calm/pretrained/calm-docstrings
EXPORT = $(BIN)/calm export --overwrite --license mit
pretrained: $(READY) ## train, score and store the models that come with the package: about an hour of one core
	$(WAIT) $(BIN)/calm train-ae --config docstrings --output_dir runs/docstrings/autoencoder $(ARGS)
	$(WAIT) $(BIN)/calm train --config docstrings --ae_name_or_path runs/docstrings/autoencoder \
	  --output_dir runs/docstrings/calm $(ARGS)
	$(WAIT) $(BIN)/calm train-ar --config docstrings --output_dir runs/docstrings/baseline $(ARGS)
	$(EXPORT) --model runs/docstrings/calm --output $(PRETRAINED)
	$(EXPORT) --model runs/docstrings/baseline --output $(PRETRAINED)-baseline

test: lint ## lint, types and the tests that need no GPU and no browser (under 20 minutes on two cores)
	$(MAKE) -j2 types suite

suite: $(READY) ## these tests alone
	$(call TESTS,$(VENV)) -m "not gpu and not browser and not long" $(ARGS)

test-long: $(READY) ## whole runs through the command line, torchrun, the compiler and a loaded server (minutes)
	$(call TESTS,$(VENV)) -m long $(ARGS)

test-oldest: ## the tests with the oldest supported torch, Triton and transformers, in .venv-oldest
	$(MAKE) VENV=$(OLDEST) CONSTRAINTS=constraints-oldest.txt setup
	$(call TESTS,$(OLDEST)) -m "not gpu and not browser" $(ARGS)

test-gpu: $(READY) ## the compiled kernels at full size: parity, graphs, torch.compile
	$(BIN)/python -m pytest -q tests/gpu $(ARGS)

test-harness: $(READY) ## install the lm-evaluation-harness and test the models in it
	$(INSTALL) -c $(CONSTRAINTS) -e '.[harness]'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/calm/test_lm_eval.py $(ARGS)

test-browser: $(READY) ## install selenium and, where there is apt-get, Chromium; drive the playground in it
	@command -v chromedriver >/dev/null || apt-get install -y --no-install-recommends chromium chromium-driver \
	  || { echo "make test-browser: install Chromium and chromedriver, then try again"; exit 1; }
	$(INSTALL) -c $(CONSTRAINTS) -e '.[browser]'
	$(BIN)/python -m pytest -q -m browser tests/calm/test_serving_browser.py $(ARGS)

docs: $(READY) ## install what builds the documentation site, and build it in build/site
	$(INSTALL) -c $(CONSTRAINTS) -e '.[docs]'
	$(MKDOCS) build --strict $(ARGS)

docs-serve: docs ## the site at http://127.0.0.1:8000, built again when a page changes
	$(MKDOCS) serve --strict $(ARGS)

notebook: $(READY) ## install what runs notebooks, run docs/notebook.ipynb and keep what it prints
	$(INSTALL) -c $(CONSTRAINTS) -e '.[notebook]'
	$(WAIT) $(BIN)/jupyter-execute --inplace docs/notebook.ipynb

lint: $(READY) ## ruff, format check and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

format: $(READY) ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) ## type-check both packages
	$(BIN)/mypy

check: lint types ## lint, types and the fast tests (under 5 minutes)
	$(call TESTS,$(VENV)) -m "not gpu and not slow and not long and not browser" $(ARGS)

bench: $(READY) ## benchmarks on this machine; parity is asserted before anything is timed
	$(BIN)/python -m pytest benchmarks -q --benchmark-only $(ARGS)

bench-gpu: $(READY) ## benchmarks of kernels and decoding on this GPU; writes benchmarks/results/<device>*.json
	$(BIN)/python -m benchmarks.gpu.run $(ARGS)
	$(BIN)/python -m benchmarks.gpu.decoding

audit: $(READY) ## known vulnerabilities of the tested versions; needs pypi.org
	@$(BIN)/pip-audit --progress-spinner off --strict --no-deps --disable-pip -r $(CONSTRAINTS) \
	  || { echo "make audit: a version above is vulnerable, or pypi.org, which knows, could not be reached"; exit 1; }

campaign: $(READY) ## everything above on this GPU within BUDGET seconds; writes runs/campaign/report.json
	$(BIN)/python -m benchmarks.gpu.campaign --budget $(BUDGET) --output runs/campaign $(ARGS)

compile-report: $(READY) ## compile every kernel for all targets; fails on a spill or a broken budget
	$(BIN)/python -m calm_kernels.compile_report $(ARGS)

clean: ## remove environments, caches, builds and runs
	rm -rf $(VENV) $(OLDEST) runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
