# Everything a fresh machine needs is set up by the target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FONT := /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

.PHONY: serve test test-fast scale-test lint format types check screenshots bench batching curve faults soak fuzz scenarios mutate evaluate art font browser prometheus clean

serve: $(VENV)/.serve  ## start the server with the embedded weights on PAELLERA_HOST:PAELLERA_PORT
	$(BIN)/paellera serve

test: $(VENV)/.dev font browser prometheus  ## run the test suite; ARGS="-m 'not slow'" narrows it
	$(BIN)/pytest $(ARGS)

test-fast: $(VENV)/.dev  ## the tests without a browser, a process or training; ARGS=tests/test_client.py narrows it
	$(BIN)/pytest --fast $(ARGS)

mutate: $(VENV)/.dev  ## plant small faults and count those that the tests catch; ARGS="--count 20 --modules model/rows.py"
	$(BIN)/python -m load_tests.mutate $(ARGS)

scale-test: $(VENV)/.dev  ## the tests that start a Ray of their own
	$(BIN)/pip install --quiet -e '.[scale]'
	$(BIN)/pytest -m ray $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/mypy

check: lint types test

bench: $(VENV)/.dev
	$(BIN)/paellera bench

batching curve fuzz scenarios: $(VENV)/.dev  ## beside whole-request batching; at rising rates; Schemathesis; Locust
	$(BIN)/pip install --quiet -e '.[load]'
	$(BIN)/python -m load_tests.$@ $(ARGS)

faults soak: $(VENV)/.dev  ## everything that can go wrong (ARGS=--under-load: meanwhile requests arrive); ten thousand requests
	$(BIN)/python -m load_tests.$@ $(ARGS)

evaluate: $(VENV)/.dev art  ## PaellaBench on the embedded weights; ARGS=--quick is short
	$(BIN)/python -m model.training.evaluate $(ARGS)

# The objects of the pictures that training and evaluation draw; without them the tests that draw them are skipped and say so.
art: $(VENV)/.dev  ## fetch the objects' art with npm into $PAELLERA_ART, or ~/.cache/paellera/art
	$(BIN)/python -m model.training.art

# The scenes' objects are glyphs of this font; without it the tests that draw them are skipped and say so.
font:
	@test -e $(FONT) || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -qq -y fonts-noto-color-emoji; } \
		|| echo "no $(FONT): install fonts-noto-color-emoji to run the tests that draw objects"

# Drives the playground; without one the tests that do so are skipped and say so.
browser:
	@command -v chromium >/dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -qq -y chromium >/dev/null; } \
		|| echo "no Chromium: install chromium to run the tests of the playground"

screenshots: $(VENV)/.dev browser  ## the documentation's pictures of the playground
	$(BIN)/pytest tests/test_browser.py -k fits --screenshots docs/playground

# Rules, alerts and the dashboard's queries are tested with the real thing.
prometheus:
	@command -v promtool >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
		&& apt-get install -qq -y --no-install-recommends prometheus; } || echo "no promtool: install prometheus to run the tests that need it"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

# Reinstalled when the dependencies change; -e, so a change of the code needs nothing.
$(VENV)/.serve: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet -e '.[dev,train]'
	touch $@ $(VENV)/.serve

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
