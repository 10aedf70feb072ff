# One command per task; `make help` lists them. The first one that needs the environment builds it in .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo replicate test lint format types unit golden requirements clean distclean

EXTRAS ?=
comma := ,
export OMP_NUM_THREADS ?= 1

help: ## list the tasks
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' Makefile | expand -t 22

setup: ## build the environment in .venv (make setup EXTRAS=vllm,eval adds those)
	@tools/setup_environment.sh "$(EXTRAS)"

demo: setup ## run the main job on a tiny model, on the CPU
	bash examples/tiny_cpu/run_demo.sh

QUICK ?=
replicate: setup ## the paper's comparison at toy scale: about an hour on 2 cores (make replicate QUICK=1: shows it works)
	.venv/bin/python examples/toy_replication/replicate.py $(if $(QUICK),--quick)

# The rollout engine is tested with the real vLLM: setup, wherever `make test` asks for it, installs that too.
test: override EXTRAS := $(if $(EXTRAS),$(EXTRAS)$(comma))vllm
test: export CAMOPD_REQUIRE_VLLM = 1
test: setup lint types ## lint, types and every test, the fast ones first; installs vLLM as well
	.venv/bin/python -m pytest --durations=15

lint: setup ## what ruff finds, without changing a file
	.venv/bin/ruff check
	.venv/bin/ruff format --check

format: setup ## let ruff format the code and mend what it can
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

types: setup ## the type checker
	.venv/bin/mypy

unit: setup ## the tests that take seconds
	.venv/bin/python -m pytest tests/unit tests/tools tests/numerics

golden: demo ## write tests/golden/demo_curve.json anew from a run of the demo
	.venv/bin/python tests/golden/write_curve.py examples/tiny_cpu/output/run/metrics.jsonl

requirements: setup ## compile requirements/*.in into *.txt again (base first: the others are constrained by it)
	@for name in base $(filter-out base,$(basename $(notdir $(wildcard requirements/*.in)))); do \
		overrides=requirements/$$name.overrides; \
		"$$(cat .tools/uv-path)" pip compile --quiet --upgrade --python-version 3.12 --no-header --no-emit-index-url \
			$$([ ! -f $$overrides ] || echo --override $$overrides) \
			requirements/$$name.in -o requirements/$$name.txt || exit 1; \
	done

clean: ## remove caches, build leftovers and the demo's output
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache examples/*/output
	find . -path ./.venv -prune -o -path ./.tools -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove the environment and the private tools
	rm -rf .venv .tools
