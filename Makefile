# make demo   three nodes on this machine find each other and train one model
# make test   lint, types and every test, in under ten minutes on two cores
# make faults real faults on real nodes, at full length: a quarter of an hour, as root (FAULTS="--only kill")
# make reliability  how soon deaths are found, how often wrongly, at what cost: in virtual time
# make bench  what averaging costs in time, memory and patience, as a table and JSON each: ten minutes
# make learning  digits on 16 virtual machines against one place: half an hour (LEARNING=--quick)
# make soak   SEEDS=1000 simulated lives of a mesh under faults
PYTHON ?= python3
BIN := .venv/bin

AT_ONCE := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
SEEDS ?= 1000
BENCHMARKS ?= exchange arithmetic overhead stall memory start growth

.PHONY: demo test faults reliability bench learning soak lint format clean

demo: .venv/ready
	$(BIN)/mesh demo

test: lint
	$(BIN)/python -m pytest -m "not all_cores" $(AT_ONCE) $(PYTEST)
	$(BIN)/python -m pytest -m all_cores $(PYTEST) || test $$? = 5  # 5: PYTEST names no such test

faults: .venv/ready
	$(BIN)/python -m tests.lan.faults $(FAULTS)

reliability: .venv/ready
	$(BIN)/python -m benchmarks.reliability $(RELIABILITY)

# One that missed a goal does not keep the others from being measured.
bench: .venv/ready
	-for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name || test $$? = 1 || exit; done

learning: .venv/ready
	$(BIN)/python -m benchmarks.learning $(LEARNING)

soak: .venv/ready
	$(BIN)/mesh sim --seeds $(SEEDS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -c constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[examples,plots,metrics,dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
