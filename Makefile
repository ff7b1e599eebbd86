# `make train` and `make test` install what they need. ARGS="..." is passed to the command:
# make train ARGS="--train.num_steps 60"
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help venv dev bench-deps eval-bench-deps data-bench-deps plan-deps data-deps \
  browser-deps train bench corpus corpus-scale test test-slow test-chaos test-disk test-slurm \
  fuzz chaos gpu \
  gpu-from-pypi gpu-bundle gpu-rehearse lint types audit lock notebooks docs clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

venv: $(VENV)/.installed  ## make .venv and install requirements.txt

dev: $(VENV)/.installed-dev  ## and what tests and lint need

bench-deps: dev  ## and torch and transformers, which benchmarks and tests compare with
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt

eval-bench-deps: dev  ## and lm-eval, for benchmarks/evaluation.py and the test against it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-eval-bench.txt

data-bench-deps: dev  ## and datatrove, for benchmarks/data_pipeline.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -r requirements-data.txt -r requirements-data-bench.txt

plan-deps: venv  ## and the CUDA and TPU compilers, for plan and kernels (1.5 GB, no driver needed)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-plan.txt

data-deps: venv  ## and what the data pipeline needs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-data.txt

browser-deps: dev  ## and playwright, for the tests in a browser (apt-get install chromium)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-browser.txt

train: venv  ## train a small model on bundled text: minutes on two cores
	exec $(BIN)/python -m baichuan_jax.train --config configs/tiny.yaml $(ARGS)

bench: bench-deps eval-bench-deps data-bench-deps plan-deps  ## all benchmarks: ten minutes
	exec $(BIN)/python benchmarks/all.py $(ARGS)

CORPUS := runs/corpus
corpus: data-deps  ## clean bundled text with planted noise, and score the result: minutes
	$(BIN)/python benchmarks/corpus_truth.py --output $(CORPUS)/truth --megabytes 12
	$(BIN)/python -m baichuan_jax.data.pipeline --config configs/corpus.yaml \
	  --input '$(CORPUS)/truth/corpus-*.jsonl' --output $(CORPUS)/cleaned $(ARGS)
	$(BIN)/python benchmarks/corpus_score.py --corpus $(CORPUS)/truth --result $(CORPUS)/cleaned
	@echo "funnel: $(CORPUS)/cleaned/funnel.html and funnel.png; clean text: $(CORPUS)/cleaned/final/"

corpus-scale: data-deps  ## cost of the data pipeline by corpus size, 25 to 400 MB: half an hour
	exec $(BIN)/python benchmarks/data_pipeline.py scale $(ARGS)

# Workers of pytest-xdist. Each takes file after file, in the order that tests/conftest.py gives.
WORKERS ?= 2
PARALLEL := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test: dev  ## the tests, six minutes on two cores
	exec $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not chaos" $(ARGS)

test-slow: dev  ## the tests that are left out of `make test`
	exec $(BIN)/python -m pytest $(PARALLEL) -m slow $(ARGS)

test-chaos: dev  ## the tests of spares and of every kind of fault, many minutes
	exec $(BIN)/python -m pytest -m chaos $(ARGS)

test-disk: dev  ## a kill and every error of a disk at every call of every command: days (gcc)
	FAULTY_DISK_TESTS=all exec $(BIN)/python -m pytest tests/test_disk.py tests/test_restart.py $(ARGS)

# Minutes of `make fuzz`, divided evenly over the formats.
MINUTES ?= 60
fuzz: dev  ## damaged files of every format with random seeds, an hour (MINUTES=600)
	PYTHONPATH=. JAX_PLATFORMS=cpu exec $(BIN)/python -W ignore tests/fuzz --minutes $(MINUTES) $(ARGS)

test-slurm: dev  ## training under a real Slurm here (root; apt-get install slurm-wlm munge)
	exec unshare --mount --net --pid --fork --mount-proc --kill-child \
	  $(BIN)/python -m pytest tests/resilience/test_slurm.py $(ARGS)

