# Two commands for a newcomer: `make demo` and `make test`. Both need only Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all lint types tests wheel-test browser-test liger-test bitsandbytes-test ray-test peers-test serve-test lock clean

demo: $(VENV)/.installed
	$(BIN)/excise demo

test: $(VENV)/.dev lint types tests wheel-test

test-all: $(VENV)/.dev lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile
	$(MAKE) wheel-test

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples

types: $(VENV)/.dev
	$(BIN)/mypy

tests: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# A wheel installed into a bare environment elsewhere, with the command run from another folder.
wheel-test: $(VENV)/.dev
	$(BIN)/python tests/wheel.py

browser-test: $(VENV)/.dev
	$(BIN)/python tests/report/browser.py

# The released liger kernel beside our losses, run by Triton's interpreter: no GPU is needed.
liger-test: $(VENV)/.liger
	PYTHONPATH=$(VENV)/liger $(BIN)/python tests/liger.py

# The real bitsandbytes under the 8-bit optimizer and under a base in 4 bits, on the CPU.
bitsandbytes-test: $(VENV)/.bitsandbytes
	PYTHONPATH=$(CURDIR)/$(VENV)/bitsandbytes:$(CURDIR) $(BIN)/python tests/eight_bit.py
	PYTHONPATH=$(CURDIR)/$(VENV)/bitsandbytes:$(CURDIR) $(BIN)/python -m pytest -q tests/four_bit.py

# The pool of a Ray cluster, on two nodes of this machine.
ray-test: $(VENV)/.ray
	PYTHONPATH=$(CURDIR)/$(VENV)/ray:$(CURDIR) $(BIN)/python tests/ray_cluster.py

# The examples that hand an edited model to lm-eval and to Inspect; both are large, so apart.
peers-test: $(VENV)/.peers
	PYTHONPATH=$(CURDIR)/$(VENV)/peers:$(CURDIR) $(BIN)/python tests/peers.py

# An audit over an endpoint, on the server of transformers.
serve-test: $(VENV)/.serve
	PYTHONPATH=$(CURDIR)/$(VENV)/serve:$(CURDIR) $(BIN)/python tests/serve_endpoint.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed requirements-dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	touch $@

$(VENV)/.liger: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/liger \
	  liger-kernel==0.8.5 triton==3.9.0
	touch $@

$(VENV)/.bitsandbytes: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target $(VENV)/bitsandbytes bitsandbytes==0.50.2
	touch $@

$(VENV)/.ray: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --target $(VENV)/ray ray==2.60.0
	touch $@

$(VENV)/.peers: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --target $(VENV)/peers \
	  lm-eval==0.4.13 inspect-ai==0.3.285
	touch $@

$(VENV)/.serve: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --target $(VENV)/serve \
	  accelerate==1.15.0 fastapi==0.165.0 openai==3.57.0 uvicorn==0.54.0
	touch $@

clean:
	rm -rf $(VENV) build dist
