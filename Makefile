# The commands of this project; `make` without a target lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help env demo status test test-slurm lint bench lock clean-env

PYTHON ?= python3.11
RUN ?= demo
ARGS ?=

# The environment's tools take precedence. Its img2dataset is a link into a separate environment, .venv-data.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# Use the installed uv, or install one into .venv-uv. uv does not read PIP_FIND_LINKS, so it is passed on as
# UV_FIND_LINKS. Compiling bytecode once halves the import time of torch and diffusers in the many processes of a run.
UV := $(shell command -v uv || echo .venv-uv/bin/uv)
UV_INSTALL = UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" $(UV) pip install --compile-bytecode

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

env: .venv/.done .venv-data/.done  ## make the environments from the lock files (nothing to do if they exist)

demo: env  ## run the workflow for RUN=demo and print its metrics (ARGS="-n": only show the plan)
	snakemake --profile profiles/local --config run=$(RUN) $(ARGS)
	@if [ -f results/runs/$(RUN)/metrics.txt ]; then cat results/runs/$(RUN)/metrics.txt; fi

status: env  ## show a run's stages, progress and SLURM jobs (RUN=demo)
	@python workflow/scripts/status.py run=$(RUN)

# Workers with one thread each: with more threads than cores, small models are many times slower. Three, because tests
# spend a third of their time waiting. The order of files is kept, so that the longest ones, in end_to_end, start first.
test: env  ## run the tests that need no SLURM (ARGS="-k name" selects some)
	OMP_NUM_THREADS=1 python -m pytest tests --ignore=tests/slurm --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# Needs root and the packages munge, slurmctld, slurmd, slurm-client and iproute2; otherwise skips its tests and says why.
test-slurm: env  ## run the tests that need SLURM, on a temporary cluster of 16 nodes on this machine
	@trap 'tests/slurm/cluster.sh down' EXIT; tests/slurm/cluster.sh up || true; \
		OMP_NUM_THREADS=1 python -m pytest tests/slurm $(ARGS)

lint: env  ## check format, rules and types of the code, and that docs/configuration.md fits the schema
	ruff format --check .
	ruff check .
	snakefmt --check Snakefile workflow
	snakemake --lint
	python -m sdtrain.config.docs --check
	mypy

bench: env  ## run the side-by-side measurements in benchmarks/
	for script in benchmarks/*.py; do python "$$script" $(ARGS); done

clean-env:  ## remove the environments
	rm -rf .venv .venv-data .venv-uv

# ---------------------------------------------------------------- environments
# Each environment has a stamp file, written last, so the next `make env` completes an interrupted one. Packages come from
# the lock files, with their hashes checked. The library is installed in editable mode.
# npm is installed only if the machine has none.
.venv/.done: pyproject.toml requirements/env.txt requirements/torch.txt requirements/npm.txt | $(filter .venv-uv/%,$(UV))
	$(call make_venv,.venv)
	$(UV_INSTALL) --python .venv/bin/python -r requirements/env.txt -r requirements/torch.txt
	command -v npm >/dev/null || $(UV_INSTALL) --python .venv/bin/python -r requirements/npm.txt
	rm -f .venv/lib/python3.11/site-packages/sdtrain.pth # written by earlier versions
	$(UV_INSTALL) --python .venv/bin/python --no-deps --no-build-isolation --editable .
	touch $@

.venv-data/.done: requirements/img2dataset.txt .venv/.done | $(filter .venv-uv/%,$(UV))
	$(call make_venv,.venv-data)
	$(UV_INSTALL) --python .venv-data/bin/python -r requirements/img2dataset.txt
	ln -sfn ../../.venv-data/bin/img2dataset .venv/bin/img2dataset
	touch $@

.venv-uv/bin/uv: requirements/uv.txt
	@$(need_python)
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet --require-hashes -r requirements/uv.txt

need_python = $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	echo "error: $(PYTHON) is not a Python 3.11. Install python3.11 and python3.11-venv, or name one:" \
	"make env PYTHON=/path/to/python3.11" >&2; exit 1; }

# $(1): the environment's folder. An existing environment is kept and updated.
define make_venv
@$(need_python)
[ -x $(1)/bin/python ] || $(UV) venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" $(1)
endef

# ---------------------------------------------------------------- locks
# The locks are valid for every platform and name no package index. A version of the present lock is kept if it fits;
# ARGS=--upgrade chooses the newest ones. torch is included when versions are resolved. Afterwards it is removed from the
# lock, together with the packages that only torch needs (triton, nvidia-*, cuda-*).
LOCK = env -u UV_FIND_LINKS $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate --constraint requirements/torch.txt $(ARGS)
WITHOUT_TORCH = awk '/^[a-z]/ { keep = $$0 !~ /^(torch|triton|nvidia-|cuda-)/ } keep'

lock: $(filter .venv-uv/%,$(UV))  ## update the lock files from requirements/*.in (ARGS=--upgrade: to the newest versions)
	for name in env img2dataset npm uv; do \
		cp requirements/$$name.txt requirements/.$$name.txt; \
		$(LOCK) requirements/$$name.in --output-file requirements/.$$name.txt >/dev/null; \
		$(WITHOUT_TORCH) requirements/.$$name.txt > requirements/.$$name.new; \
		mv requirements/.$$name.new requirements/$$name.txt; rm requirements/.$$name.txt; done
