# The one place that names torch; for another one: make setup TORCH=torch==2.14.1
TORCH ?= torch==2.13.0
# A CUDA build of torch, which also runs without a GPU, and the CUDA it is for. Its environment
# takes 6 GB; `make test TORCH_CUDA=` leaves it out.
TORCH_CUDA ?= torch==2.14.1
CUDA_OF_TORCH ?= 13.0
# LOCKED=1 installs what locks/ pins, and checks its hashes.
LOCKED ?=
PYTHON ?= python3
VENV ?= .venv
VENV_CUDA ?= .venv-cuda

# The environments in which the wheel is tried: of a Python, and of a torch. Without any, of Pythons
# that are found.
TRY ?=

BIN := $(VENV)/bin
BIN_CUDA := $(VENV_CUDA)/bin
# Modules are compiled when they are first imported; most never are.
INSTALL := -m pip --disable-pip-version-check install --quiet --no-compile
PIP := $(BIN)/python $(INSTALL)
PIP_CUDA := $(BIN_CUDA)/python $(INSTALL)
# pip takes constraints from it, hashes included: nothing is installed that is not in the file.
LOCK = $(if $(LOCKED),--constraint locks/$(1).txt)
# Older ones know neither groups nor hashes in constraints.
PIP_ITSELF = $(if $(LOCKED),--requirement locks/pip.txt,--upgrade "pip>=25.1")
SOURCES := $(shell find csrc tools -type f -not -name '*.pyc') CMakeLists.txt setup.py pyproject.toml
PYTHON_SOURCES := $(shell find growkernels -name '*.py')
CPP_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Another torch, asked for here or put into the environment by hand, starts a new build.
TOOLS_STAMP := $(VENV)/.made-tools-$(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.' '-')
PACKAGE_STAMP := $(VENV)/.made-package
TOOLS_CUDA_STAMP := $(VENV_CUDA)/.made-tools-$(shell printf %s '$(TORCH_CUDA)' | tr -c 'A-Za-z0-9.' '-')
PACKAGE_CUDA_STAMP := $(VENV_CUDA)/.made-package
TORCH_VERSION_FILE = $(wildcard $(VENV)/lib/python*/site-packages/torch/version.py)

.SECONDEXPANSION:
.DEFAULT_GOAL := help
.PHONY: help setup setup-cuda test test-cpu test-cuda-build reproduce \
  bench readme-tables accuracy gpu-kernels gpu-suite gpu-reproduce sanitize fuzz lint format clean \
  wheel test-wheel aarch64 lock links docs

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

IS_READY = -c "from growkernels.ops.library import build_info; b = build_info(); \
  print(f'growkernels is ready in $(1): torch {b.torch_version}, {b.cuda_note}')"
setup: $(PACKAGE_STAMP)  ## make .venv with torch, the tools and growkernels: whatever is missing
	@$(BIN)/python $(call IS_READY,$(VENV)) 2>/dev/null || \
	  { rm -f growkernels/libgrowkernels* growkernels/*.so $<; $(MAKE) --no-print-directory $<; \
	  $(BIN)/python $(call IS_READY,$(VENV)); }

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PIP_ITSELF)

$(TOOLS_STAMP): pyproject.toml $(if $(LOCKED),locks/venv.txt locks/triton.txt) | $(BIN)/python
	$(PIP) $(call LOCK,venv) "$(TORCH)" --group dev
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) $(call LOCK,triton) --group triton
	@rm -f $(VENV)/.made-tools-*
	@touch $@

$(PACKAGE_STAMP): $(TOOLS_STAMP) $(SOURCES) $$(TORCH_VERSION_FILE)
	$(PIP) --no-build-isolation --no-deps --editable .
	$(PIP) $(call LOCK,venv) "growkernels[experiments]"
	@touch $@

# Empty where test-cuda-build can be made, else what stands in the way.
CUDA_OBSTACLE = $(BIN)/python tools/toolchain.py '$(TORCH_CUDA)' '$(CUDA_OF_TORCH)'

test: setup  ## run the tests, and test-cuda-build where a CUDA toolkit is found
	@obstacle="$$($(CUDA_OBSTACLE))"; cuda=0; \
	if [ -z "$$obstacle" ]; then $(MAKE) --no-print-directory test-cuda-build || cuda=$$?; \
	else echo "make test-cuda-build is left out: $$obstacle"; fi; \
	$(TEST_CPU) && exit $$cuda

# Tests wait for compilers and for Python more than for arithmetic: two at a time take half as long.
# Threads of the one that spin while they wait would hold up those of the other.
test test-cpu test-cuda-build sanitize: export OMP_WAIT_POLICY = passive
# In the order that tests/conftest.py puts the files into.
SIDE_BY_SIDE = -n 2 --dist loadfile --no-loadscope-reorder
# Compiled modules are kept, also where the environment says otherwise: a process that compiles torch
# anew starts twice as slowly, and tests start many.
test test-cpu test-cuda-build sanitize reproduce: export PYTHONDONTWRITEBYTECODE =
TEST_CPU = $(BIN)/python -m pytest -q $(SIDE_BY_SIDE) tests
test-cpu: setup
	$(TEST_CPU)

setup-cuda: $(PACKAGE_CUDA_STAMP)  ## make .venv-cuda: growkernels with its CUDA sources, timm, torchvision
	@$(BIN_CUDA)/python -I $(call IS_READY,$(VENV_CUDA))

$(BIN_CUDA)/python:
	$(PYTHON) -m venv $(VENV_CUDA)
	$(PIP_CUDA) $(PIP_ITSELF)

$(TOOLS_CUDA_STAMP): pyproject.toml $(if $(LOCKED),locks/venv-cuda.txt) | $(BIN_CUDA)/python
	$(PIP_CUDA) $(call LOCK,venv-cuda) "$(TORCH_CUDA)" --group cuda
	@rm -f $(VENV_CUDA)/.made-tools-*
	@touch $@

# Not editable: the library in the source tree is the one of the first environment.
$(PACKAGE_CUDA_STAMP): $(TOOLS_CUDA_STAMP) $(SOURCES) $(PYTHON_SOURCES)
	GROWKERNELS_CUDA=1 $(PIP_CUDA) --no-build-isolation --no-deps .
	$(PIP_CUDA) $(call LOCK,venv-cuda) "growkernels[experiments]"
	@touch $@

# Started as a program and from another folder, so that no `growkernels` in the source tree is
# imported. Of the ops' tests those that show how the library fits this torch.
test-cuda-build: setup-cuda  ## compile the CUDA sources, test that build without a GPU, and the drivers on real models
	cd tests && $(abspath $(BIN_CUDA))/pytest -q $(SIDE_BY_SIDE) cuda_build real_models
	cd tests && $(abspath $(BIN_CUDA))/pytest -q $(SIDE_BY_SIDE) ops -k "(any_shapes or opcheck or \
	  random_matrices or functional_gradients) and not emulated and not triton"

wheel: $(TOOLS_STAMP)  ## dist/: one wheel for torch 2.11 to 2.14 and every Python; downloads 2 GB, once
	$(BIN)/python -c "import auditwheel" 2>/dev/null || $(PIP) --group wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/make_wheel.py $(if $(CUDA),--cuda) $(if $(TORCHES),--torch $(TORCHES))

test-wheel:  ## try that wheel in fresh environments, which take up to 6 GB each; TRY="python3.12:2.14.1 …"
	$(BIN)/python tools/try_wheel.py $(TRY)

aarch64: $(TOOLS_STAMP)  ## cross-compile for aarch64, and run tests of the ops under qemu-user; takes 5 GB
	$(BIN)/python tools/try_aarch64.py $(if $(BUILD_ONLY),--build-only)

lock: $(TOOLS_STAMP)  ## pin and hash anew, in locks/, what `make setup LOCKED=1` installs
	$(BIN)/python -c "import uv" 2>/dev/null || $(PIP) --group lock
	$(BIN)/python tools/lock.py --torch '$(TORCH)' --torch-cuda '$(TORCH_CUDA)'

links:  ## ask for every https page that README and the documents link
	$(PYTHON) tools/check_links.py

docs: setup  ## the documentation site, in site/
	$(BIN)/python -c "import mkdocstrings" 2>/dev/null || $(PIP) --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

reproduce: setup  ## reproduce the papers' experiments in minutes; the reports land in runs/
	$(BIN)/growkernels reproduce sensli --resume
	$(BIN)/growkernels reproduce basis --resume
	$(BIN)/growkernels reproduce scaling --resume

bench: setup  ## run the benchmarks; results are stored in benchmarks/results
	$(BIN)/growkernels bench

readme-tables: setup  ## write the documents' tables and draw docs/speed.png anew from the stored benchmark results
	$(BIN)/python -m benchmarks.readme_tables

accuracy: setup  ## docs/accuracy.md anew: the Winograd kernels' errors beside torch's
	$(BIN)/python -m benchmarks.winograd_accuracy --write

gpu-kernels: setup  ## docs/gpu_kernels.md anew, without a GPU; with CUDA C++ kernels after setup-cuda
	$(BIN)/python tools/gpu_kernels.py --write $(addprefix --library ,$(firstword $(wildcard \
	  $(VENV_CUDA)/lib/python*/site-packages/growkernels/libgrowkernels-*.so)))

