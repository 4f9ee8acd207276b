# What one does with this project; `make help` lists it. A fresh machine needs Python 3.11 or newer, Rust, a C
# compiler and make: everything else is installed into .venv*, once, and again only when its inputs change.

PYTHON ?= python3
PYTEST_ARGS ?=
JOBS ?= 2# processes that run Python tests; each takes up to 8 GB
BENCH_ARGS ?=
SOAK ?= 100000

BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
VENV := .venv
PY := $(VENV)/$(BIN)/python
MATURIN := $(PY) -m maturin
# One profile and one target folder everywhere: HDF5 takes minutes to build, and is built once for each.
CARGO_FLAGS := --release --locked
RUST := Cargo.toml Cargo.lock pyproject.toml $(wildcard rust/*.rs rust/*/*.rs rust/*/*/*.rs rust/*/*/*/*.rs)
WHEEL := README.md LICENSE $(RUST) $(wildcard $(addprefix python/hornbeam/,*.py *.pyi */*.py */*.json))
# What depends on the backend: saves, loads and trainings, and which private parts of Keras they use.
BACKEND_TESTS ?= tests/saving tests/loading tests/training tests/seam/test_names.py

export PATH := $(CURDIR)/$(VENV)/$(BIN):$(PATH)# cmake, for HDF5's build
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PYO3_PYTHON := $(CURDIR)/$(PY)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_QUIET := 1
export TF_CPP_MIN_LOG_LEVEL ?= 2
unexport HDF5_DIR HDF5_VERSION# either would silently replace the bundled, static HDF5
unexport CONDA_PREFIX# maturin refuses two environments at once

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-matrix test-all test-rust test-python test-backend-torch test-versions soak soak-forks soak-leaks soak-resume check fmt bench docs tables names wheel clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+%?:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.group-dev $(VENV)/.hub $(VENV)/.extension ## Make .venv: every tool, and hornbeam built from here, editable

demo: $(VENV)/.group-demo $(VENV)/.extension ## Save and load a model beside stock Keras, with timings
	$(PY) benches/demo.py

test: check test-rust test-python docs test-backend-jax test-backend-numpy ## All checks, all tests on TensorFlow, those of backends on JAX and NumPy

test-matrix: test-backend-torch test-versions ## The tests of backends on torch; other versions of Keras

test-all: ## Everything on every backend, and other versions of Keras: hours
	$(MAKE) test test-matrix BACKEND_TESTS=tests

test-rust: $(VENV)/.group-build ## The Rust tests, without features and with libhdf5
	@echo "==> Rust tests, no features"
	cargo test $(CARGO_FLAGS)
	@echo "==> Rust tests, libhdf5 (the first run builds HDF5: some three minutes)"
	cargo test $(CARGO_FLAGS) --features libhdf5

test-python: setup ## The Python tests on TensorFlow (PYTEST_ARGS="-k name")
	@echo "==> Python tests, TensorFlow"
	KERAS_BACKEND=tensorflow $(PY) -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test-backend-%: setup ## The tests of saving, loading and training on another backend: jax, numpy, torch
	@echo "==> Python tests, $* backend"
	KERAS_BACKEND=$* $(PY) -m pytest -n $(JOBS) --dist worksteal $(BACKEND_TESTS) $(PYTEST_ARGS)

test-backend-torch: .venv-torch/.wheel
	@echo "==> Python tests, torch backend"
	KERAS_BACKEND=torch .venv-torch/$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(BACKEND_TESTS) $(PYTEST_ARGS)

test-versions: .venv-keras312/.wheel .venv-nightly/.wheel ## The tests marked keras_versions on the oldest Keras supported and on the next
	@echo "==> Python tests, Keras 3.12.4"
	KERAS_BACKEND=tensorflow .venv-keras312/$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m keras_versions tests/saving \
	  tests/loading tests/seam/test_names.py $(PYTEST_ARGS)
	@echo "==> Python tests, Keras' nightly build, TensorFlow and JAX"
	for backend in tensorflow jax; do \
	  KERAS_BACKEND=$$backend .venv-nightly/$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m keras_versions $(PYTEST_ARGS) || exit 1; \
	done

soak: setup ## The long campaigns: damaged files (SOAK=1000000, HORNBEAM_SEED=2), kills and failures during saves, restarts
	HORNBEAM_SOAK=$(SOAK) cargo test $(CARGO_FLAGS) --features libhdf5 --test soak
	HORNBEAM_SOAK=1 KERAS_BACKEND=tensorflow $(PY) -m pytest -o faulthandler_timeout=3600 tests/core/test_crash.py \
	  tests/core/test_faults.py $(PYTEST_ARGS)
	$(MAKE) soak-forks soak-leaks soak-resume

soak-forks: setup ## 200 forks while each object with a thread or a lock works
	HORNBEAM_SOAK=1 KERAS_BACKEND=tensorflow $(PY) -m pytest -o faulthandler_timeout=3600 tests/saving/test_fork.py $(PYTEST_ARGS)

soak-leaks: setup ## 2,000 saves and loads of every kind: memory, descriptors and threads stay what they are
	HORNBEAM_SOAK=1 KERAS_BACKEND=tensorflow $(PY) -m pytest -n $(JOBS) -o faulthandler_timeout=36000 tests/core/test_leaks.py $(PYTEST_ARGS)

soak-resume: setup .venv-torch/.wheel ## Trainings killed and restarted, checkpoints killed while they are written: over an hour
	for backend in tensorflow jax; do \
	  HORNBEAM_SOAK=1 KERAS_BACKEND=$$backend $(PY) -m pytest -o faulthandler_timeout=3600 tests/training/test_checkpoint.py \
	    tests/training/test_backup.py || exit 1; \
	done
	HORNBEAM_SOAK=1 KERAS_BACKEND=torch .venv-torch/$(BIN)/python -m pytest -o faulthandler_timeout=3600 tests/training/test_backup.py

check: setup ## Formatting, lints and types, of Rust, Python and the workflows
	@echo "==> Rust: formatting, lints"
	cargo fmt --check
	cargo clippy $(CARGO_FLAGS) --all-targets -- -D warnings
	cargo clippy $(CARGO_FLAGS) --all-targets --features python -- -D warnings
	cargo clippy $(CARGO_FLAGS) --all-targets --all-features -- -D warnings
	@echo "==> Python: lints, formatting, types"
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) -m mypy.stubtest hornbeam._core --mypy-config-file pyproject.toml
	@echo "==> Workflows"
	$(VENV)/$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/$(BIN)/zizmor --quiet --offline .github/workflows

fmt: $(VENV)/.group-dev ## Format the code and mend what the linters can
	cargo fmt
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

bench: setup $(VENV)/.group-peers ## The published benchmark, over an hour (BENCH_ARGS="--only ResNet50 --turns 1"); the Rust stages: cargo bench
	KERAS_BACKEND=tensorflow $(PY) benches/run.py $(BENCH_ARGS)
	KERAS_BACKEND=tensorflow $(PY) benches/bench_legacy.py
	$(PY) benches/report.py
	$(PY) benches/bench_checkpoint.py
	KERAS_BACKEND=tensorflow $(PY) -m pytest --benchmark-enable benches/bench_open.py

docs: setup ## Run the examples of README.md and docs/ (pytest's 5: there are none)
	KERAS_BACKEND=tensorflow $(PY) -m pytest --doctest-glob='*.md' README.md docs || [ $$? -eq 5 ]

# A save and a load by the import swap, in an environment that has only what the wheel asks for and a backend.
define SMOKE
import os, tempfile
import keras, numpy
from hornbeam.saving import load_model, save_model

os.chdir(tempfile.mkdtemp())
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
save_model(model, "model.keras")
for ours, saved in zip(load_model("model.keras").get_weights(), model.get_weights(), strict=True):
    numpy.testing.assert_array_equal(ours, saved)
print("saved and loaded")
endef
export SMOKE

wheel: $(VENV)/.group-build ## Build wheel and sdist into dist/, install each in a fresh environment, save and load
	rm -rf dist
	$(MATURIN) build --release --out dist
	$(MATURIN) sdist --out dist
	set -e; for file in dist/*; do \
	  echo "==> $$file in a fresh environment"; rm -rf .venv-dist; $(PYTHON) -m venv .venv-dist; \
	  CARGO_TARGET_DIR=$${CARGO_TARGET_DIR:-$(CURDIR)/target} .venv-dist/$(BIN)/python -m pip install "$$file[jax]"; \
	  KERAS_BACKEND=jax .venv-dist/$(BIN)/python -c "$$SMOKE"; \
	done; rm -rf .venv-dist

tables: setup ## Write the tables of formats in README.md and docs/formats.md
	KERAS_BACKEND=tensorflow PYTHONPATH=tests $(PY) -m support.format_tables

names: setup ## Write which private names of Keras each module uses into seam/keras_names.json
	$(PY) tests/support/names.py

clean: ## Remove everything these targets made
	rm -rf target dist .venv .venv-dist .venv-torch .venv-keras312 .venv-nightly .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f python/hornbeam/_core.*.so python/hornbeam/_core.*.pyd

# --- how the environments are made: a stamp file says what was done ---

%/.python:
	@echo "==> $*: a Python environment"
	@$(PYTHON) -c 'import sys; sys.exit("hornbeam needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $*
	$*/$(BIN)/python -m pip install --upgrade pip
	@touch $@

$(VENV)/.group-%: pyproject.toml | $(VENV)/.python
	@echo "==> $(VENV): installing the '$*' group"
	$(PY) -m pip install --group $*
	@touch $@

# Without what they ask for: TensorFlow's large wheel, and tokenizers of text (2 GB). KerasHub's models from a config
# need none, and tf_keras is content with the small wheel.
$(VENV)/.hub: Makefile | $(VENV)/.group-dev
	@echo "==> $(VENV): installing KerasHub and Keras 2"
	$(PY) -m pip install --no-deps keras-hub==0.32.0 tf_keras==2.21.0
	@touch $@

$(VENV)/.extension: $(RUST) | $(VENV)/.group-build
	@echo "==> $(VENV): building hornbeam (the first build takes some three minutes, most of it HDF5)"
	$(MATURIN) develop --release
	@touch $@

target/wheels/.built: $(WHEEL) | $(VENV)/.group-build
	@echo "==> building the wheel"
	@mkdir -p target/wheels && rm -f target/wheels/*.whl
	$(MATURIN) build --release --out target/wheels
	@touch $@

.venv-%/.group: pyproject.toml | .venv-%/.python
	@echo "==> .venv-$*: installing the 'matrix-$*' group"
	.venv-$*/$(BIN)/python -m pip install --group matrix-$*
	@touch $@

# TensorFlow asks for a released Keras, which is the same package: it goes, and the nightly is put in its place.
.venv-nightly/.group: pyproject.toml | .venv-nightly/.python
	@echo "==> .venv-nightly: installing the 'matrix-nightly' group"
	.venv-nightly/$(BIN)/python -m pip install --group matrix-nightly
	.venv-nightly/$(BIN)/python -m pip uninstall --yes keras
	.venv-nightly/$(BIN)/python -m pip install --no-deps --force-reinstall --group keras-nightly
	@touch $@

.venv-%/.wheel: target/wheels/.built .venv-%/.group
	.venv-$*/$(BIN)/python -m pip install --no-deps --force-reinstall target/wheels/*.whl
	@touch $@
.PRECIOUS: %/.python $(VENV)/.group-% .venv-%/.group