chaos: dev  ## real faults at random moments to a real run, losses compared
	exec $(BIN)/python benchmarks/chaos.py $(ARGS)

# The CUDA of `make gpu`: requirements-cuda12.txt or requirements-cuda13.txt.
CUDA ?= 13
BUNDLE := dist/gpu-bundle
gpu:  ## checks and measurements on a GPU, nine minutes; from dist/gpu-bundle or PyPI (CUDA=12, 13)
	@ls /dev/nvidia* >/dev/null 2>&1 || command -v nvidia-smi >/dev/null || { \
	  echo "no NVIDIA GPU is seen here; make gpu-rehearse runs on a CPU" >&2; exit 2; }
	@if [ -d $(BUNDLE) ]; then \
	  echo "installing $(BUNDLE) beside the packages of $(PYTHON)"; \
	  PYTHON=$(PYTHON) bash benchmarks/gpu_bundle.sh $(BUNDLE) $(ARGS); \
	else \
	  echo "no $(BUNDLE): installing requirements-cuda$(CUDA).txt into $(VENV)"; \
	  $(MAKE) --silent gpu-from-pypi; \
	fi

gpu-from-pypi: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-cuda$(CUDA).txt
	exec $(BIN)/python benchmarks/gpu.py $(ARGS)

gpu-bundle:  ## wheels for a GPU machine without a network, into dist/gpu-bundle
	$(PYTHON) benchmarks/gpu_bundle.py --output $(BUNDLE)

# Python 3.12 with the packages of benchmarks/gpu_image.txt, on a CPU.
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python) python3.12)
REHEARSAL := runs/gpu-rehearsal
gpu-rehearse: .venv-gpu/.installed  ## make gpu at small sizes on a CPU: eight minutes
	.venv-gpu/bin/python benchmarks/gpu_bundle.py --output $(REHEARSAL)-bundle
	rm -rf $(REHEARSAL)
	JAX_PLATFORMS=cpu PYTHON=.venv-gpu/bin/python bash benchmarks/gpu_bundle.sh \
	  $(REHEARSAL)-bundle --rehearse --minutes 16 --output $(REHEARSAL) $(ARGS)

lint: dev  ## ruff: lint and format; bandit: calls that are dangerous
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive baichuan_jax benchmarks docs .ci

types: dev  ## pyright on the package
	$(BIN)/pyright --pythonpath $(BIN)/python

audit: dev  ## known vulnerabilities of what the container installs (asks PyPI)
	exec $(BIN)/python .ci/audit.py launch/*.lock

# A release counts from its second week on: one that was hijacked is usually found by then. With
# the build backend, which the container installs too.
BACKEND := import tomllib; \
  print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")
lock: dev  ## newest versions for the container, with hashes, into launch/*.lock (asks PyPI)
	for cuda in 12 13; do \
	  $(BIN)/python -c '$(BACKEND)' | $(BIN)/uv --no-config pip compile --quiet --upgrade \
	    --python-version 3.12 --python-platform linux --only-binary :all: --generate-hashes \
	    --exclude-newer "1 week" --annotation-style line --custom-compile-command "make lock" \
	    --output-file launch/requirements-cuda$$cuda.lock requirements-cuda$$cuda.txt - || exit; \
	done

notebooks: dev plan-deps data-deps  ## execute all notebooks, four minutes
	PYTHONPATH="$(CURDIR)" $(BIN)/jupyter-execute --timeout=600 notebooks/*.ipynb

docs: dev  ## the documentation as a site, in site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	$(BIN)/python docs/write_configuration.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:  ## remove environments and caches; runs stay
	rm -rf .venv .venv-* cache .pytest_cache .ruff_cache

.venv-gpu/.installed: benchmarks/gpu_image.txt
	$(PYTHON312) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/gpu_image.txt
	touch $@

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
