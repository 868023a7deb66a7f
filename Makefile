PYTHON ?= python3
BIN = .venv/bin

.PHONY: setup app demo test hostile bench load evidence results screenshots clean
.DEFAULT_GOAL = app

setup: .venv/ready

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: give it as make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

app: setup
	$(BIN)/python -m app

demo: setup
	$(BIN)/python -m dpruner prune --model starter --domain healthcare --domain legal --method dpruner --method magnitude --method random

# two at a time, each on one thread, see conftest.py
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# ten thousand random configurations and command lines, others every time
hostile: setup
	$(BIN)/python -m pytest tests/test_hostile.py --hypothesis-profile hostile

bench: setup
	PYTHONPATH=. $(BIN)/python tests/bench.py

load: setup
	PYTHONPATH=. $(BIN)/python tests/load.py

evidence: setup
	PYTHONPATH=. $(BIN)/python tests/evidence.py

results: setup
	$(BIN)/python -m dpruner experiment report --experiments docs/results --to docs/RESULTS.md

screenshots: setup
	PYTHONPATH=. $(BIN)/python tests/screenshots.py

clean:
	rm -rf .venv build dist *.egg-info
