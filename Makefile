# Needs make, a POSIX shell and Python >= 3.11. `make demo` and `make test` create .venv from requirements.lock.

VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# Which Python makes the environment: PYTHON=/path/to/python, or the first of these that is new enough.
PYTHONS := $(if $(PYTHON),$(PYTHON),python3 python3.11 python3.12 python3.13 python)

.PHONY: help demo test test-all lint types lock

help:
	@echo "make demo      train PPO on CartPole and Hopper on the CPU and plot the result"
	@echo "make test      run the tests"
	@echo "make test-all  run the tests, the slow ones too"
	@echo "make lint      check the code with ruff"
	@echo "make types     check the types with pyright"
	@echo "make lock      make requirements.lock anew (needs uv)"

demo: $(READY)
	$(PY) -m pgjax.experiments.demo

# Two processes: each grows to some gigabytes of compiled programs.
test: $(READY)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" --durations=40

test-all: $(READY)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(PY) -m ruff check .

# pyright follows these links where the installed package has its sub-packages.
types: $(READY)
	@mkdir -p build/types/pgjax
	@for name in envs algorithms experiments; do ln -sfn ../../../$$name build/types/pgjax/$$name; done
	@ln -sf ../../../pgjax/__init__.py build/types/pgjax/__init__.py
	$(PY) -m pyright --pythonpath $(PY)

# Pinned for every supported Python and system at once; all extras but the CUDA one, whose packages are gigabytes.
lock:
	@command -v uv >/dev/null || { echo "make lock needs uv: pip install uv" >&2; exit 1; }
	@{ echo "# Pinned dependencies of pgjax and all its extras but cuda13, for Python >= 3.11. Made by: make lock"; \
	uv pip compile pyproject.toml --universal --python-version 3.11 --no-header --no-annotate --upgrade --quiet \
	--extra mujoco --extra playground --extra warp --extra wandb --extra tensorboard --extra ray --extra slurm --extra search --extra notebooks --extra test; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

# The stamp is written last, so that an installation that was cut short is taken up again. uv, where there is one, takes
# seconds for what takes pip minutes; it may not know the package index that pip was told of, hence the "or".
$(READY): requirements.lock pyproject.toml
	@set -e; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	    found=; \
	    for python in $(PYTHONS); do \
	        if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	            found=$$python; break; \
	        fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "pgjax needs Python >= 3.11 with the venv module; none among: $(PYTHONS). Name one: make PYTHON=/path/to/python" >&2; \
	        exit 1; \
	    fi; \
	    $$found -m venv --clear $(VENV); \
	fi; \
	echo "installing into $(VENV), which takes a few minutes"; \
	{ command -v uv >/dev/null && uv pip install --quiet --python $(PY) --no-deps -r requirements.lock; } || \
	$(PY) -m pip install --quiet --no-deps -r requirements.lock; \
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .; \
	touch $@

