# make run   set everything up and answer a question with the built-in model
# make test  run the tests that need no GPU
PYTHON ?= python3
PIP_ARGS ?=
SANITIZER ?= compute-sanitizer
TEST_PROCESSES ?= 2
GPU_TEST_PROCESSES ?= 4
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test check gpu-test memcheck bench bench-cpu bench-gpu setup clean
setup: $(READY)

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $(READY)

run: $(READY)
	$(BIN)/python -m scripts.demo

test: $(READY)
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m scripts.check_docs

# most tests compile and wait; those that measure speed, or how much of the GPU's memory is used, have it to themselves
gpu-test: $(READY)
	$(BIN)/python -m pytest -q -m "gpu and not alone" -n $(GPU_TEST_PROCESSES) --dist worksteal
	$(BIN)/python -m pytest -q -m "gpu and alone"

# every GPU kernel's tests under NVIDIA's checker, where a graph may not ask the driver for memory
memcheck: $(READY)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --target-processes application-only \
		--report-api-errors no --error-exitcode 1 $(BIN)/python -m pytest -q -m "gpu and not alone" -o timeout=0 tests/kernels \
		-k "not graph"

bench-cpu: $(READY)
	$(BIN)/python -m scripts.bench.cpu_experts

bench-gpu: $(READY)
	$(BIN)/python -m scripts.bench.gpu

bench: $(READY)
	$(BIN)/fiddler bench

clean:
	rm -rf $(VENV) build *.egg-info
