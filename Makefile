# Everything a fresh machine needs is set up by the target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Installs Debian packages where that is possible: as root, with apt.
APT_INSTALL := [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -qq -y

# Files with a known hash, and nothing that is not listed (`make lock`).
INSTALL := $(BIN)/pip install --quiet --no-deps --require-hashes
# torch by version alone, from one index: TORCH_INDEX=https://download.pytorch.org/whl/cpu brings the build for CPUs. The default is
# pip's own index.
TORCH_INDEX ?=
INSTALL_TORCH := $(BIN)/pip install --quiet $(TORCH_INDEX:%=--index-url %)
# The locks, resolved for all systems. Packages that come with torch are left out, because they differ by index.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command 'make lock' --index-url https://pypi.org/simple -c requirements/torch.txt \
	--excludes requirements/excluded.txt --no-emit-package torch --no-emit-package torchvision

.DEFAULT_GOAL := help
.PHONY: help serve test test-fast client-test scale-test compile lint format types check screenshots bench batching curve faults soak hostile fuzz scenarios mutate evaluate art browser prometheus nginx exiftool tcmalloc compiler lock audit sbom clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z][a-z -]*:.*## / { printf "%-29s  %s\n", $$1, $$2 }' Makefile

serve: $(VENV)/.serve  ## start the server with the embedded weights on PAELLERA_HOST:PAELLERA_PORT
	$(BIN)/paellera serve

compile: $(VENV)/.serve compiler  ## compile the networks for this CPU; from its next start the server draws in three quarters of the time
	$(BIN)/paellera compile

test: $(VENV)/.dev browser prometheus nginx exiftool tcmalloc compiler  ## run the test suite, two files at a time; ARGS="-m 'not slow'" narrows it
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

test-fast: $(VENV)/.dev  ## the tests without a browser, a process or training, two at a time; ARGS=tests/test_body.py narrows it
	$(BIN)/pytest --fast -n 2 --dist loadfile $(ARGS)

mutate: $(VENV)/.dev  ## plant small faults and count those that the tests catch; ARGS="--count 20 --modules model/rows.py"
	$(BIN)/python -m load_tests.mutate $(ARGS)

client-test: $(VENV)/.dev  ## other people's clients, each in an environment of its own (network); ARGS="--only curl,java"
	$(BIN)/python -m tests.clients $(ARGS)

scale-test: $(VENV)/.dev  ## the tests that start a Ray of their own
	$(INSTALL) -r requirements/scale.txt
	$(BIN)/pytest -m ray $(ARGS)

lint: $(VENV)/.dev  ## Ruff's rules and format, and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## fix what Ruff can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev  ## check the types with mypy
	$(BIN)/mypy

check: lint types test  ## lint, types and test: what CI runs

bench: $(VENV)/.dev  ## measure every stage, the published code, and a server over HTTP
	$(BIN)/paellera bench

batching curve fuzz scenarios: $(VENV)/.dev  ## beside whole-request batching; at rising rates; Schemathesis; Locust
	$(INSTALL) -r requirements/load.txt
	$(BIN)/python -m load_tests.$@ $(ARGS)

faults soak hostile: $(VENV)/.dev  ## faults (ARGS=--under-load: while requests arrive); ten thousand requests; all attacks at once
	$(BIN)/python -m load_tests.$@ $(ARGS)

evaluate: $(VENV)/.dev art  ## PaellaBench on the embedded weights; PRESETS=all: of each preset; ARGS=--quick is short
	$(BIN)/python -m model.training.evaluate $(if $(PRESETS),--presets $(PRESETS)) $(ARGS)

# The objects in the images of training and evaluation; without them the tests that draw them are skipped and say so.
art: $(VENV)/.dev  ## fetch the objects' art with npm into $PAELLERA_ART, or ~/.cache/paellera/art
	$(BIN)/python -m model.training.art

# Drives the playground; without one the tests that do so are skipped and say so.
browser:  ## install Chromium for the tests that need it, as root with apt
	@command -v chromium >/dev/null \
		|| { $(APT_INSTALL) chromium >/dev/null; } \
		|| echo "no Chromium: install chromium to run the tests of the playground"

screenshots: $(VENV)/.dev browser  ## the documentation's images of the playground
	$(BIN)/pytest tests/test_browser.py -k fits --screenshots docs/playground

# Rules, alerts and the dashboard's queries are tested with the real thing.
prometheus:  ## likewise promtool
	@command -v promtool >/dev/null || { $(APT_INSTALL) --no-install-recommends prometheus; } || echo "no promtool: install prometheus to run the tests that need it"