# With the Python and the packages that the machine has: no environment is made.
gpu-suite:  ## on a GPU: build, test, measure within 10 minutes; ONLY=tests or bench or a family, OUT=…, DRY_RUN=1
	$(PYTHON) tools/gpu_suite.py $(if $(ONLY),--only $(ONLY)) $(if $(OUT),--out $(OUT)) \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(if $(DRY_RUN),--dry-run)

gpu-reproduce:  ## nine minutes of PAPER=sensli, sensli-cnn, basis or scaling on a GPU; DATA=…, FROM=…, OUT=…
	$(PYTHON) tools/gpu_reproduce.py $(PAPER) $(if $(DATA),--data $(DATA)) \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(if $(FROM),--from $(FROM)) $(if $(OUT),--out $(OUT))

sanitize: setup  ## ops and solvers under AddressSanitizer and UBSan: tests and random calls; SHORT=1
	$(BIN)/python tools/sanitize.py $(if $(SHORT),--short) $(if $(MINUTES),--minutes $(MINUTES))

FUZZ = --store $(if $(CALLS),--calls $(CALLS),--minutes $(or $(MINUTES),10))
fuzz: setup  ## random calls of ops, then of layers, solvers and drivers; failures are stored and replayed by tests; MINUTES=10 or CALLS=1000000 of each
	$(BIN)/python tests/ops/fuzzing.py $(FUZZ)
	$(BIN)/python tests/fuzz/driver_fuzzing.py $(FUZZ)

lint: setup  ## ruff, mypy, clang-format, and a build with warnings as errors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	GROWKERNELS_WERROR=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/lint

format: setup  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:  ## remove what was built, the environment too
	rm -rf $(VENV) $(VENV_CUDA) build dist site *.egg-info growkernels/libgrowkernels* growkernels/*.so .pytest_cache .mypy_cache .ruff_cache \
	  .hypothesis .benchmarks
