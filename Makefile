# Each target sets up what it needs: a virtual environment in .venv, with the tested versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo lab test check docs bench clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

demo: .venv/.installed
	$(BIN)/fiducial demo $(ARGS)

lab: .venv/.installed
	$(BIN)/fiducial lab $(ARGS)

test: .venv/.installed
	$(BIN)/python -m pytest $(ARGS)

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)
	@echo "Open site/index.html"

bench: .venv/.installed
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/logprob_memory.py
	$(BIN)/python benchmarks/ppo_page.py

clean:
	rm -rf .venv runs site demo-run lab-run
