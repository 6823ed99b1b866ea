# Two commands do everything: `make run` and `make test`. Both install into .venv the first time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SITE   := docs/_build/html
OUT    ?= runs/demo
# Notebooks and test files run side by side, one process each.
JOBS   ?= 2

# The demo needs no network, and a look-up on a model hub that fails costs half a minute.
# A fixed number of threads keeps rounding, and with it the checked outputs, the same everywhere; the demo's small
# models gain more from a second process than from a second thread. Threads that wait sleep instead of spinning: on a
# busy machine spinning made a small convolution up to ten times slower. Compiled files are kept, whatever the shell says.
DEMO_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=

.DEFAULT_GOAL := help
.PHONY: help install quick run test unit variants notebooks browser hardening docs lab lint format nb-refresh coverage bench clean

help:  ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv and install (run and test do it by themselves)

$(STAMP): pyproject.toml constraints.txt
	@echo "==> creating $(VENV) and installing (about 2 minutes and 2 GB, once) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "medrobust needs Python 3.11 or newer; choose one with: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,cluster,dicom]"
	@touch $@
	@echo "==> installed"

quick: $(STAMP)  ## a first look in the terminal, in less than a minute: an image, a certificate, a leaderboard
	@$(DEMO_ENV) $(BIN)/medrobust quick

run: $(STAMP)  ## execute every notebook on the embedded demo and write runs/demo/index.html
	@echo "==> executing the notebooks on synthetic phantoms with the demo models (no network, no GPU needed) ..."
	@$(DEMO_ENV) $(BIN)/medrobust run --jobs $(JOBS) --out $(OUT)

test: unit variants notebooks  ## unit tests, the notebooks with other models and images, and every checked output of theirs

unit: $(STAMP)
	@echo "==> unit and structure tests ..."
	@$(DEMO_ENV) $(BIN)/python -m pytest tests --ignore=tests/browser --ignore=tests/notebooks \
		-p no:nbval -n $(JOBS) --dist loadfile

variants: $(STAMP)  ## the notebooks with other models, classes and images
	@echo "==> running the notebooks with other models, classes and images ..."
	@$(DEMO_ENV) $(BIN)/python -m pytest tests/notebooks -p no:nbval -n $(JOBS)

notebooks: $(STAMP)
	@echo "==> running the notebooks again and comparing their checked outputs (nbval) ..."
	@$(DEMO_ENV) LOKY_MAX_CPU_COUNT=1 TQDM_DISABLE=1 $(BIN)/python -m pytest --nbval-lax --nbval-current-env \
		--nbval-sanitize-with tests/nbval_sanitize.cfg -p no:cacheprovider -n $(JOBS) --dist loadfile notebooks

browser: $(STAMP)  ## move the instruments' sliders in a real browser (skips where Chromium is missing)
	@$(DEMO_ENV) $(BIN)/python -m pytest tests/browser

$(VENV)/.installed-docs: $(STAMP)
	@echo "==> installing what builds the site (once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

docs: $(VENV)/.installed-docs  ## build the site of all pages, notebooks and docstrings, docs/_build/html/index.html
	@echo "==> building the site from scratch, any warning is an error (one to two minutes) ..."
	@rm -rf docs/api docs/_build
	@$(DEMO_ENV) $(BIN)/python -m sphinx -q -W --keep-going -j $(JOBS) -c docs -d docs/_build/doctrees . $(SITE)
	@$(DEMO_ENV) $(BIN)/python -m pytest -q -p no:nbval tests/test_docs_site.py
	@echo "site: $(SITE)/index.html"

lab: $(STAMP)  ## open the notebooks in JupyterLab
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/jupyter lab --notebook-dir=notebooks

lint: $(STAMP)  ## ruff: style, types and docstrings
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(STAMP)  ## let ruff format the code
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(STAMP)  ## side-by-side timings and draw counts (about 15 minutes)
	@for script in benchmarks/*.py; do $(DEMO_ENV) $(BIN)/python $$script || exit 1; done

coverage: $(STAMP)  ## line coverage of the library by the unit tests
	@$(DEMO_ENV) $(BIN)/python -m pytest tests --ignore=tests/browser --cov --cov-report=term

hardening: $(STAMP)  ## run the attacks and accidents again and write docs/hardening.md
	@$(DEMO_ENV) $(BIN)/python -m pytest tests --ignore=tests/browser -m hardening --hardening-table docs/hardening.md

nb-refresh: $(STAMP)  ## execute the notebooks in place and strip what should not be committed
	@ls notebooks/*.ipynb | $(DEMO_ENV) TQDM_DISABLE=1 xargs -P $(JOBS) -n 1 \
		$(BIN)/jupyter execute --inplace --KernelManager.transport_encryption=auto
	@$(BIN)/nbstripout --keep-output --keep-count --extra-keys \
		"metadata.papermill metadata.language_info.version metadata.widgets cell.metadata.papermill cell.metadata.execution" notebooks/*.ipynb
	@$(BIN)/python docs/shrink_figures.py notebooks/*.ipynb

clean:  ## remove runs (never data, weights or .venv)
	rm -rf runs
