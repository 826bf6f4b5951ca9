# `make demo` and `make test` need Python 3.10 or newer and nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# MLX brings its own backend on a Mac; elsewhere the one for the CPU has to be asked for.
EXTRAS := $(if $(filter Darwin,$(shell uname -s)),dev,dev,cpu)

.PHONY: install demo test check native sanitize neon docs notebook readme package slow torch bench clean

install: $(BIN)/openelm-mlx

$(BIN)/openelm-mlx: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

demo: install
	$(BIN)/openelm-mlx generate --prompt "Once upon a time there was" --echo
	$(BIN)/openelm-mlx info

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

# The optional kernels for the CPU: tested alone, then installed; under sanitizers; for ARM in an emulator.
native: install
	$(MAKE) -C native check
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ./native

sanitize:
	$(MAKE) -C native sanitize

neon:
	$(MAKE) -C native neon

# The documentation, the notebook and the commands in the documents have environments of their own: what they need is
# neither in the package nor in the tests. PIP is where to find a constrained pip.
PIP = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

docs:
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python $(PIP) --requirement docs/requirements.txt
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --quiet --clean

notebook: install
	$(BIN)/python $(PIP) --editable ".[$(EXTRAS),notebook]"
	$(BIN)/python scripts/run_notebook.py notebooks/tour.ipynb

# Every command of the README and the tutorials, as written, in a new environment.
readme:
	$(PYTHON) scripts/journeys.py

# The wheel and the source archive, each installed in an empty environment.
package:
	$(PYTHON) -m venv $(VENV)-package
	$(VENV)-package/bin/python -m pip install --quiet build twine
	rm -rf dist
	$(VENV)-package/bin/python -m build
	$(VENV)-package/bin/twine check --strict dist/*
	$(PYTHON) scripts/release.py --files dist
	$(PYTHON) scripts/try_package.py dist/*.whl
	$(PYTHON) scripts/try_package.py dist/*.tar.gz

slow: install
	$(BIN)/python -m pytest -m slow

# PyTorch is 500 MB; its tests are skipped without it. They run in an environment of their own, which "clean" removes.
torch:
	$(PYTHON) -m venv $(VENV)-torch
	$(VENV)-torch/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-torch/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]" torch==2.13.0 peft
	$(VENV)-torch/bin/python -m pytest -m torch -rs

bench: install
	$(BIN)/python benchmarks/cold_start.py
	test "$$(uname -s)" != Linux || $(BIN)/python benchmarks/blas_start.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/decode_host.py
	$(BIN)/python benchmarks/launches.py
	$(BIN)/openelm-mlx bench --preset 270M,1.1B --quantize 0,4 --prompt-tokens 32 -n 16 --against mlx-lm \
	  --output benchmarks/results/sizes.json --plot benchmarks/results/sizes.png --force
	$(BIN)/openelm-mlx bench --preset 270M --prompt-tokens 512 -n 16 --against mlx-lm \
	  --output benchmarks/results/prefill.json --force
	$(BIN)/python benchmarks/bandwidth.py
	$(BIN)/python benchmarks/batch.py
	$(BIN)/python benchmarks/speculate.py
	$(BIN)/python benchmarks/context.py
	$(BIN)/python benchmarks/text_memory.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/train_memory.py
	$(BIN)/python benchmarks/update.py
	$(BIN)/python benchmarks/train_cache.py
	$(BIN)/python benchmarks/tune.py
	$(BIN)/python benchmarks/tune_memory.py

clean:
	rm -rf build dist site $(VENV) $(VENV)-docs $(VENV)-package $(VENV)-torch *.egg-info