# nginx's configuration, too.
nginx:  ## likewise nginx
	@PATH="$$PATH:/usr/sbin"; command -v nginx >/dev/null || { $(APT_INSTALL) --no-install-recommends nginx-light >/dev/null; } \
		|| echo "no nginx: install nginx-light to run the tests that need it"

# Reads the marks of generated files.
exiftool:  ## likewise exiftool
	@command -v exiftool >/dev/null || { $(APT_INSTALL) --no-install-recommends libimage-exiftool-perl >/dev/null; } \
		|| echo "no exiftool: install libimage-exiftool-perl to run the test that needs it"

# A CPU worker uses it where it is installed.
tcmalloc:  ## likewise tcmalloc
	@ls /usr/lib/*/libtcmalloc*.so.* >/dev/null 2>&1 || { $(APT_INSTALL) --no-install-recommends libtcmalloc-minimal4 >/dev/null; } \
		|| echo "no tcmalloc: install libtcmalloc-minimal4 to run the test that needs it"

# `paellera compile` calls it.
compiler:  ## likewise g++
	@command -v "$${CXX:-g++}" >/dev/null || { $(APT_INSTALL) --no-install-recommends g++ >/dev/null; } \
		|| echo "no g++: install g++ to compile the networks, and to run the test that does"

lock: $(VENV)/.dev  ## pin every dependency with hashes (network); ARGS="--upgrade" or "--upgrade-package NAME"
	$(COMPILE) $(ARGS) pyproject.toml --extra otel -o requirements/serve.txt
	$(COMPILE) $(ARGS) pyproject.toml requirements/build.in --extra otel --extra dev --extra train -c requirements/serve.txt \
		-o requirements/dev.txt
	$(COMPILE) $(ARGS) requirements/build.in -c requirements/dev.txt -o requirements/build.txt
	$(COMPILE) $(ARGS) pyproject.toml --extra load -c requirements/dev.txt -o requirements/load.txt
	$(COMPILE) $(ARGS) pyproject.toml --extra scale -c requirements/dev.txt -o requirements/scale.txt

audit: $(VENV)/.dev  ## look up the locked versions in PyPI's advisories; needs the network
	@echo "asks PyPI for advisories: needs the network"
	set -e; for lock in serve dev build load scale; do \
		$(BIN)/pip-audit --strict --disable-pip --require-hashes -r requirements/$$lock.txt $(ARGS); done
	$(BIN)/pip-audit --strict --disable-pip --no-deps -r requirements/torch.txt $(ARGS)

SBOM ?= dist/paellera.cdx.json
sbom: $(VENV)/.dev  ## dist/paellera.cdx.json: the content of the image, as CycloneDX
	mkdir -p $(dir $(SBOM))
	cat requirements/serve.txt requirements/build.txt requirements/torch.txt | $(BIN)/cyclonedx-py requirements - \
		--pyproject pyproject.toml --mc-type application --output-reproducible --of JSON -o $(SBOM)

# Made anew where its creation failed half-way (no pip), its Python is gone, or is too old. A failure leaves nothing.
NEW_ENOUGH := sys.version_info >= (3, 11)
USABLE := $(shell [ -x $(BIN)/pip ] && $(BIN)/python -c 'import sys; print($(NEW_ENOUGH))' 2>/dev/null)
$(BIN)/pip: $(if $(filter True,$(USABLE)),,FORCE)
	@$(PYTHON) -c 'import sys; $(NEW_ENOUGH) or sys.exit("Python 3.11 or newer is required, this is %d.%d.%d; \
	PYTHON=python3.12 make $(MAKECMDGOALS)" % sys.version_info[:3])'
	@[ -e $(VENV)/pyvenv.cfg ] || [ -z "$$(ls -A $(VENV) 2>/dev/null)" ] \
		|| { echo "$(VENV) is no virtual environment: move it away" >&2; exit 1; }
	@[ ! -e $(VENV)/pyvenv.cfg ] || echo "$(VENV) has no pip, or no Python 3.11 or newer: making it anew"
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

FORCE:

# Reinstalled when the dependencies change; -e, so a change of the code needs nothing.
$(VENV)/.serve: pyproject.toml requirements/build.txt requirements/serve.txt requirements/torch.txt $(BIN)/pip
	$(INSTALL) -r requirements/build.txt
	$(INSTALL) -r requirements/serve.txt
	$(INSTALL_TORCH) -r requirements/torch.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.dev: pyproject.toml requirements/build.txt requirements/dev.txt requirements/torch-dev.txt requirements/torch.txt $(BIN)/pip
	$(INSTALL) -r requirements/build.txt
	$(INSTALL) -r requirements/dev.txt
	$(INSTALL_TORCH) -r requirements/torch-dev.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@ $(VENV)/.serve

clean:  ## remove the virtual environment, builds and caches
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
