# make quickstart | test | soak | study | study-muon | study-recipe | study-quickstart | study-search | study-medium | finetune-study | slurm-demo | lint | docs | configuration
# Each target installs what it needs. If a command is repeated, it keeps finished results and resumes what was interrupted.
PYTHON ?= python3
PY := .venv/bin/python
CORPUS := data/python-stdlib
RUN := runs/quickstart
STUDY_ARMS := standard,strats,ppots-loss,ppots-gradient,mirror,complement,count,counted,counted-ppots,plain,bell,bell-anneal,bell-counted,best,ar
TASKS := data/tasks
STDLIB = $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
FINETUNE := runs/finetune
FINETUNE_ARMS ?= standard,strats,paper-ppots,paper-mirror,paper-isad,paper-syrm,ema,paper-ppots-mirror,ppots-gradient,counted-ppots,best,clipped,ar
FINETUNE_SEEDS ?= 0,1,2,3,4
FINETUNE_LR ?= 6e-3
FINETUNE_MUON_LR ?= 5e-3
FINETUNE_RUNS = $(FINETUNE)/lr-$(FINETUNE_LR)-$(FINETUNE_MUON_LR)
export OMP_NUM_THREADS ?= 1

.PHONY: setup corpus quickstart test soak study study-muon study-recipe study-quickstart study-search study-medium finetune-study slurm-demo lint docs configuration

setup: .venv/.installed

.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: mdmtrain needs Python 3.10 or newer: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# The corpus is the standard library of the Python that runs this: real text without a download.
corpus: setup
	@$(PY) tools/prepare_data.py "$$($(PY) -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')" \
		--include '*.py' --exclude test tests idle_test site-packages dist-packages lib2to3 \
		--vocab-size 512 --validation-fraction 0.05 --out $(CORPUS)

quickstart: corpus
	@$(PY) -m torch.distributed.run --standalone --nproc-per-node 2 -m mdmtrain.train configs/quickstart.yaml
	@$(PY) -m mdmtrain.evaluate $(RUN) --rows 1000
	@echo "for comparison: the standard objective with AdamW on the same tokens (Python 3.11's library) has 2.3402 bits/byte, 37.0% below"
	@echo "run folder   $(RUN)"
	@echo "TensorBoard  .venv/bin/tensorboard --logdir $(RUN)/events"
	@echo "text that the model has filled in between a given prefix and suffix:"
	@$(PY) -m mdmtrain.generate $(RUN) --gen-length 12 --temperature 0.5 \
		--prefix "$$(printf 'import os\n\n\nclass Reader:\n    def __init__(self, path):\n        self')" \
		--suffix "$$(printf ' = path\n\n    def close(self):\n        return None\n')"

# Each test file runs in one process, so that the fixtures of a file are made only once.
test: setup
	$(PY) -m pytest -n 2 --dist loadfile

# All tests, with the full numbers of repetitions; `make test` runs only some of these. Takes hours.
soak: setup
	MDMTRAIN_SOAK=1 $(PY) -m pytest

# Train every arm from the same initial weights at two learning rates (docs/variance.md). Takes hours on two cores. The
# same command resumes it. Needs the corpus of the quickstart.
study: setup
	@mkdir -p runs
	$(PY) -m launchers.sweep configs/study.yaml --arms $(STUDY_ARMS) --seeds 0,1,2 --vary optim.lr=6e-3,3e-3 \
		--dir runs/study --workers 2 --json runs/study.json --figure runs/study.png optim.name=adamw

# Repeat the paper's experiment (docs/finetune-study.md): make tasks, train two base models, and fine-tune every arm from
# them, one run at a time. The optimizer of all arms is set on the command line. The same command resumes it;
# FINETUNE_ARMS and FINETUNE_SEEDS=0,1,... choose the runs, FINETUNE_LR and FINETUNE_MUON_LR the learning rates.
finetune-study: setup
	@$(PY) tools/make_tasks.py --out $(TASKS)
	@$(PY) tools/prepare_data.py $(TASKS)/text.jsonl $(addprefix $(STDLIB)/,asyncio email http json logging) \
		--include '*.py' --vocab-size 640 --validation-fraction 0.05 --out $(TASKS)/text
	@for split in pretrain train; do $(PY) tools/prepare_data.py $(TASKS)/$$split.jsonl --tokenizer $(TASKS)/text \
		--validation-fraction 0.02 --out $(TASKS)/$$split || exit; done
	@$(PY) -m mdmtrain.train configs/finetune-base.yaml configs/arms/counted-ppots.yaml run.dir=$(FINETUNE)/base-mdm \
		optim.name=muon optim.muon_lr=5e-3
	@$(PY) -m mdmtrain.train configs/finetune-base.yaml configs/arms/ar.yaml run.dir=$(FINETUNE)/base-ar \
		optim.name=muon optim.muon_lr=5e-3
	@$(PY) -m launchers.finetune configs/finetune-base.yaml configs/finetune.yaml optim.name=muon \
		optim.lr=$(FINETUNE_LR) optim.muon_lr=$(FINETUNE_MUON_LR) \
		--tasks $(TASKS)/test.jsonl \
		--base $(FINETUNE)/base-mdm --ar-base $(FINETUNE)/base-ar --arms $(FINETUNE_ARMS) --seeds $(FINETUNE_SEEDS) \
		--dir $(FINETUNE_RUNS) --json $(FINETUNE_RUNS).json --figure $(FINETUNE_RUNS).png

