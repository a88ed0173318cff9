# make run   makes the environment, trains federated on the digits, certifies, draws the curve
# make test  makes the environment, lints, type-checks, tests
# make deploy  a server, CLIENTS clients and a certifier as containers: trains, certifies, into runs/RUN
# make bench  measures speed against other programs (docs/performance.md); make bench-gpu the same on a GPU
.PHONY: run test slow deploy bench bench-gpu bench-peers format clean
.DEFAULT_GOAL := run

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PEERS := $(VENV)/peers
# Overrides for `make run` and `make deploy`, e.g. make run ARGS="experiment=quick seed=1"
ARGS ?=
CLIENTS ?= 4
RUN ?= run

run: $(VENV)/.installed
	$(BIN)/fedsmooth simulate $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

# What takes longer than a few seconds: end-to-end runs, kill -9 in loops, Flower's simulation, real images.
slow: $(VENV)/.installed-dev
	$(BIN)/pytest -m slow

# Needs Docker with Compose v2 alone. The containers' user owns what they leave in runs/; root is not it.
deploy: export FEDSMOOTH_UID := $(shell id -u | sed 's/^0$$/1000/')
deploy: export FEDSMOOTH_GID := $(shell id -g | sed 's/^0$$/1000/')
deploy: export FEDSMOOTH_CLIENTS := $(CLIENTS)
deploy: export FEDSMOOTH_RUN := $(RUN)
deploy: export FEDSMOOTH_OVERRIDES := $(ARGS)
deploy:
	docker compose up --build --scale client=$(CLIENTS) --exit-code-from train

# Minutes on 2 cores; with the peers where bench-peers installed them.
bench: $(VENV)/.installed-dev
	$(or $(wildcard $(PEERS)/bin/python),$(BIN)/python) benchmarks/run.py -o runs/bench.json

# Needs PyTorch with CUDA, NumPy and SciPy alone: an environment is not made, but used where there is one.
bench-gpu:
	PYTHONPATH=. $(or $(wildcard $(PEERS)/bin/python),$(wildcard $(BIN)/python),$(PYTHON)) \
	  benchmarks/run.py --device cuda -o runs/bench-gpu.json

# Other people's programs, which want other versions than ours: an environment of their own on top of ours.
bench-peers: $(VENV)/.installed-dev
	$(BIN)/python -m venv --without-pip $(PEERS)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > "$$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	$(PEERS)/bin/python -m pip install --disable-pip-version-check -r benchmarks/peers.txt

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot make an environment: install its venv package (Debian: python3-venv)."; exit 1; }

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing (several GB of PyTorch at the first time) ..."
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[server]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[server,simulation,dev]'
	@touch $@
