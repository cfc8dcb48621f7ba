# Two commands: `make demo` runs the main job, `make test` passes the tests. Each target sets up what it needs.
# `make bench` measures, `make bench QUICK=1` in a few minutes.
#
# By default everything is installed into .venv at pinned versions. `make <target> PYTHON=python3` uses that
# interpreter's environment as it is, with no network, and only builds trainops in place.

VENV := .venv
INTEGRATIONS := .venv-integrations
DOCS := .venv-docs
ifdef PYTHON
RUN := $(PYTHON)
SETUP := $(VENV)/.built-with-$(subst /,-,$(PYTHON))
else
RUN := $(VENV)/bin/python
SETUP := $(VENV)/.built
endif

SOURCES := setup.py pyproject.toml $(shell find csrc -type f -not -name '*.pyc')
CXX_SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CLANG_FORMAT = $(shell $(RUN) -c "import sysconfig; print(sysconfig.get_path('scripts'))")/clang-format

# Tests run in one process per core where pytest-xdist is there to do it.
PARALLEL = $(shell $(RUN) -c "import xdist" 2>/dev/null && echo --numprocesses=auto)

.PHONY: build demo tricks docs test test-all test-integrations mutants coverage lint bench figures inspect gpu dist format clean

build: $(SETUP)
	$(RUN) -m trainops

demo: $(SETUP)
	$(RUN) examples/train_digits.py

# Small experiments that show what each trick does, on one page: outputs/tricks/index.html.
tricks: $(SETUP)
	$(RUN) examples/tricks/page.py

# The documentation, outputs/docs/index.html. A warning, such as a dead link, is an error.
ifdef PYTHON
docs:
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
	@echo "outputs/docs/index.html; with the search: $(RUN) -m http.server -d outputs/docs"
else
docs: $(DOCS)/.requirements
	$(MAKE) docs PYTHON=$(DOCS)/bin/python
endif

test: $(SETUP)
	$(RUN) -m pytest $(PARALLEL)
	$(MAKE) inspect QUICK=1

# Every case of every test, with the sanitizers and what needs 17 GiB of memory: an hour or two.
test-all: $(SETUP)
	$(RUN) -m pytest $(PARALLEL) --thorough
	$(RUN) -m pytest -m large
	$(MAKE) inspect

# The tests with HF Trainer, Accelerate, Lightning and timm, in an environment of their own: 6 GB.
ifdef PYTHON
test-integrations: $(SETUP)
	$(RUN) -m pytest tests/integrations
else
test-integrations: $(INTEGRATIONS)/.requirements
	$(MAKE) test-integrations PYTHON=$(INTEGRATIONS)/bin/python
endif

# Plants faults, one at a time, and shows which ones no test notices: hours, and it goes on where it was stopped.
# `make mutants ONLY=cpu,ema` has some, `make mutants NEW=1` those that were never planted.
mutants: $(SETUP)
	$(RUN) tests/mutate.py $(if $(ONLY),--only $(ONLY)) $(if $(NEW),--new)

# The lines that the tests run, in Python and in C++. `make coverage ALL=1`: those of `make test-all`.
coverage: $(SETUP)
	$(RUN) tests/coverage_of_lines.py $(if $(ALL),--thorough)

lint: $(SETUP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CXX_SOURCES)

bench: $(SETUP)
	$(RUN) -m benchmarks run $(if $(QUICK),--quick) --output outputs/benchmarks

# Writes the figures of benchmarks/results/cpu into the README and the documentation.
figures: $(SETUP)
	$(RUN) -m benchmarks.figures

inspect: $(SETUP)
	TRITON_INTERPRET=0 $(RUN) -m benchmarks.inspect_all $(if $(QUICK),--quick)

# All that a machine with a GPU can tell, in ten minutes (`BUDGET=seconds`), into benchmarks/results/<card>. Building is
# its first stage.
ifndef PYTHON
gpu: $(VENV)/.requirements
endif
gpu:
	$(RUN) -m benchmarks.gpu_bundle $(if $(BUDGET),--budget $(BUDGET))

# A source distribution, the wheel that it makes, and that wheel in an environment without a compiler. Wheels for other
# Linuxes than this one: [tool.cibuildwheel] in pyproject.toml.
dist: $(SETUP)
	rm -rf dist
	$(RUN) setup.py --quiet sdist
	$(RUN) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist dist/*.tar.gz
	$(RUN) tests/smoke_wheel.py dist/*.whl

format: $(SETUP)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) $(INTEGRATIONS) $(DOCS) build dist outputs trainops/_build.json trainops/*.so *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.requirements: requirements-dev.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(INTEGRATIONS)/.requirements: requirements-integrations.txt
	python3 -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install --quiet -r requirements-integrations.txt
	touch $@

$(DOCS)/.requirements: requirements-docs.txt
	python3 -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet -r requirements-docs.txt
	touch $@

ifndef PYTHON
$(SETUP): $(VENV)/.requirements
endif
$(SETUP): $(SOURCES)
	$(RUN) -m pip install --quiet --no-build-isolation --no-deps -e .
	mkdir -p $(@D)
	touch $@
