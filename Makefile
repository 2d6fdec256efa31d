# Two commands do everything: `make demo` and `make test`. Each makes .venv, installs what it needs once, and runs.
#   make demo                       text to numbers in five minutes, on a CPU (SOURCE=synthetic: the generated world instead)
#   make test                       every test, on a CPU, offline
#   make demo PYTHON=python3.12     with another Python (3.11 or newer)
PYTHON ?= python3
PY := .venv/bin/python
# PyPI's torch for Linux brings gigabytes of CUDA libraries. Without an NVIDIA driver take the CPU wheel of the same version; where it cannot
# be reached, the second install below falls back on PyPI's.
CPU_WHEELS := https://download.pytorch.org/whl/cpu

demo: .venv/installed
	PYTHON=$(PY) recipes/demo.sh

test: .venv/installed-tests
	$(PY) -m pytest -q

# A stamp is as new as the requirements it installed: the second call has nothing to do.
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12, or the like")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi > /dev/null && ! $(PY) -c 'import torch' 2> /dev/null; then \
		$(PY) -m pip install -q --no-deps --retries 1 --extra-index-url $(CPU_WHEELS) "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)" || true; fi
	$(PY) -m pip install -q -r requirements.txt
	@touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	$(PY) -m pip install -q -r tests/requirements.txt
	@touch $@

clean:
	rm -rf data/demo runs/demo indexes/demo

.PHONY: demo test clean