# Train arms with Muon and QK-norm, at the size of the study. Takes hours on two cores. The same command resumes it.
study-muon: corpus
	@mkdir -p runs
	$(PY) -m launchers.sweep configs/study.yaml --arms standard,counted-ppots,bell-counted,best,clipped,window,ar \
		--seeds 0,1,2,3,4 --vary optim.lr=6e-3,1.2e-2 --dir runs/study-muon --workers 2 \
		--json runs/study-muon.json --figure runs/study-muon.png optim.name=muon model.qk_norm=true

# What objective and optimizer save together: AdamW and Muon at several learning rates, and Muon without QK-norm.
RECIPE := configs/study.yaml --seeds 0,1,2,3,4 --dir runs/study-recipe --workers 2
RECIPE_ADAMW_1 := optim.name=adamw optim.lr=1.5e-3 model.qk_norm=false
RECIPE_ADAMW_3 := optim.name=adamw optim.lr=3e-3 model.qk_norm=false
RECIPE_ADAMW_6 := optim.name=adamw optim.lr=6e-3 model.qk_norm=false
RECIPE_MUON := optim.name=muon optim.lr=1.2e-2 model.qk_norm=true
RECIPE_MUON_24 := optim.name=muon optim.lr=2.4e-2 model.qk_norm=true
RECIPE_MUON_PLAIN := optim.name=muon optim.lr=1.2e-2 model.qk_norm=false
study-recipe: corpus
	@mkdir -p runs
	$(PY) -m launchers.sweep $(RECIPE) --arms standard --variant '$(RECIPE_ADAMW_1)'
	$(PY) -m launchers.sweep $(RECIPE) --arms standard,clipped,best --variant '$(RECIPE_ADAMW_3)' \
		--variant '$(RECIPE_ADAMW_6)' --variant '$(RECIPE_MUON_PLAIN)'
	$(PY) -m launchers.sweep $(RECIPE) --arms standard,clipped,best,ar --variant '$(RECIPE_MUON)'
	$(PY) -m launchers.sweep $(RECIPE) --arms standard,clipped,best,ar --variant '$(RECIPE_MUON_24)' --seeds 0,1
	$(PY) -m launchers.sweep $(RECIPE) --arms standard,clipped,best,ar --variant '$(RECIPE_ADAMW_1)' \
		--variant '$(RECIPE_ADAMW_3)' --variant '$(RECIPE_ADAMW_6)' --variant '$(RECIPE_MUON_PLAIN)' \
		--variant '$(RECIPE_MUON)' --variant '$(RECIPE_MUON_24)' --reference 'standard $(RECIPE_ADAMW_3)' \
		--report --json runs/study-recipe.json

# The same comparison at the size of the quickstart. The schedule is constant before a decay, so that tokens to a level can
# be compared.
QUICK := configs/quickstart.yaml --seeds 0,1,2 --dir runs/study-quickstart --workers 2 \
	run.micro_batch=32 optim.schedule=wsd eval.every=70
