# The commands anyone needs. On a fresh machine they make .venv themselves; with CKF_PYTHON set they
# use that interpreter as it is and install nothing.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PART ?= all
OUT ?= benchmarks/results

ifdef CKF_PYTHON
PY := $(CKF_PYTHON)
USER_READY :=
READY :=
else
PY := .venv/bin/python
USER_READY := .venv/.user
READY := .venv/.ready
endif

.PHONY: help environment demo test test-long gpu bench build lint format clean

help:
	@echo "make demo       download, train, evaluate and report on MovieLens-100K with a small LLM (CPU)"
	@echo "make test       the tests that every change must pass; no GPU"
	@echo "make test-long  those and the slow ones"
	@echo "make gpu        build, test, sanitize and measure on this machine's GPU, without network"
	@echo "                (PART=build|tests|sanitize|bench|goals, OUT=folder, ARCHIVE=folder of the packed results,"
	@echo "                MINUTES=all it may take, 9)"
	@echo "make bench      measure against the peers on this machine's CPU (12 to 20 minutes), and draw"
	@echo "make build      build the extensions in place, after a change in csrc/"
	@echo "make lint       ruff check and ruff format --check"
	@echo "make format     let ruff fix and format"
	@echo "make clean      remove what was built; .venv, runs/ and results stay"

# What a user installs; torch first and by its version, so that pip does not pick another one.
.venv/.user: pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet -e ".[recsys]"
	@touch $@

# Beside the extensions of .venv/.user, which stay where they are.
.venv/.ready: .venv/.user
	CKF_BUILD_CUDA=0 CKF_BUILD_CPU=0 $(PY) -m pip install --quiet -e ".[recsys,test]"
	@touch $@

environment: $(READY)

demo: $(USER_READY)
	$(PY) -m ckf.cli train configs/demo.yaml --out runs/demo

test: $(READY)
	$(PY) -m pytest -q -m "not gpu and not slow"

test-long: $(READY)
	$(PY) -m pytest -q -m "not gpu"

# With the interpreter at hand: a GPU machine has its own torch and perhaps no network.
gpu:
	$(or $(CKF_PYTHON),$(PYTHON)) benchmarks/gpu.py $(PART) --out $(OUT) $(ARCHIVE:%=--archive %) \
	  $(MINUTES:%=--minutes %)

bench: $(READY)
	for name in linear scaling decode step; do \
	  $(PY) benchmarks/bench_$$name.py --device cpu --out $(OUT)/cpu || exit 1; done
	$(PY) benchmarks/report.py --results $(OUT)/cpu

build: $(READY)
	CKF_BUILD_CUDA=1 CKF_BUILD_CPU=1 $(PY) setup.py build_ext --inplace

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf build dist *.egg-info ckf/_C.*.so ckf/_cpu.*.so .pytest_cache .ruff_cache .hypothesis
	find ckf tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
