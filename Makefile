# Everything runs in a virtual environment that make sets up: .venv, or VENV=elsewhere.
PYTHON ?= python3
VENV ?= .venv
# The torch build: your package index's default (on Linux usually CUDA), or that of another index, for instance
# PyTorch's CPU wheels: make demo TORCH_INDEX=<address of the index>. TORCH takes a wheel file as well.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# A folder of validation texts, LANGUAGE/*.val.jsonl.zst; with it, `make bench` measures the tokenizer too.
CORPUS ?=
# A Python that has chatglm-cpp and llama-cpp-python (benchmarks/chatglm.py); with it, `make bench` measures them too.
PEERS ?=
# Processes that tests run in; each holds up to 3 GB.
WORKERS ?= 2

export NO_MKDOCS_2_WARNING := 1

BIN := $(VENV)/bin
PYTEST := $(BIN)/pytest --numprocesses=$(WORKERS) --dist=worksteal
KERNEL := setup.py $(wildcard src/gmask/native/csrc/*)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check bench gpu bundled bundled-chat docs clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## fill blanks in English and Chinese with the bundled model
	$(BIN)/gmask infill \
	  "She poured a cup of [MASK] and sat down by the window." "Please close the [MASK] when you leave the room." \
	  "他每天早上七点[MASK]床。" "我妹妹在一家医院[MASK]作。"
	$(BIN)/gmask infill "The dog ran after the [MASK]." -n 5
	@echo "The first four are of forty plain sentences, 21 of which the model fills acceptably, 25 with -n 5; its card has them all."

test: $(VENV)/.installed-dev  ## run the default tests
	$(PYTEST) -m "not slow and not gpu"

test-all: $(VENV)/.installed-dev  ## run the slow tests too, and the GPU ones where there is a GPU
	$(PYTEST) $(if $(shell command -v nvidia-smi),,-m "not gpu")

check: $(VENV)/.installed-dev  ## lint, types, import layers, documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed-dev  ## measure against peers, all in one run, and draw the plot of the README
	@failed=; \
	$(BIN)/python benchmarks/bench.py $(if $(CORPUS),--corpus $(CORPUS)) $(if $(PEERS),--peers-python $(PEERS)) || \
	  failed="$$failed bench.py (which names the scripts)"; \
	$(BIN)/python benchmarks/pretraining_run.py || failed="$$failed pretraining_run.py"; \
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

gpu: $(VENV)/.installed-dev  ## test and measure all that needs a GPU, on one H100 or H200, in nine minutes
	$(BIN)/python benchmarks/gpu.py --out runs/gpu

bundled: $(VENV)/.installed-dev  ## train, evaluate and ship the bundled model: make bundled CORPUS=folder
	$(BIN)/gmask pretrain recipes/bundled.yaml data.root=$(CORPUS)
	cp runs/bundled/model/* src/gmask/pretrained/
	$(BIN)/gmask evaluate bundled --recipe recipes/bundled.yaml --corpus $(CORPUS) --sentences 1000
	$(BIN)/python recipes/judge_sentences.py answer --output runs/bundled/answers.jsonl
	$(BIN)/python recipes/bundled_card.py src/gmask/pretrained --output src/gmask/pretrained/README.md \
	  $(if $(HARDWARE),--hardware "$(HARDWARE)")

bundled-chat: $(VENV)/.installed-dev  ## tune, measure and ship the bundled chat model: make bundled-chat SFT=folder
	$(BIN)/python recipes/chat_data.py $(SFT) data/chat
	$(BIN)/gmask finetune recipes/bundled-chat.yaml
	mkdir -p src/gmask/pretrained/chat
	cp runs/bundled-chat/model/* runs/bundled-chat/results.json src/gmask/pretrained/chat/
	$(BIN)/python benchmarks/chat_quality.py data/chat/validation.jsonl --limit 400 --json > src/gmask/pretrained/chat/quality.json
	$(BIN)/python recipes/chat_card.py runs/bundled-chat src/gmask/pretrained/chat/quality.json \
	  --output src/gmask/pretrained/chat/README.md $(if $(HARDWARE),--hardware "$(HARDWARE)")

docs: $(VENV)/.installed-dev  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean:  ## remove what was built, the virtual environment included
	rm -rf $(VENV) site build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "gmask needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "This Python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes first: whichever build it is then satisfies the constraint.
$(VENV)/.torch: | $(BIN)/python
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(KERNEL) | $(VENV)/.torch
	$(PIP) -c constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(KERNEL) | $(VENV)/.torch
	$(PIP) -c constraints.txt --editable '.[dev,train,serve,webui]'
	@touch $@ $(VENV)/.installed
