# One command a habit. Each makes .venv first, and is quick when nothing changed since.
#
#   make serve     the demo model on port 8000; PORT= MODEL= and ARGS= change that
#   make check     lint, format, types and the fast tests: what CI runs
#   make test      the fast tests alone, some with libtpu (see make tpu) where it can be fetched
#   make slow      the tests that take longer or need weights
#   make fix       format and mend             make bench   the tables of tests/bench; BENCH=name for one
#   make tpu       compiles kernels and steps for TPUs, with libtpu in a folder of its own; no TPU is needed
#   make gpu       the same for an H100, with JAX's CUDA plugin; no GPU is needed
#   make builds    a table of published models compiled for TPU and GPU hosts; ARGS="--only v6e" for some
#   make plots     the pictures of README, of what make bench measured
#   make parity    Hugging Face's own code over the golden checkpoints, compared; torch gets a venv of its own
#   make clients   other people's clients against a real server, each in a venv of its own; CLIENTS=name for one

SHELL := /bin/bash
.DEFAULT_GOAL := check
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
PORT ?= 8000
MODEL ?=
ARGS ?=
BENCH ?= $(filter-out builds peer_model plots test_%,$(basename $(notdir $(wildcard tests/bench/*.py))))
PARITY_VENV := .cache/parity
PARITY := $(PARITY_VENV)/.ready
CLIENT_VENVS := .cache/clients
CLIENTS ?= openai2 openai3 langchain litellm instructor lm_eval aiperf generated
NEEDS_openai2 := 'openai>=2,<3'
NEEDS_openai3 := 'openai>=3,<4'
NEEDS_langchain := langchain-openai
NEEDS_litellm := litellm mcp
NEEDS_instructor := instructor
NEEDS_lm_eval := 'lm-eval[api]' transformers
NEEDS_aiperf := aiperf
NEEDS_generated := openapi-python-client ruff
CLIENT_PYTEST := -m pytest -q -m clients -o addopts= -W ignore -p no:cacheprovider --import-mode=importlib
# Tests mostly compile; two at a time suit two cores.
WORKERS ?= 2

# The first Python that runs, is new enough and can make an environment. A shim of a version manager may exist
# and refuse to run, so each is asked.
define FIND_PYTHON
for p in "$$PYTHON" python3.12 python3.13 python3.11 python3; do \
  if [ -n "$$p" ] && "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
  then echo "$$p"; exit 0; fi; \
done; \
echo "no Python 3.11 or newer with the venv module was found; install one (on Debian: python3-venv) or set PYTHON" >&2; \
exit 1
endef

.PHONY: serve check test slow tpu gpu builds fix parity clients bench plots lint types clean

serve: $(READY)
	$(PY) -m runtime.serve $(MODEL) --port $(PORT) $(ARGS)

check: lint types test

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY)
	$(PY) -m pyright

# The tests that compile for a TPU are skipped where its compiler is neither here nor to be had.
test: $(READY)
	@$(MAKE) -s .cache/tpu/.ready || echo "The TPU's compiler could not be fetched; make .cache/tpu/.ready tries again" >&2
	$(PY) -m pytest -q -n $(WORKERS) $(ARGS)

slow: $(READY)
	$(PY) -m pytest -q -m "slow or weights" $(ARGS)

# Compilers are kept out of .venv: where they are found, every start of JAX asks them for devices.
tpu: $(READY) .cache/tpu/.ready
	PYTHONPATH=.cache/tpu $(PY) -m pytest -q -m tpu -n $(WORKERS) $$(grep -rl mark.tpu tests --include=test_*.py) $(ARGS)

gpu: $(READY) .cache/gpu/.ready
	PYTHONPATH=.cache/gpu $(PY) -m pytest -q -m gpu -n $(WORKERS) $$(grep -rl mark.gpu tests --include=test_*.py) $(ARGS)

builds: $(READY) .cache/tpu/.ready .cache/gpu/.ready
	PYTHONPATH=.cache/tpu:.cache/gpu $(PY) -m tests.bench.builds $(ARGS)

# The releases that fit the installed JAX: of libtpu the one that it asks for, of the plugin its own.
.cache/tpu/.ready: $(READY)
	libtpu=$$($(PY) -c "import importlib.metadata as m; print(*(r for r in m.requires('jax') if 'libtpu' in r))") && \
	  { [ "$$(cat $@ 2>/dev/null)" = "$$libtpu" ] || $(PY) -m pip install -q --disable-pip-version-check --no-deps \
	  --upgrade --target $(@D) "$${libtpu%%;*}"; } && echo "$$libtpu" >$@

.cache/gpu/.ready: $(READY)
	jax=$$($(PY) -c "import jax; print(jax.__version__)") && $(PY) -m pip install -q --disable-pip-version-check \
	  --no-deps --upgrade --target $(@D) jax-cuda13-plugin==$$jax jax-cuda13-pjrt==$$jax
	@touch $@

fix: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

parity: $(PARITY)
	$(PARITY_VENV)/bin/python tests/golden/make.py --check $(ARGS)

bench: $(READY)
	@for name in $(BENCH); do echo "== $$name"; $(PY) -m tests.bench.$$name $(ARGS) || exit 1; done

plots: $(READY)
	$(PY) -m tests.bench.plots $(ARGS)

clients: $(CLIENTS:%=client-%)

.PRECIOUS: $(CLIENT_VENVS)/%/.ready
# openai2 and openai3 are one file, test_openai_client.py.
client-%: $(READY) $(CLIENT_VENVS)/%/.ready
	@echo "== $*"
	SERVER_PYTHON=$(abspath $(PY)) $(CLIENT_VENVS)/$*/bin/python $(CLIENT_PYTEST) \
	  tests/clients/test_$(if $(filter openai%,$*),openai_client,$*).py $(ARGS)

$(CLIENT_VENVS)/%/.ready: Makefile
	@if ! [ -x $(@D)/bin/python ]; then python=$$($(FIND_PYTHON)) && "$$python" -m venv $(@D); fi
	$(@D)/bin/python -m pip install -q --disable-pip-version-check pytest pytest-asyncio httpx $(NEEDS_$*)
	@touch $@

$(PARITY):
	@if ! [ -x $(PARITY_VENV)/bin/python ]; then \
	  python=$$($(FIND_PYTHON)) && "$$python" -m venv $(PARITY_VENV); fi
	$(PARITY_VENV)/bin/python -m pip install -q --disable-pip-version-check 'torch>=2.9' 'transformers>=5,<6' safetensors
	@touch $@

# pip is asked again only when what the project needs has changed.
$(READY): setup.cfg pyproject.toml
	@if ! [ -x $(PY) ] || ! $(PY) -c 'import pip' 2>/dev/null; then \
	  python=$$($(FIND_PYTHON)) && echo "making $(VENV) with $$python" && "$$python" -m venv --clear $(VENV); fi
	@echo "installing what setup.cfg lists; the first time takes minutes"
	$(PY) -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build dist *.egg-info
