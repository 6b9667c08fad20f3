# Two commands serve a fresh clone: `make train` and `make test`. Each sets up all it needs in .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= 2.13.0
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -name "*.cpp" -o -name "*.h")
WORKERS ?= 2
# Leaks are the interpreter's own; what is too large fails as without the sanitizer; the exit code is
# astrobiogen.testing.fuzz's SANITIZER_CODE.
ASAN := detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=1024:exitcode=77
ASAN := $(ASAN):max_malloc_fill_size=4096:malloc_fill_byte=165

.PHONY: train test bench lint types doctor emulate fuzz fuzz-asan release clean help

help:
	@echo "make train   set up, then train the tiny preset on the bundled real data (ARGS='--smoke': under a minute)"
	@echo "make test    set up, then run the tests                     (ARGS='-k rms_norm' for a part)"
	@echo "make bench   set up, then run the benchmarks                (ARGS='--quick')"
	@echo "make doctor  versions, devices, and which kernel serves which operator"
	@echo "make fuzz   10,000 raw calls of every operator with wrong arguments  (ARGS='--calls N --seed S --op NAME')"
	@echo "make fuzz-asan   the same under AddressSanitizer, with a build of its own"
	@echo "make emulate   every operator's cases on the compiled kernels of sm_86, without a GPU; hours"
	@echo "               (ARGS='attention --case window --arch 80')"
	@echo "make release   the source archive and a wheel in build/release/dist/, tried in an environment of its own"
	@echo "make lint types   ruff and pyright"

train: $(VENV)/.installed
	$(BIN)/python -m astrobiogen.train $(ARGS)

test: $(VENV)/.tools
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

bench: $(VENV)/.tools
	$(BIN)/python -m pytest benchmarks/ $(ARGS)

doctor: $(VENV)/.installed
	$(BIN)/python -m astrobiogen.doctor $(ARGS)

emulate: $(VENV)/.tools
	$(BIN)/python -m astrobiogen.testing.ptx.run $(ARGS)

fuzz: $(VENV)/.installed
	$(BIN)/python -m astrobiogen.testing.fuzz $(ARGS)

# A copy of the package with kernels of its own, below build/. The interpreter is not built for the sanitizer, so its
# library comes first, and libstdc++ with it: it looks for the function that throws when it starts.
fuzz-asan: $(VENV)/.installed
	ASTROBIOGEN_SANITIZE=1 ASTROBIOGEN_REQUIRE_EXTENSION=1 MAX_JOBS=$${MAX_JOBS:-2} \
	  $(BIN)/python setup.py -q build --build-base build/asan
	cd build/asan/lib* && \
	  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=$(ASAN) UBSAN_OPTIONS=print_stacktrace=1 \
	  $(CURDIR)/$(BIN)/python -m astrobiogen.testing.fuzz $(ARGS)

release: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt build
	.ci/release

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

types: $(VENV)/.tools
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "astrobiogen needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Try: make PYTHON=python3.12 <target>"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The CUDA build of PyTorch where an NVIDIA driver answers, the CPU build (0.2 GB instead of several) elsewhere.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	@set -e; \
	if nvidia-smi -L >/dev/null 2>&1 || [ "$$(uname -s)" != Linux ]; then \
	  echo "installing torch $(TORCH)"; $(PIP) install -q -c constraints.txt "torch==$(TORCH)"; \
	else \
	  echo "no NVIDIA driver found: installing the CPU build of torch $(TORCH)"; \
	  $(PIP) install -q -c constraints.txt "torch==$(TORCH)+cpu" 2>/dev/null \
	    || $(PIP) install -q -c constraints.txt "torch==$(TORCH)+cpu" \
	         --extra-index-url https://download.pytorch.org/whl/cpu; \
	fi
	@touch $@

# Beside an NVIDIA driver with what the presets for GPUs need: Triton, NVML's readings and 8-bit AdamW. Without build
# isolation: an isolated build would fetch another PyTorch, several gigabytes of CUDA, only to compile
# against it.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	@echo "building the C++ kernels and installing astrobiogen (one to three minutes)"
	$(PIP) install -q -c constraints.txt setuptools ninja
	extras=data; if nvidia-smi -L >/dev/null 2>&1; then extras=data,gpu,bnb; fi; \
	  MAX_JOBS=$${MAX_JOBS:-2} $(PIP) install -q -c constraints.txt --no-build-isolation -e ".[$$extras]"
	@touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt "hypothesis>=6.100" "pytest>=8" "pytest-benchmark>=5.3" "pytest-xdist>=3.5" \
	  ninja ruff pyright clang-format \
	  "bitsandbytes>=0.50" "nvidia-ml-py>=12" "tensorboardX>=2.6" "xarray>=2024.10" "netCDF4>=1.6" "zarr>=3.0" \
	  "scipy>=1.11" "python-libsbml>=5.20" "pyarrow>=15" "transformers>=5"
	$(BIN)/python -c 'import triton' 2>/dev/null || [ "$$(uname -s)" != Linux ] \
	  || $(PIP) install -q -c constraints.txt "triton>=3.6"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info astrobiogen/_C*.so
