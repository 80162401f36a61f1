# make figures   every notebook in profile quick, on CPU        make test   all checks, notebooks included
# make lab       JupyterLab                                      make paper  profile paper, on a GPU
# make bench     the KAF layer timed against others              make torture  faults and bad input, the long form
# make book      the notebooks as a site, build/book/            make test-browser  Lab and site in a real browser
# make keep      figures, and store the outputs in notebooks/    make clean  all but results/ and data/

PYTHON ?= python3
RUN := .venv/bin/python
# one thread a process, one process a core: small tensors gain nothing from more; and glibc keeps freed memory, as
# handing it back makes each large tensor touch fresh pages
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_MMAP_THRESHOLD_=33554432
WORKERS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count() or 1)")

.PHONY: figures keep test test-browser torture bench lab book paper lint clean
figures: .venv/ready
	$(RUN) -m kafnb figures --profile quick

keep: .venv/ready
	$(RUN) -m kafnb figures --profile quick --keep

paper: .venv/ready
	$(RUN) -m kafnb figures --profile paper $(ARGS)

# with a chromium on the machine the book is built too, and looked at
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
test: .venv/ready $(if $(CHROMIUM),book)
	$(THREADS) $(RUN) -m pytest --nbval -n $(WORKERS) tests notebooks

bench: .venv/ready
	mkdir -p runs && $(THREADS) $(RUN) -m pytest tests/benchmark_kaf.py -p no:xdist -o addopts= --benchmark-only \
	  --benchmark-timer=time.process_time --benchmark-columns=min,median,rounds --benchmark-sort=name \
	  --benchmark-json=runs/benchmark.json

torture: .venv/ready
	KAFNB_TORTURE=long $(THREADS) $(RUN) -m pytest -p no:xdist -o addopts= tests/torture $(ARGS)

# its threads, where they wait, give up their core soon: by default a busy core makes small tensors 50 times slower
lab: .venv/ready
	GOMP_SPINCOUNT=1000 $(RUN) -m jupyterlab --ip=127.0.0.1 --notebook-dir=notebooks

book: .venv/book
	$(RUN) book/build.py

test-browser: book
	$(THREADS) $(RUN) -m pytest -m browser tests/test_browser.py

lint: .venv/ready
	$(RUN) -m pip install --quiet ruff && $(RUN) -m ruff check . && $(RUN) -m ruff format --check .

.venv/ready: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "kafnb needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Say make PYTHON=python3.12" >&2; exit 2; }
	@echo "installing PyTorch and the rest into .venv, about 6 GB: several minutes, and quiet"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements.txt -e .
	@touch $@

.venv/book: .venv/ready requirements-book.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-book.txt
	@touch $@

clean:
	rm -rf runs .venv build *.egg-info .pytest_cache
