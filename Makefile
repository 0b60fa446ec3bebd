# make quickstart   prompts -> replies -> cache -> training -> export -> report, on the embedded target
# make test         the test suite          make check     ruff and mypy
# make bench        compare all families    make embedded  train the embedded models from scratch (over an hour)
# make bench-train  training speed against bare matrix products, memory, two processes, the cost model
# make judge        a judge from nothing to its price, on the embedded pair (under twenty minutes)
# make wheel        dist/*.whl              make clean     remove what make built, but not runs/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DRAFTSMITH := HF_HUB_OFFLINE=1 $(BIN)/draftsmith

.DELETE_ON_ERROR:
.PHONY: install install-dev quickstart test check bench bench-train judge embedded wheel clean

# torch goes first: on a machine that offers a CPU build of the pinned version, the rest then settles on that one.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# ---- the quickstart ------------------------------------------------------------------------------------------------
# A stage is done when its stamp is there. An interrupted stage goes on where it was; `rm -r runs/quickstart` starts anew.

RUN := runs/quickstart
DONE := $(RUN)/.done
TARGET := embedded:target
TRAIN_PROMPTS ?= 2400
TEST_PROMPTS ?= 200
SHAPE ?= 4x5n11

quickstart: $(DONE)/card
	@awk '/^\| drafter/ { table = 1 } table && /^$$/ { exit } table' $(RUN)/report.md
	@$(DRAFTSMITH) decode --target $(TARGET) --drafter $(RUN)/drafter --shape $(SHAPE) --prompt \
	  "$$($(BIN)/python -c 'import json; print(json.loads(open("$(RUN)/test.jsonl").readline())["messages"][0]["content"])')"
	@echo "The whole report: $(RUN)/report.md"

$(DONE)/prompts: | install
	mkdir -p $(DONE)
	$(DRAFTSMITH) embedded prompts --path $(RUN)/train.jsonl --split train --count $(TRAIN_PROMPTS)
	$(DRAFTSMITH) embedded prompts --path $(RUN)/test.jsonl --split test --count $(TEST_PROMPTS)
	touch $@

$(DONE)/respond: $(DONE)/prompts
	$(DRAFTSMITH) data respond --target $(TARGET) --prompts $(RUN)/train.jsonl --out $(RUN)/replies \
	  --max-new-tokens 160 --batch-rows 64
	touch $@

$(DONE)/extract: $(DONE)/respond
	$(DRAFTSMITH) data extract --target $(TARGET) --source $(RUN)/replies --out $(RUN)/cache
	touch $@

$(DONE)/train: $(DONE)/extract
	$(DRAFTSMITH) train fit --config configs/quickstart.yaml \
	  $$(test -e $(RUN)/train/checkpoints/last.ckpt && echo --ckpt_path $(RUN)/train/checkpoints/last.ckpt)
	touch $@

$(DONE)/export: $(DONE)/train
	$(DRAFTSMITH) export --drafter $(RUN)/train/drafter --target $(TARGET) --out $(RUN)/drafter
	touch $@

$(DONE)/evaluate: $(DONE)/export
	$(DRAFTSMITH) evaluate --target $(TARGET) --prompts $(RUN)/test.jsonl --drafters redrafter=$(RUN)/drafter \
	  --shapes $(SHAPE) --out $(RUN)
	touch $@

# Once more, so that the model card holds what was measured.
$(DONE)/card: $(DONE)/evaluate
	$(DRAFTSMITH) export --drafter $(RUN)/train/drafter --target $(TARGET) --out $(RUN)/drafter --report $(RUN)/report.json
	touch $@

# ---- the rest ------------------------------------------------------------------------------------------------------

test: install-dev
	HF_HUB_OFFLINE=1 $(BIN)/pytest $(PYTEST_ARGS)

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/link_packages.py
	$(BIN)/mypy

bench: install
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/families.py

bench-train: install
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/train.py

judge: install
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/judge.py

embedded: install
	$(DRAFTSMITH) embedded build
	$(DRAFTSMITH) embedded accuracy --model target --problems 500
	$(DRAFTSMITH) embedded accuracy --model draft_lm --problems 500

wheel: install-dev
	rm -rf dist build/lib build/bdist*
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
