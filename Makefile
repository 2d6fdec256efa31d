# `make demo` and `make test` do everything: each makes .venv, installs what it needs once, and runs.
#   make demo                       text to numbers in four minutes, on a CPU; Ctrl-C, and again: it goes on
#   make demo SOURCE=synthetic      a generated world instead
#   make demo ARGS=--tiny           in miniature, to see that it runs
#   make test                       every test, on a CPU, offline
#   make demo PYTHON=python3.12     with another Python (3.11 or newer)
#   make engines                    the exports against Lucene and Milvus themselves (700 MB of packages)
#   make clean                      removes all that the demo wrote
PYTHON ?= python3
PY := .venv/bin/python
export SOURCE SEED OUT MNTP
# PyPI's torch for Linux brings gigabytes of CUDA libraries. Without an NVIDIA driver take the CPU wheel of
# the same version; where it cannot be reached, the second install below falls back on PyPI's.
CPU_WHEELS := https://download.pytorch.org/whl/cpu
NO_GPU = [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi > /dev/null
NO_TORCH = ! $(PY) -c 'import torch' 2> /dev/null
TORCH = "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)"

demo: .venv/installed
	@PYTHON=$(PY) recipes/demo.sh $(ARGS)

test: .venv/installed-tests
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# A stamp is as new as the requirements it installed: the second call has nothing to do.
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, \
	$(PYTHON) is %d.%d: make PYTHON=python3.12, or the like" % sys.version_info[:2])'
	test -x $(PY) || $(PYTHON) -m venv .venv
	@if $(NO_GPU) && $(NO_TORCH); then \
		$(PY) -m pip install -q --no-deps --retries 1 --extra-index-url $(CPU_WHEELS) $(TORCH) || true; fi
	$(PY) -m pip install -q -r requirements.txt
	@touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt tools/requirements.txt
	$(PY) -m pip install -q -r tests/requirements.txt
	@touch $@

# pyserini for the jar in it; its dependencies would replace torch.
.venv/installed-engines: .venv/installed-tests tools/requirements-engines.txt
	$(PY) -m pip install -q -r tools/requirements-engines.txt
	$(PY) -m pip install -q --no-deps pyserini
	@touch $@

engines: .venv/installed-engines
	$(PY) -m pytest -q tests/test_engines.py

# The names that recipes/demo.sh gives its folders; what else stands beside them is somebody's work.
DEMOS := $(foreach name,demo synthetic tiny-pydocs tiny-synthetic,$(name) $(name)-mntp)
clean:
	cd $(or $(OUT),.) && rm -rf $(foreach name,$(DEMOS),data/$(name) data/$(name).lock runs/$(name) indexes/$(name))

.PHONY: demo test engines clean
