# make demo   set up, then train a small model on real text with two processes (minutes on a laptop)
# make test   set up, then run the tests
# make check  lint, types and the tests: before every commit
# make test-faults  runs that are broken on purpose; make soak  one that is killed again and again (minutes each)
# make fuzz   ten minutes of files that have been made wrong

PYTHON ?= python3
# `cpu` pins a CPU build of torch; on a GPU machine: make EXTRAS= demo (an empty value takes the newest torch).
EXTRAS ?= cpu
# Another set-up is another environment: .venv for cpu, .venv-newest for an empty value.
VENV ?= .venv$(addprefix -,$(filter-out cpu,$(or $(EXTRAS),newest)))
BIN := $(VENV)/bin

comma := ,
runtime := .$(if $(EXTRAS),[$(EXTRAS)])
development := .[$(if $(EXTRAS),$(EXTRAS)$(comma))dev]

RUN_DIR ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test check test-faults soak fuzz test-slurm test-multinode
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/python tools/preprocess_data.py --input stdlib --glob '*.py' --output data/stdlib --train-tokenizer 4096
	$(if $(filter cpu,$(EXTRAS)),DS_ACCELERATOR=cpu) $(BIN)/deepspeed --log_level error --num_gpus 2 --master_port $(shell shuf -i 20000-39999 -n 1) pretrain_zebra.py --config examples/tiny_cpu.yaml --run.dir=$(RUN_DIR)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

test-faults: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m faults tests/faults

soak: $(VENV)/.installed-dev
	$(BIN)/python tests/faults/soak.py

fuzz: $(VENV)/.installed-dev
	$(BIN)/python tests/fuzz/fuzz_inputs.py --seconds 600

# Where the packages cannot be installed, the tests say so and are skipped.
install = which $(1) > /dev/null || (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $(2)) || true

test-slurm: $(VENV)/.installed-dev
	$(call install,munged slurmctld slurmd sbatch,munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins)
	$(BIN)/python -m pytest -m slow -rs tests/slurm

test-multinode: $(VENV)/.installed-dev
	$(call install,ip ssh sshd pdsh,iproute2 openssh-client openssh-server pdsh)
	$(BIN)/python -m pytest -m slow -rs tests/end_to_end/test_multinode.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || (echo "no venv module: on Debian, apt-get install python3-venv" && false)

# What an editable installation compiles or reads once: a change installs again.
sources := pyproject.toml setup.py $(wildcard csrc/*/*)

$(VENV)/.installed: $(sources) | $(BIN)/python
	@echo "installing torch, DeepSpeed and the rest into $(VENV) (about 1 GB; a minute or more)"
	$(BIN)/python -m pip install --quiet -e '$(runtime)'
	touch $@

$(VENV)/.installed-dev: $(sources) | $(BIN)/python
	@echo "installing torch, DeepSpeed and the development tools into $(VENV) (a minute or more)"
	$(BIN)/python -m pip install --quiet -e '$(development)'
	touch $@ $(VENV)/.installed
