# One way for people and for CI. VENV and PYTHON may be given: make demo PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TESTS ?= not long and not containers
# some wait for Flower, and leave a core to others: three on two cores
PARALLEL = -n 3 --dist loadgroup --no-loadscope-reorder -rs

# pip compiles nothing (a minute and more for what nobody imports); Python does, once, when something
# is first imported. Where this is set, every process would compile PyTorch anew, 7 s each.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo coverage test containers container-tools long faults quick lint install clean

demo: $(VENV)/.installed  ## three phantom hospitals train together, about two minutes
	$(BIN)/polyclinic simulate --config configs/demo.toml

test: lint  ## everything that CI checks; with TESTS="not long" the containers too, as CI does
	$(BIN)/python -m pytest $(PARALLEL) -m "$(TESTS)"

containers: $(VENV)/.test-installed  ## build the images and run a federation in them, as root; 8 minutes
	POLYCLINIC_CONTAINERS=required $(BIN)/python -m pytest -m containers

container-tools:  ## what that needs, from Debian's packages
	which podman buildah runc mmdebstrap || { apt-get update && apt-get install --yes \
	    --no-install-recommends podman buildah runc mmdebstrap catatonit netavark aardvark-dns iptables; }

long: $(VENV)/.test-installed  ## what takes too long for CI: torch.compile, every ONNX option
	$(BIN)/python -m pytest -m "long" --ignore tests/deployment/test_faults.py

faults: $(VENV)/.test-installed  ## every fault at every phase of a deployment; well over an hour
	POLYCLINIC_FAULT_TABLE=faults.md $(BIN)/python -m pytest -m "slow or long" tests/deployment/test_faults.py

coverage: $(VENV)/.test-installed  ## line coverage of all tests that start no processes
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not long" \
	    --cov client --cov configs --cov mtl_model --cov server --cov simulation --cov-report term

quick: $(VENV)/.test-installed  ## unit tests, a minute and a half on 2 cores: no processes, federations or training
	$(BIN)/python -m pytest $(PARALLEL) -m "not (slow or long or federation or numeric)"

lint: $(VENV)/.test-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m tests.prose
	place=$$(mktemp -d) && ln -s "$(CURDIR)" "$$place/polyclinic" \
	    && MYPYPATH="$$place" $(BIN)/mypy; status=$$?; rm -r "$$place"; exit $$status

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --no-compile -c constraints.txt -e .
	$(BIN)/python -c "import apps, opacus, flwr.simulation.run_simulation; \
	    import polyclinic as p; p.command_line()"
	touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check --no-compile 'pip>=25.1' # the first with --group
	$(BIN)/pip install --disable-pip-version-check --no-compile -c constraints.txt --group test
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info *.fab
