# make demo   text, four models with three seeds each, one report: out/demo/report.md
# make test   the project's tests
# make lint   ruff
# make bench  the speed suite, compared with docs/benchmarks/baseline.json (deleted, it is made anew)
PYTHON := .venv/bin/python
SHAPE := --hidden_size=512 --num_hidden_layers=8 --num_attention_heads=8 --num_key_value_heads=2 \
	--intermediate_size=1408 --vocab_size=8192
RUNS := $(foreach model,dense mod dtf stt,$(foreach seed,1 2 3,out/demo/$(model)-$(seed)))

.PHONY: demo test lint bench
demo: .venv/installed
	$(PYTHON) prepare.py
	$(PYTHON) study.py config/study_demo.py
	$(PYTHON) plot.py report $(RUNS)

test: .venv/installed
	$(PYTHON) -m pytest

lint: .venv/installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench: .venv/installed
	$(PYTHON) bench.py $(SHAPE) --seq_len=1024 --batch_size=1 --threads=2 --dtype=float32 --baseline=docs/benchmarks/baseline.json

.venv/installed: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
