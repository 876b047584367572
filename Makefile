# Every target works on a machine with Python 3.10 or newer, git and make: the first one run creates .venv.
# Options for a script go into ARGS:  make compare ARGS="--preset full"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=
INSTALLED := .venv/.installed
BIN := .venv/bin
PADDLE := .venv-paddle

.PHONY: help compare ablate results table test test-browser test-paddle soak lint docs bench pretrain clean

help:
	@echo "make compare   train agents from the shipped base policy and compare them on held-out words (runs/)"
	@echo "make ablate    the paper's ablations; ARGS=m for one of them (hours for all)"
	@echo "make results   what is in results/, again: many hours"
	@echo "make table     the tables of README.md and results/README.md, from results/quick"
	@echo "make test      run the tests in two processes; ARGS='-n 8' for more"
	@echo "make test-browser  open the report, TensorBoard and the site in headless Chromium"
	@echo "make test-paddle  test the PaddleOCR engine, in an environment of its own (.venv-paddle)"
	@echo "make soak      runs that are killed and go on, a thousand updates in flat memory, a reward service under fire"
	@echo "make lint      run ruff and mypy"
	@echo "make docs      build the documentation as a site, build/site/index.html, and fail on a broken link"
	@echo "make bench     time the environment, the reward, sampling and updates"
	@echo "make pretrain  train the tokenizer and the base policy from scratch"
	@echo "make clean     remove .venv, .venv-paddle and caches; runs/ stays"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[dev,docs]"
	touch $@

compare: $(INSTALLED)
	$(BIN)/python examples/compare.py $(ARGS)

ablate: $(INSTALLED)
	$(BIN)/python examples/ablate.py $(ARGS)

results: $(INSTALLED)
	$(BIN)/python examples/compare.py --preset full --out runs/full
	$(BIN)/python examples/ablate.py m alpha --out runs/ablate
	$(BIN)/python examples/theory.py
	for run in full ablate; do mkdir -p results/$$run && cp runs/$$run/*.md runs/$$run/*.json runs/$$run/*.png results/$$run; done

table: $(INSTALLED)
	$(BIN)/python docs/_hooks/pages.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# In Debian's Chromium, or that whose path is in CHROMIUM.
test-browser: docs
	@command -v $${CHROMIUM:-chromium} >/dev/null || { echo "error: no Chromium here: apt-get install chromium, or give its path as CHROMIUM"; exit 1; }
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,browser]"
	$(BIN)/python -m pytest -m browser tests/test_browser.py $(ARGS)

# PaddleOCR needs an older numpy and OpenCV than the results were made with.
$(PADDLE)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PADDLE)
	grep -v -e '^numpy' -e '^opencv' constraints.txt > $(PADDLE)/constraints.txt
	$(PADDLE)/bin/pip install -c $(PADDLE)/constraints.txt -e ".[paddle]" pytest
	touch $@

test-paddle: $(PADDLE)/.installed
	$(PADDLE)/bin/python -m pytest tests/test_paddle_engine.py $(ARGS)

# What takes too long for a test. Its last result is in docs/scaling.md.
soak: $(INSTALLED)
	$(BIN)/python -m pytest -m soak
	$(BIN)/python examples/soak_training.py --out results/soak $(ARGS)
	$(BIN)/python examples/soak_service.py --out results/soak

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

# The hooks read the agents' options from this clone's packages.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python examples/bench.py $(ARGS)

pretrain: $(INSTALLED)
	$(BIN)/python examples/pretrain.py $(ARGS)

clean:
	rm -rf .venv .venv-paddle .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
