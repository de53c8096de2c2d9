# Every target does its own set-up: a virtual environment in .venv with the exact versions of constraints.txt.

# The first interpreter that runs and is new enough; `make PYTHON=/path/to/python ...` overrides it.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$python && break; done)

comma := ,
BIN := .venv/bin
# One thread a test process: two processes run at once, and small tensors gain nothing from more threads. The tests of a
# file run in one process, so that what they share is made once.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/pytest
TWO_AT_ONCE := -n 2 --dist loadfile
INSTALLED := .venv/.installed

AUDIT := build/audit

# Environments of the lowest and of the newest versions that pyproject.toml allows, and what is tested in them.
BOUNDS := build/bounds
UV := $(BOUNDS)/uv/bin/uv
CORE_EXTRAS := clip,completion,ocr,plots,server
CORE_TOOLS := pytest pytest-xdist hypothesis tensorboard
CORE_TESTS := $(addprefix tests/,balance callbacks checkpoint cli data evaluation hub losses pipelines rewards rollout shapeworld trainer update)

RELEASE := build/release
MAX_SDIST := 20000000

# The comparison of methods, from nothing; an interrupted one goes on where it was.
METHODS := runs/compare
LONG := runs/long
TIMES := runs/time_to_reward
LOSSES := runs/losses
RECIPES := runs/recipes
SLIDER := runs/slider_front
REWARDS := runs/new_rewards

.PHONY: demo evidence recipes methods ablations long variants time_to_reward losses slider rewards test slow gpu pretended-gpu fuzz audit docs lint build test-lowest test-latest clean help

help:
	@echo "make demo   train ShapeWorld against five rewards; results in runs/demo/"
	@echo "make evidence  all that docs/evidence.md and its pages show, by the targets below up to rewards: about two days on two cores"
	@echo "make recipes  balance, distil or average, at equal cost and equal KL, in two worlds: about 12 hours on two cores; results in $(RECIPES)/report/"
	@echo "make methods  compare methods in 25 steps, 4.1 hours on two cores; results in $(METHODS)/report/"
	@echo "make ablations  the same, and what else was tried: 4.2 hours more"
	@echo "make long   runs of 150 steps at several strengths of the KL: about 8 hours on two cores; results in $(LONG)/report/"
	@echo "make variants  the demo's recipe over 150 steps with a policy that lags; results in $(LONG)/report/"
	@echo "make time_to_reward  how soon a run has what earlier recipes have after 25 steps; results in $(TIMES)/report/"
	@echo "make losses   every loss at equal cost; results in $(LOSSES)/report/"
	@echo "make slider   one adapter for many balances, and a soup: about 2.2 hours of one core; results in $(SLIDER)/"
	@echo "make rewards  diversity, and an adversarial network, as a sixth reward; results in $(REWARDS)/"
	@echo "make test   lint rules and the tests"
	@echo "make slow   the tests that are left out of 'make test' because they take long"
	@echo "make gpu    the tests that need a GPU"
	@echo "make pretended-gpu  whole runs on a GPU that is made of the CPU's memory; needs a C++ compiler"
	@echo "make fuzz   many more examples for the tests that feed the parsers with anybody's bytes"
	@echo "make audit  known vulnerabilities of the versions in constraints.txt; needs pypi.org"
	@echo "make docs   the documentation as a static site in build/site/"
	@echo "make build  wheel and sdist in dist/, checked; needs a package index"
	@echo "make test-lowest, make test-latest  the core tests with the lowest, the newest allowed versions; they need a package index"
	@echo "make lint   ruff (rules and format) and mypy"
	@echo "make clean  remove the environment, caches and builds; runs/ is kept"

demo: $(INSTALLED)
	$(BIN)/trl-marble demo

# Each of them goes on where it was interrupted.
evidence: recipes methods ablations long variants time_to_reward losses slider rewards

methods: $(INSTALLED)
	$(BIN)/python examples/benchmarks/compare.py --output_dir $(METHODS)

# Some of the variants need packages that nothing else does.
ablations: methods
	$(BIN)/python -m pip install --disable-pip-version-check "torchjd[cagrad,nash_mtl]" qpsolvers \
		-c constraints.txt -c examples/benchmarks/ablations_constraints.txt
	$(BIN)/python examples/benchmarks/compare.py --stages ablations report --output_dir $(METHODS)

long: $(INSTALLED)
	$(BIN)/python examples/benchmarks/long_runs.py --output_dir $(LONG)

variants: $(INSTALLED)
	$(BIN)/python examples/benchmarks/recipe_variants.py --output_dir $(LONG)

time_to_reward: $(INSTALLED)
	$(BIN)/python examples/benchmarks/time_to_reward.py --output_dir $(TIMES)

