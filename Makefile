# make quickstart | test | soak | lint. Each sets itself up; run again, it changes nothing that is already there.
PYTHON ?= python3
PY := .venv/bin/python
RUN := runs/quickstart
CORPUS := data/python-stdlib

.PHONY: setup quickstart test soak lint bench

setup: .venv/.installed

.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "mdmtrain needs Python 3.10 or newer: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