QUICK_ADAMW := optim.name=adamw optim.lr=4e-3 optim.muon_lr=null model.qk_norm=false
QUICK_ADAMW_2 := optim.name=adamw optim.lr=2e-3 optim.muon_lr=null model.qk_norm=false
QUICK_ADAMW_8 := optim.name=adamw optim.lr=8e-3 optim.muon_lr=null model.qk_norm=false
QUICK_MUON := optim.name=muon optim.lr=1.2e-2 optim.muon_lr=5e-3 model.qk_norm=true
QUICK_MUON_HALF := optim.name=muon optim.lr=6e-3 optim.muon_lr=2.5e-3 model.qk_norm=true
study-quickstart: corpus
	@mkdir -p runs
	$(PY) -m launchers.sweep $(QUICK) --arms standard --variant '$(QUICK_ADAMW_2)' --variant '$(QUICK_ADAMW)' \
		--variant '$(QUICK_ADAMW_8)'
	$(PY) -m launchers.sweep $(QUICK) --arms clipped,best,ar --reference clipped --variant '$(QUICK_MUON)'
	$(PY) -m launchers.sweep $(QUICK) --arms clipped,best,ar --reference clipped --variant '$(QUICK_MUON_HALF)' --seeds 0
	$(PY) -m launchers.sweep $(QUICK) --arms standard,clipped,best,ar --variant '$(QUICK_ADAMW_2)' \
		--variant '$(QUICK_ADAMW)' --variant '$(QUICK_ADAMW_8)' --variant '$(QUICK_MUON)' \
		--variant '$(QUICK_MUON_HALF)' --reference 'standard $(QUICK_ADAMW)' --report --json runs/study-quickstart.json

# What could be better in the recipe, at the size of the study: the window of masking rates, the optimizer's settings, the
# batch at equal tokens.
SEARCH := configs/study.yaml --arms clipped --workers 2 optim.name=muon model.qk_norm=true
study-search: corpus
	@mkdir -p runs
	$(PY) -m launchers.sweep $(SEARCH) --seeds 0,1 --dir runs/study-search/window --json runs/study-search-window.json \
		--vary diffusion.rate_low=0.2,0.3,0.4 --vary diffusion.rate_high=0.7,0.8,0.9 \
		--reference 'clipped diffusion.rate_low=0.3 diffusion.rate_high=0.8' optim.lr=1.2e-2
	$(PY) -m launchers.sweep $(SEARCH) --seeds 0 --dir runs/study-search/optim --json runs/study-search-optim.json \
		--vary optim.weight_decay=0.1,0 --vary optim.beta2=0.95,0.99 --vary optim.clip_norm=1.0,null \
		--vary optim.warmup_steps=50,200 optim.lr=1.2e-2 \
		--reference 'clipped optim.weight_decay=0.1 optim.beta2=0.95 optim.clip_norm=1.0 optim.warmup_steps=50'
	$(PY) -m launchers.sweep $(SEARCH) --seeds 0 --dir runs/study-search/batch --json runs/study-search-batch.json \
		--variant 'run.global_batch=32 run.steps=1000' --variant 'run.global_batch=16 run.steps=2000' \
		--variant 'run.global_batch=64 run.steps=500' --vary optim.lr=6e-3,1.2e-2,2.4e-2 \
		--reference 'clipped run.global_batch=32 run.steps=1000 optim.lr=1.2e-2' run.micro_batch=16

# The recipe at 32 times the training FLOPs. A run takes a quarter of an hour to an hour on a core. The corpus is the source
# of installed packages (torch, sympy, numpy). It needs a C++ compiler. The learning rate is that of docs/variance.md, chosen
# with runs of a quarter of the length.
PACKAGES := data/packages
MEDIUM := configs/study-medium.yaml --seeds 0,1,2 --dir runs/study-medium --workers 2
study-medium: setup
	@mkdir -p runs
	@site=$$($(PY) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'); \
	$(PY) tools/prepare_data.py $$site/torch $$site/sympy $$site/numpy --include '*.py' \
		--exclude tests test testing _vendor --vocab-size 2048 --validation-fraction 0.02 --out $(PACKAGES)
	$(PY) -m launchers.sweep $(MEDIUM) --arms standard,best,clipped --vary optim.name=adamw,muon --vary optim.lr=4e-3
	$(PY) -m launchers.sweep $(MEDIUM) --arms ar --reference ar --vary optim.name=muon --vary optim.lr=4e-3
	$(PY) -m launchers.sweep $(MEDIUM) --arms standard,best,clipped,ar --vary optim.name=adamw,muon --vary optim.lr=4e-3 \
		--reference 'standard optim.name=adamw optim.lr=4e-3' --report \
		--json runs/study-medium.json --figure runs/study-medium.png

# Start a Slurm cluster of two nodes on this machine, a run on both, and preempt it (needs Debian's slurm-wlm and munge,
# and root).
slurm-demo: corpus
	@$(PY) -m tests.slurm.demo

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Build the documentation in build/site. A broken link or a missing page is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# Write the page of all configuration keys from mdmtrain/config.py.
configuration: setup
	$(PY) -m mdmtrain.config_help --markdown > docs/configuration.md
