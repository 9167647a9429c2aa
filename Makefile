# The first target that needs it sets up $(VENV); later ones find the stamp there and install nothing.

PYTHON ?= python3
VENV ?= .venv
# Where PyTorch publishes its builds without CUDA.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# The compiler whose output tests/test_kernel_budgets.py holds to account, for Linux machines whose torch brings none.
TRITON ?= triton==3.6.0
# Options of the command a target runs, as in `make test ARGS="-k formats"`.
ARGS ?=
# What `make bench` may take, less what the report needs; where results are kept.
MINUTES ?= 13
RESULTS = benchmarks/results
# How `make test` divides the tests: a file goes to one process, at most four of them, which is 6 GB. Each has one thread:
# several with threads for all cores wait for each other many times as long as they work.
PARALLEL ?= $(if $(PREINSTALLED),,-n logical --maxprocesses 4 --dist loadfile)
# Not empty: use the packages of $(PYTHON) as they are and install flux_quant alone, for an image without a network.
PREINSTALLED ?=

# Keeps the working directory off sys.path, where `kernels/` would be found as the library of that name.
export PYTHONSAFEPATH = 1

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --no-input
STAMP = $(VENV)/installed
TORCH = $(shell grep '^torch==' constraints.txt)

.PHONY: help demo test check style bench report gpu matrix triton clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## convert the bundled model to four formats, draw with each, write demo/
	$(BIN)/flux-quant demo $(ARGS)

test: $(STAMP) triton ## run the tests; those that need a GPU are skipped without one
	$(if $(PARALLEL),OMP_NUM_THREADS=1) $(BIN)/pytest $(PARALLEL) $(ARGS)

check: $(STAMP) ## lint and format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(STAMP) ## fix what `check` finds
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## measure this machine in less than 15 minutes, write benchmarks/results/, then docs/report/
	$(BIN)/flux-quant bench --minutes $(MINUTES) --repeats 3 --output $(RESULTS) $(ARGS)
	$(MAKE) report

report: $(STAMP) ## make docs/report/ and the tables of README.md and docs/ from benchmarks/results/
	$(BIN)/flux-quant report $(RESULTS) docs/contact-sheet.png --force -o docs/report/report.html
	$(BIN)/flux-quant report $(RESULTS) docs/contact-sheet.png --force -o docs/report/report.md
	$(BIN)/python -I -m flux_quant.benchmarks.readme

gpu: $(STAMP) ## run the GPU suite, write benchmarks/results/; without CUDA an error unless ARGS=--allow-skip
	$(BIN)/python -I -m flux_quant.benchmarks.gpu $(ARGS)

matrix: $(STAMP) ## run the frontends' tests with the oldest and the newest diffusers and transformers
	.ci/matrix $(VENV) $(ARGS)

triton: $(STAMP)
ifeq ($(PREINSTALLED),)
	@$(BIN)/python -c "import triton" 2>/dev/null || test "$$(uname -s)" != Linux || $(PIP) install $(TRITON) || \
	  echo "$(TRITON) cannot be installed here: tests of the kernels that are written in Triton will be skipped."
endif

clean: ## remove the virtual environment, caches, demo/ and package builds
	rm -rf $(VENV) demo dist build/lib build/bdist.* *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# A virtual environment survives neither a move nor the loss of its Python: then it is made anew.
ifneq ($(shell cat $(STAMP) 2>/dev/null && $(BIN)/python -c "" 2>&1),$(CURDIR))
$(STAMP): FORCE
endif
FORCE:

$(STAMP): setup.py pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing. On Debian and Ubuntu: apt install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "Python 3.10 or newer is needed, this is $$($(PYTHON) -V 2>&1). Name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@test ! -f $(STAMP) || test "$$(cat $(STAMP))" = "$(CURDIR)" || rm -rf $(VENV)
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(if $(PREINSTALLED),--system-site-packages) $(VENV)
ifneq ($(PREINSTALLED),)
	@# The packages of $(PYTHON) may lie in a virtual environment of its own, and some in PYTHONPATH: all are named here.
	@$(PYTHON) -c "import os, sys; more = os.environ.get('PYTHONPATH', '').split(os.pathsep); \
	  print(*(p for p in sys.path if p in more or p.endswith('-packages')), sep='\n')" \
	  > "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/preinstalled.pth"
	$(PIP) uninstall -q -y setuptools  # venv's own, where Python brings one, hides the newer one of the image
	$(PIP) install --no-deps --no-build-isolation -e .
else
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  echo "NVIDIA GPU found: installing torch with CUDA."; \
	elif $(BIN)/python -c "from urllib.request import urlopen; urlopen('$(TORCH_CPU_INDEX)/torch/', timeout=5)" 2>/dev/null; then \
	  echo "No NVIDIA GPU: installing torch without CUDA, from $(TORCH_CPU_INDEX)."; \
	  $(PIP) install --no-deps --index-url $(TORCH_CPU_INDEX) $(TORCH); \
	else \
	  echo "No NVIDIA GPU, but $(TORCH_CPU_INDEX) cannot be reached: installing pip's default torch, on Linux often the one with CUDA."; \
	  $(PIP) install -c constraints.txt $(TORCH); \
	fi
	$(PIP) install -c constraints.txt -e '.[dev]'
endif
	@echo "$(CURDIR)" > $@
