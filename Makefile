# make demo: train on the built-in digits, sample, score, show where the pictures are.
# make dynamics: train Configs C, E and G on them, draw their training dynamics: docs/dynamics.png.
# make guidance: train Config G with labels, guide its samples, draw them and their scores: docs/guid*.png.
# make test: ruff and pytest.    make test-slow: the long tests, of faults, restarts and bad input above all.
# make gpu: prove and measure all of it on a GPU; make gpu REHEARSE=1: the same way on the CPU, with tiny sizes.
# make check-run RUN=runs/cifar10_small/G: is a run right? Its held-out losses against docs/expected.jsonl.
# Each sets itself up in .venv first; done again, that takes no time. Needs Python 3.11 or newer: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
DEMO := --config config/digits/G.yaml

.PHONY: demo dynamics guidance check-run test test-slow gpu clean

demo: .venv/installed
	$(BIN)/python train.py $(DEMO)
	$(BIN)/python sample.py $(DEMO) --n_samples 500
	$(BIN)/python fid.py $(DEMO) --features pixels
	$(BIN)/python probe.py $(DEMO)
	$(BIN)/python -m edm2.results runs/digits/G --out runs/digits/G/results.png
	@echo "Watch the training curves: $(BIN)/tensorboard --logdir runs/digits/G/tensorboard"

dynamics: .venv/installed
	for c in C E G; do $(BIN)/python train.py --config config/digits/$$c.yaml || exit; done
	$(BIN)/python -m edm2.results --dynamics runs/digits/C runs/digits/E runs/digits/G --out docs/dynamics.png

guidance: .venv/installed
	$(BIN)/python benchmarks/guidance.py --seeds 1 --n_samples 500 --picture docs/guided.png
	$(BIN)/python -m edm2.results --guidance runs/guidance/0 --out docs/guidance.png

check-run: .venv/installed
	@$(BIN)/python benchmarks/expected.py --run "$(RUN)"

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not cuda"

gpu: .venv/installed-dev
	$(BIN)/python benchmarks/gpu.py $(if $(REHEARSE),--rehearse) $(if $(DATA_ROOT),--data_root $(DATA_ROOT))

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

clean:
	rm -rf .venv runs cache

.venv/installed: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: error: $(PYTHON) is not Python 3.11 or newer; say which one is: make PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@
