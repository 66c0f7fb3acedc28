# make demo   text, four models, one report: out/demo/report.md
# make test   the project's tests
# make lint   ruff
PYTHON := .venv/bin/python
RUNS := out/demo/dense out/demo/mod out/demo/dtf out/demo/stt

.PHONY: demo test lint
demo: .venv/installed
	$(PYTHON) prepare.py
	for run in $(RUNS); do $(PYTHON) train.py config/demo.py --architecture=$$(basename $$run) --out_dir=$$run --resume=auto || exit; done
	$(PYTHON) plot.py report $(RUNS)

test: .venv/installed
	$(PYTHON) -m pytest

lint: .venv/installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

.venv/installed: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
