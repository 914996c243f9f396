# Every target makes what it needs: `make quickstart` and `make test` work alone on a clean checkout with Python 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
export HF_HUB_OFFLINE = 1

.PHONY: install reference quickstart rlp-quickstart test check test-slow test-faults test-gpu test-gpu-cluster chaos dashboard-tools test-dashboard label-studio test-people bench bench-families lock

install: $(VENV)/.installed

# torch's CPU build is on PyTorch's own index; the configured index is asked first.
$(VENV)/.installed: cluster/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "the lock is for Python 3.11, and $(PYTHON) is another: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-deps --require-hashes -r cluster/cpu.lock || \
	$(BIN)/pip install -q --no-deps --require-hashes -r cluster/cpu.lock --extra-index-url $(TORCH_CPU_INDEX)
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

quickstart: install
	$(BIN)/python jobs/proxy_dpo.py jobs/configs/quickstart.toml

rlp-quickstart: install
	$(BIN)/python jobs/rlp.py jobs/configs/rlp_quickstart.toml

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

test: check
	$(BIN)/python -m pytest -m "not gpu and not slow and not faults and not dashboard and not people" -q

test-slow: install
	$(BIN)/python -m pytest -m slow -q

# One GPU, about ten minutes, no vLLM; DEVICE=cpu runs the same checks on a small model.
DEVICE ?= cuda
test-gpu:
	$(BIN)/python -m jobs.bench.one_gpu --device $(DEVICE)

# Engines and trainings on one GPU or more, with vLLM's CUDA build.
test-gpu-cluster:
	$(BIN)/python -m pytest -m gpu -q

# Every fault of a cluster, in every stage; only root, with iproute2, can give nodes networks of their own.
test-faults: install
	$(BIN)/python -m pytest -m faults -q

# Faults at random times, in whole runs.
chaos: install
	$(BIN)/python -m jobs.bench.chaos

# As root, on Debian and its relatives; elsewhere install Prometheus and Chromium by hand.
dashboard-tools:
	apt-get update -q
	apt-get install -q -y --no-install-recommends prometheus chromium

# Fails, and does not skip, where Prometheus or Chromium is absent.
test-dashboard: install
	$(BIN)/python -m pytest -m dashboard -q

# A labelling tool in an environment of its own, which it shares no package with; 1 GB. `make label-studio` and then
# `.label-studio/bin/label-studio start` is how a team tries it.
label-studio: .label-studio/.installed

.label-studio/.installed:
	$(PYTHON) -m venv .label-studio
	.label-studio/bin/pip install -q label-studio==1.23.2
	touch $@

# Fails, and does not skip, where Chromium is absent.
test-people: install label-studio
	$(BIN)/python -m pytest -m people -q

bench: install
	for bench in k_center generation against_trl startup swap memory ppo replicas scale oracle reading ranks; do $(BIN)/python jobs/bench/$$bench.py || exit 1; done
	$(BIN)/python -m jobs.bench.training_memory

# Every family of policies through adapters, DPO, export and vLLM; four minutes.
bench-families: install
	$(BIN)/python -m jobs.bench.families

# The page of all settings, and the schema for editors.
reference: install
	$(BIN)/python -m rayrl.config.reference jobs/configs

lock:
	uv pip compile pyproject.toml --extra cpu --extra dev --override cluster/cpu.overrides --python-version 3.11 \
	  --generate-hashes --index-strategy unsafe-best-match -o cluster/cpu.lock
