# make demo and make test set everything up by themselves; PYTHON chooses the interpreter (>= 3.11).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
# one thread a worker: two threads for small tensors cost more than they bring
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
# every annotated shape is checked at every call: two thirds more time, so in the fast tests alone
SHAPES := --jaxtyping-packages=moa,beartype.beartype
# half of the cores, where two trainings run side by side
HALF := OMP_NUM_THREADS=$$(( ($$(nproc) + 1) / 2 ))
BENCH := OMP_NUM_THREADS=1 $(BIN)/python -m bench
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint check bench setup boards clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moa needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --requirement requirements.txt
	@touch $@

demo: setup  ## a mixture and one LoRA of its size, side by side; scores, one merged adapter, images, and what was gained
	rm -rf $(RUN)/merged && mkdir -p $(dir $(RUN))
	$(HALF) $(BIN)/python train.py --config configs/demo.yaml --config configs/shapes/one_lora.yaml \
		out=$(RUN)_lora --overwrite > $(RUN)_lora.log 2>&1 & lora=$$!; trap "kill $$lora; exit 1" INT TERM; \
	$(HALF) $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		train.py --config configs/demo.yaml out=$(RUN) --overwrite || { kill $$lora; exit 1; }; \
	wait $$lora || { tail -n 5 $(RUN)_lora.log; exit 1; }
	$(BIN)/python eval.py run=$(RUN)
	$(BIN)/python -m scripts.merge run=$(RUN) rank=sum out=$(RUN)/merged/mean
	$(BIN)/python -m scripts.merge run=$(RUN) merged=true out=$(RUN)/merged/checkpoint
	$(BIN)/python -m scripts.summary run=$(RUN) beside=[$(RUN)_lora] merged=[$(RUN)/merged/mean]

test: setup  ## the whole suite
	$(PYTEST) -m "not slow" $(SHAPES)
	$(PYTEST) -m slow

lint: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy moa data train.py eval.py federate.py scripts bench

check: lint  ## and the fast tests
	$(PYTEST) -m "not slow" $(SHAPES)

bench: setup  ## every speed and memory figure, its tables and charts: results/benchmarks.md; half an hour on one core
	$(BENCH).mixture
	$(BENCH).mixture size=slice7b rank=8 rounds=3
	$(BENCH).mechanisms
	$(BENCH).precision
	$(BENCH).growth
	$(BENCH).generation experts=[4,8,16]
	$(BENCH).data
	$(BENCH).planning
	$(BIN)/python -m bench.merging
	$(BIN)/python -m bench.federated
	$(BIN)/python -m bench.report

boards: setup  ## results/board_*.md and boards.json: hours on two cores; continues where it was stopped
	$(BIN)/python -m scripts.demo.boards out=runs/boards jobs=2

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
