# Every target sets up what it needs: a virtual environment in .venv with the pinned dependencies of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS := $(VENV)/.docs

.PHONY: demo quick test test-long test-network test-slow test-random check derive docs reproduce bench bench-remote bench-startup cuts golden clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Cutlayer needs Python 3.11 or newer: make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)   ## six algorithms compete on handwritten digits
	$(BIN)/cutlayer compare

quick: $(STAMP)   ## half a minute: the seam, the algorithms' identities, each engine on real runs, configuration
	$(BIN)/python -m pytest -n 2 -q tests/engine/test_seam.py tests/algorithms tests/test_config.py \
		tests/engine/test_stacked.py::test_float32 tests/remote/test_remote.py::test_remote_is_local_bit_for_bit

test: $(STAMP)   ## the test suite: minutes
	$(BIN)/python -m pytest -n 2

test-long: $(STAMP)   ## what takes seconds each: attacks on trained models, the paper's model, a whole reproduction, an installed example, the pages' commands
	$(BIN)/python -m pytest -n 2 -m 'long and not slow'

test-network: $(STAMP)   ## servers and clients as processes, killed, stopped, cut off and attacked; some of it as root
	$(BIN)/python -m pytest -n 2 -m 'network and not slow'

test-slow: $(STAMP)   ## what takes minutes: large models, twenty steps on both engines
	$(BIN)/python -m pytest -n 2 -m slow

test-random: $(STAMP)   ## properties on a thousand new examples each; the other commands try the same ones each time
	$(BIN)/python -m pytest -n 2 -m hypothesis --hypothesis-profile random

check: $(STAMP)   ## lint, format, types, the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(DOCS)   ## the documentation as a site in build/docs; runs the tutorials; a broken link, an undocumented public name or a failing cell is an error
	$(BIN)/python -m sphinx -q -n -W --keep-going -d build/doctrees docs build/docs

derive: $(STAMP)   ## write what is derived from the registrations: index.json, keywords.py, docs/options.md
	$(BIN)/python -m cutlayer.derive

reproduce: $(STAMP)   ## the paper's tables at the smallest size, on Fashion-MNIST: does it work
	rm -rf build/reproduce
	$(BIN)/cutlayer reproduce --size smoke --out build/reproduce

bench: $(STAMP)   ## how fast the engines are; writes docs/benchmarks.md
	$(BIN)/python benchmarks/engines.py --write docs/benchmarks.md

cuts: $(STAMP)   ## which architectures can be cut, and how; writes docs/models.md
	$(BIN)/python benchmarks/cuts.py --write docs/models.md

bench-startup: $(STAMP)   ## the first step, memory and evaluation; writes docs/benchmarks.md
	$(BIN)/python benchmarks/startup.py --write docs/benchmarks.md

bench-remote: $(STAMP)   ## the remote engine against bare gRPC; writes docs/benchmarks.md
	$(BIN)/python benchmarks/remote.py --write docs/benchmarks.md

golden: $(STAMP)   ## write the golden losses anew after a deliberate change
	$(BIN)/python -m pytest tests/algorithms/test_golden.py --rewrite-golden

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
