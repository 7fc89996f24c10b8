# The few commands that people and CI share.
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
MINUTES ?= 30
STAMP := $(VENV)/.installed
# ends whatever a run of tests has started, however the run ends
WHOLE := $(BIN)/python tests/support/whole_tree.py

.PHONY: serve test test-main test-interpreted test-compiled test-cluster slow soak sweep check lint map format clean

$(STAMP): pyproject.toml constraints.txt
	@echo "quickchange: installing into $(VENV), once: PyTorch (minutes on a slow network) …"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -c constraints.txt torch==2.13.0
	@echo "quickchange: installing the other packages …"
	@$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

serve: $(STAMP)
	@$(BIN)/quickchange serve --demo --port $(PORT)

test: test-main test-interpreted test-compiled

# a process a CPU, also where two are threads of one core; a file's tests stay together, so that they
# share its servers, and the longest files come first (tests/conftest.py), so that all end together
test-main: $(STAMP)
	$(WHOLE) $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

# Triton's interpreter replaces its compiler for a whole process
test-interpreted: $(STAMP)
	TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 $(WHOLE) $(BIN)/python -m pytest tests/triton_kernels \
	  -n logical --dist worksteal

test-compiled: $(STAMP)
	$(WHOLE) $(BIN)/python -m quickchange_kernels.aot

# starts Ray on this machine's loopback: two engines, two nodes, ended by their own ids
test-cluster: $(STAMP)
	$(WHOLE) $(BIN)/python -m pytest -m 'cluster and not slow' tests/cluster \
		-o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true

slow: $(STAMP)
	QUICKCHANGE_THOROUGH=1 $(WHOLE) $(BIN)/python -m pytest -m 'slow or thorough'

# everything at once for MINUTES, the engine killed and stopped: what is lost, what is left
soak: $(STAMP)
	$(WHOLE) $(BIN)/quickchange bench soak --minutes $(MINUTES)

# a tiny random model of every causal-LM type of transformers: right, or refused
sweep: $(STAMP)
	$(WHOLE) $(BIN)/python -m quickchange_bench.architectures

check: lint test

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/vulture
	$(BIN)/lint-imports
	$(BIN)/python tests/code_map/checks.py

# measures of the code's map, with their targets
map: $(STAMP)
	PYTHONPATH=tests/support HF_HUB_OFFLINE=1 $(BIN)/python tests/code_map/measures.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
