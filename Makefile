# Set-up, demo and tests of jaxpaged. Needs python3 (3.11 to 3.13), make and a package index.

VENV = .venv
# The interpreter that makes the environment; empty: the newest of the three versions that runs.
PYTHON =
# More requirements for pip, such as "jax==0.10.2".
REQUIRE =
# More arguments for pytest, such as "-k scheduler".
ARGS =

BIN = $(VENV)/bin
# A worker a core, a file a worker: what a file compiles is compiled once.
PYTEST = $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile
ASKED_FOR = $(VENV)/.asked-for
INSTALLED = $(VENV)/.installed
# JAX's CUDA plugin and NVIDIA's assembler, apart from the environment: with them in it, JAX would look for a GPU.
CUDA = build/cuda
CUDA_INSTALLED = $(CUDA)/.installed

.PHONY: help venv demo test test-short test-slow lint compile-check clean FORCE

help:
	@echo 'make demo         complete a few prompts with the bundled model'
	@echo 'make test         lint, types and the tests'
	@echo 'make test-slow    the tests that take long, which make test leaves out'
	@echo 'make test-short   what make test runs, without lint and types'
	@echo 'make lint         ruff and pyright'
	@echo 'make compile-check  compile the kernels for an H200; needs JAX 0.11 and 265 MB of wheels, no GPU'
	@echo 'make venv         only the environment: PYTHON=$(PYTHON) VENV=$(VENV) REQUIRE=$(REQUIRE)'
	@echo 'make clean        remove the environment and what tools left behind'

venv: $(INSTALLED)

# Changes only when another interpreter or other requirements are asked for, and the environment must then be made anew.
$(ASKED_FOR): FORCE
	@mkdir -p $(VENV)
	@echo '$(PYTHON) $(REQUIRE)' | cmp -s - $@ || echo '$(PYTHON) $(REQUIRE)' >$@

$(INSTALLED): pyproject.toml $(ASKED_FOR)
	python=$(or $(PYTHON),$$(sh scripts/find_python.sh)) && "$$python" -m venv --clear $(VENV)
	@echo '$(PYTHON) $(REQUIRE)' >$(ASKED_FOR)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' $(REQUIRE)
	@touch $@

demo: $(INSTALLED)
	$(BIN)/jaxpaged demo

test: lint test-short

test-short: $(INSTALLED)
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: $(INSTALLED)
	$(PYTEST) -m slow $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

$(CUDA_INSTALLED): $(INSTALLED)
	rm -rf $(CUDA)
	jax=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && $(BIN)/python -m pip install --quiet --no-deps \
		--target $(CUDA) "jax-cuda13-plugin==$$jax" "jax-cuda13-pjrt==$$jax" nvidia-cuda-nvcc nvidia-nvvm
	@touch $@

compile-check: $(CUDA_INSTALLED)
	PYTHONPATH=$(CUDA) $(BIN)/python scripts/bench/compile_kernels.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
