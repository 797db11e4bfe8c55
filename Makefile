# Two commands matter: `make demo` and `make test`. Each makes .venv when there is none; a second run
# finds everything in place. ARGS goes to the command: `make test ARGS='-k gguf -x'`.
.DEFAULT_GOAL := help
.PHONY: help demo test check arm64 bench sbom clean

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/ready-run  ## merge small real models, score them, show what the best one answers, offline
	$(BIN)/edgemerge demo $(ARGS)

test: .venv/ready-dev  ## run all tests but those marked slow (ARGS='-m slow' runs these)
	$(BIN)/python -m pytest -m 'not slow' $(ARGS)

check: .venv/ready-dev  ## lint, format, types, layers, then the tests (ARGS=--no-tests leaves them out)
	tools/check $(ARGS)

arm64: .venv/bin/python  ## compare the bytes of codecs and merges with an emulated Arm's (ARGS=cortex-a53 picks the processor)
	tools/arm64 $(ARGS)

bench: .venv/ready-dev  ## measure everything and rewrite the README's tables (ARGS picks: kernels align merge requant quality)
	$(BIN)/python benchmarks/run.py $(ARGS)

sbom: .venv/ready-dev  ## build the wheel and the list of all that is in a release (CycloneDX), into dist
	tools/sbom

clean:  ## remove .venv and all that was built here (the llama.cpp wheel stays in its cache)
	rm -rf .venv build dist *.egg-info demo-output
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A pyenv shim exists for versions that are not selected and then fails, so each candidate has to run.
# ensurepip is what a Debian python without its -venv package lacks.
.venv/bin/python:
	@for python in $(PYTHON) python3.13 python3.12 python3.11 python3; do \
	  if "$$python" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	    >/dev/null 2>&1; then \
	    echo "making .venv with $$("$$python" --version)"; \
	    exec "$$python" -m venv --clear .venv; \
	  fi; \
	done; \
	echo "edgemerge needs Python 3.11, 3.12 or 3.13 with its venv module; none was found" \
	  "(Debian: apt install python3-venv; or make PYTHON=/path/to/python3)." >&2; \
	exit 1

# The wheel first and by force: pip would keep a library of the same version built with other flags.
.venv/ready-run: .venv/bin/python pyproject.toml tools/llama/build-wheel tools/llama/lean.cmake
	wheel=$$(tools/llama/build-wheel $(BIN)/python) && $(PIP) --no-deps --force-reinstall "$$wheel"
	$(PIP) -e '.[serve,plot]'
	@touch $@

.venv/ready-dev: .venv/ready-run
	$(PIP) -e '.[serve,dev]'
	@touch $@