losses: $(INSTALLED)
	$(BIN)/python examples/benchmarks/compare_losses.py --output_dir $(LOSSES)

recipes: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check torchjd qpsolvers \
		-c constraints.txt -c examples/benchmarks/ablations_constraints.txt
	$(BIN)/python examples/benchmarks/compare_recipes.py --output_dir $(RECIPES)

# One thread each: the steps of a world of this size gain little from a second one.
slider: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python examples/benchmarks/slider_front.py --output_dir $(SLIDER)

rewards: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python examples/benchmarks/set_rewards.py --output_dir $(REWARDS)/sets
	OMP_NUM_THREADS=1 $(BIN)/python examples/benchmarks/adversarial_reward.py --output_dir $(REWARDS)/adversarial

test: $(INSTALLED)
	$(BIN)/ruff check
	$(PYTEST) tests $(TWO_AT_ONCE)

slow: $(INSTALLED)
	$(PYTEST) tests -m slow $(TWO_AT_ONCE)

gpu: $(INSTALLED)
	$(PYTEST) tests -m gpu

pretended-gpu: $(INSTALLED)
	$(PYTEST) tests/device -m ''

fuzz: $(INSTALLED)
	$(PYTEST) tests/safety/test_fuzz.py --hypothesis-profile=long

# In an environment of its own, so that the audit's tool is not among what is audited. `--strict`: without it a version
# that PyPI says nothing of is passed over, and a machine that does not reach PyPI finds no vulnerabilities.
audit:
	@test -n "$(PYTHON)" || { echo "No Python of version 3.11 or newer was found; name it: make PYTHON=/path/to/python audit"; exit 1; }
	test -x $(AUDIT)/bin/pip-audit || { "$(PYTHON)" -m venv $(AUDIT) && $(AUDIT)/bin/pip install --quiet pip-audit==2.10.1; }
	@$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt || { \
		echo "The audit failed: a version has a known vulnerability (listed above), or https://pypi.org/pypi/ could not be asked."; exit 1; }

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# In an environment of its own. An sdist that grows past its limit would be refused by no index, only be slow for all.
build:
	@test -n "$(PYTHON)" || { echo "No Python of version 3.11 or newer was found; name it: make PYTHON=/path/to/python build"; exit 1; }
	test -x $(RELEASE)/bin/twine || { "$(PYTHON)" -m venv $(RELEASE) && $(RELEASE)/bin/pip install --quiet build==1.3.0 twine==6.2.0; }
	rm -rf dist
	$(RELEASE)/bin/python -m build --outdir dist .
	$(RELEASE)/bin/twine check --strict dist/*
	@size=$$(cat dist/*.tar.gz | wc -c); test $$size -lt $(MAX_SDIST) || { \
		echo "The sdist has $$size bytes, which is not under $(MAX_SDIST): leave something out in pyproject.toml."; exit 1; }

$(UV):
	@test -n "$(PYTHON)" || { echo "No Python of version 3.11 or newer was found; name it: make PYTHON=/path/to/python test-lowest"; exit 1; }
	"$(PYTHON)" -m venv $(BOUNDS)/uv && $(BOUNDS)/uv/bin/pip install --quiet uv

# The tools of the tests are the newest: only the package's own bounds are in question. UV_TORCH_BACKEND=cpu in the
# environment takes the small builds of torch.
test-lowest: $(UV)
	$(UV) pip compile --quiet --python "$(PYTHON)" --resolution lowest-direct --extra $(subst $(comma), --extra ,$(CORE_EXTRAS)) \
		--no-annotate --no-header pyproject.toml -o $(BOUNDS)/lowest.txt
	rm -rf $(BOUNDS)/lowest && $(UV) venv --quiet --python "$(PYTHON)" $(BOUNDS)/lowest
	$(UV) pip install --python $(BOUNDS)/lowest -e ".[$(CORE_EXTRAS)]" $(CORE_TOOLS) -c $(BOUNDS)/lowest.txt
	OMP_NUM_THREADS=1 $(BOUNDS)/lowest/bin/python -m pytest $(CORE_TESTS) $(TWO_AT_ONCE)

test-latest: $(UV)
	rm -rf $(BOUNDS)/latest && $(UV) venv --quiet --python "$(PYTHON)" $(BOUNDS)/latest
	$(UV) pip install --python $(BOUNDS)/latest --resolution highest -e ".[$(CORE_EXTRAS)]" $(CORE_TOOLS)
	OMP_NUM_THREADS=1 $(BOUNDS)/latest/bin/python -m pytest $(CORE_TESTS) $(TWO_AT_ONCE)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find trl_marble tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python of version 3.11 or newer was found; install one, or name it: make PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed; $(PYTHON) is {sys.version.split()[0]}. Name another: make PYTHON=/path/to/python")'
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[test]" -c constraints.txt
	@touch $@
