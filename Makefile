# Two commands matter: `make demo` and `make test`. Each makes .venv when there is none; a second run
# finds everything in place. ARGS goes to the command: `make test ARGS='-k gguf -x'`.
.DEFAULT_GOAL := help
.PHONY: help demo test test-matrix check coverage docs arm64 processors bench bench-peers rpc wheel wheels board sbom clean

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/ready-run  ## merge small real models, score them, compare what they answer, offline
	$(BIN)/edgemerge demo $(ARGS)

test: .venv/ready-dev  ## run all tests but those marked slow, by two processes (ARGS='-m slow' runs these, ARGS='-n 0' by one)
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile $(ARGS)

test-matrix:  ## run all tests on every Python here, and with the lowest versions of what is needed
	tools/matrix $(ARGS)

check: .venv/ready-dev  ## lint, format, types, layers, then the tests (ARGS=--no-tests leaves them out)
	tools/check $(ARGS)

docs: .venv/ready-dev  ## rewrite what docs/ quotes from the program (ARGS=--check only compares)
	$(BIN)/python -m tools.write_docs $(ARGS)

coverage: .venv/ready-dev  ## report which lines the tests of kernels, methods and planning reach (ARGS picks other tests); no gate
	tools/coverage $(ARGS)

arm64: .venv/bin/python  ## compare the bytes of codecs and merges with an emulated Arm's (ARGS=cortex-a53 picks the processor)
	tools/arm64 $(ARGS)

processors: .venv/ready-dev  ## run the tests of codecs, kernels and methods as on older x86-64 processors
	$(BIN)/python -m tools.processors $(ARGS)

bench: .venv/ready-dev  ## measure everything and rewrite the tables of docs/ and benchmarks/ (ARGS picks, as 'merge quality'; 7b, serve, llama, methods, quality135 and arm only when asked for)
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-peers: .venv/ready-dev .venv-peers/ready  ## the same merges through mergekit, llama.cpp's converter and quantiser; half an hour (ARGS=recipes: public recipes through mergekit; ARGS='server MODEL.gguf': serve beside llama-server; ARGS='llama MODEL.gguf': bench beside llama-bench)
	$(BIN)/python benchmarks/run.py $(or $(ARGS),merge) --peers .venv-peers

rpc: .venv/ready-run  ## build ggml's RPC backend beside the installed llama.cpp: models split over several boards
	tools/llama/build-rpc $(BIN)/python

wheel: .venv/ready-dev  ## build a wheel with kernels compiled for five kinds of x86-64 and AArch64 (ARGS=x86_64: for these only; ARGS=native: for this one)
	rm -rf build/lib dist/edgemerge-*.whl
	$(BIN)/python -m tools.prebuild $(ARGS)
	SOURCE_DATE_EPOCH=315532800 $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .
	rm -rf edgemerge/native/prebuilt

wheels: .venv/ready-dev  ## gather wheels for boards in dist/wheels, with hashes and lists of parts (ARGS='aarch64-3.11' picks targets)
	$(MAKE) wheel ARGS=
	tools/wheels $(ARGS)

board: .venv/ready-dev  ## install from dist/wheels on an emulated board without compiler and network; merge, run, serve there (ARGS=cortex-a72; ARGS='x86_64 trixie': not emulated)
	tools/board $(ARGS)

sbom: wheel  ## build the wheel, and beside it the list of all that is in a release (CycloneDX)
	tools/sbom

clean:  ## remove the environments and all that was built here (the llama.cpp wheel stays in its cache)
	rm -rf .venv .venv-* build dist *.egg-info demo-output edgemerge/native/prebuilt
	rm -rf .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
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
.venv/ready-run: .venv/bin/python pyproject.toml tools/llama/build-wheel tools/llama/common.sh tools/llama/lean.cmake
	wheel=$$(tools/llama/build-wheel $(BIN)/python) && $(PIP) --no-deps --force-reinstall "$$wheel"
	$(PIP) -e '.[serve,plot]'
	@touch $@

.venv/ready-dev: .venv/ready-run
	$(PIP) -e '.[serve,dev]'
	@touch $@

.venv-peers/ready: .venv/bin/python benchmarks/make-peers
	benchmarks/make-peers .venv-peers $(BIN)/python
	@touch $@
