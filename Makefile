# Everything a developer runs. Each target makes its own virtual environment first.
VENV    ?= .venv
WORKERS ?= auto
# The first of these that runs and is Python 3.11 or newer.
PYTHONS ?= python3 python3.11 python3.12 python3.13
# Where to look for wheels besides PyPI. On Linux without a GPU, PyPI's torch brings 2 GB of CUDA libraries:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# What make test leaves out or is limited to.
TESTS   ?= not gpu
EXTRAS  ?= compile,onnxruntime,cuda,cuda-compile,serve,dev
# What make demo compiles with.
RECIPE  ?= int4-cpu

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo lint check test test-gpu bench soak docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Modules are compiled when first imported, not all at once: that takes a minute for files nobody reads.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { \
	  for p in $(PYTHONS); do \
	    $$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
	      { echo "making $(VENV) with $$p"; $$p -m venv $(VENV) && exit 0; }; \
	  done; echo "no Python 3.11 or newer among: $(PYTHONS)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP) ## Compile the embedded model, show what was done, generate text from it
	$(BIN)/llmopt compile models/classics-2m -r $(RECIPE) -o build/demo
	$(BIN)/llmopt inspect build/demo
	$(BIN)/llmopt run build/demo --prompt 'The old house stood' --max-tokens 60 --temperature 0.7 --seed 1
	$(BIN)/llmopt bench build/demo --prompt-len 64 --gen-len 32

lint: $(STAMP) ## Format, lint, types, import contracts, benchmark pages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror targets/onnxruntime/native/*.[ch] targets/cuda/kernels/*.cu*
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/render.py --check

check: lint ## The same and the fast tests (six minutes on two slow cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m 'not slow and not gpu'

test: $(STAMP) ## Everything that runs without a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m '$(TESTS)'

test-gpu: $(STAMP) ## The tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu

bench: $(STAMP) ## Measure the embedded model in every CPU recipe and append the rows
	for recipe in fp32-cpu int8-cpu int4-cpu; do \
	  $(BIN)/llmopt compile models/classics-2m -r $$recipe -o build/bench/$$recipe && \
	  $(BIN)/llmopt bench build/bench/$$recipe --append benchmarks/rows/embedded.jsonl || exit 1; \
	done
	$(BIN)/python benchmarks/render.py

soak: $(STAMP) ## 10,000 mixed requests from 64 clients against the embedded model; fails when one is lost or memory grows
	$(BIN)/llmopt compile models/classics-2m -r fp32-cpu -o build/soak --max-context 512
	$(BIN)/python benchmarks/soak.py build/soak --requests 10000 --kill-engine

docs: $(STAMP) ## Regenerate docs' tables from benchmarks/rows
	$(BIN)/python benchmarks/render.py

clean: ## Remove what the targets above made
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
