# Everything a fresh machine needs: each target makes its own environment from the constraints file.
# TRANSFORMERS=5 runs the same with transformers 5.
PYTHON ?= python3
TRANSFORMERS ?= 4
VENV = .venv$(if $(filter-out 4,$(TRANSFORMERS)),-transformers$(TRANSFORMERS))
CONSTRAINTS = constraints-transformers$(TRANSFORMERS).txt
PYTEST_ARGS ?= -m "not slow"

# such as "--only decoding" or "--full"; python -m benchmarks --help
BENCH_ARGS ?=

# folder with the data sets of the studies (docs/EVIDENCE.md); without it only those on easy-VQA are run
DATA ?=

# below the package's own name, which setup.cfg gives to interface/
ROOMS = configuration modeling_vlm processing inference train

.PHONY: quickstart test bench evidence lint clean

quickstart: $(VENV)/installed
	$(VENV)/bin/prefixvlm quickstart

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/installed
	$(VENV)/bin/python -m benchmarks $(BENCH_ARGS)

evidence: $(VENV)/installed
	$(VENV)/bin/python -m evidence $(if $(DATA),--data $(DATA))

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	mkdir -p build/types/prefixvlm && ln -sfn $(CURDIR)/interface/*.py $(addprefix $(CURDIR)/,$(ROOMS)) build/types/prefixvlm/
	MYPYPATH=build/types $(VENV)/bin/mypy

# torch goes first and by name: asked for by a range, pip may fetch gigabytes of another build
.venv/installed .venv-transformers5/installed: $(CONSTRAINTS) setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet "$$(grep '^torch==' $(CONSTRAINTS))"
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-transformers5 build *.egg-info
