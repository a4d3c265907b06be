# make train   a small H-Net learns the Python standard library on this machine's best device
# make test    every test that fits in a few minutes on two CPU cores
# make test-transformers   those of hnet_transformers/, in an environment of their own (.venv-transformers)
# make soak    the long tests (random kills, many seeds)
# make audit   every kernel compiled for six kinds of GPU, none of which has to be here; ten minutes
# make lint    ruff
# Another Python: make PYTHON=python3.12 train

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: train test test-transformers soak audit lint clean

train: .venv/installed-base
	$(BIN)/python train.py $(ARGS)

test: .venv/installed-dev
	$(BIN)/python -m pytest $(ARGS)

# bytecode is written for what is imported, which is little of what is installed
test-transformers: .venv-transformers/installed
	PYTHONDONTWRITEBYTECODE= .venv-transformers/bin/python -m pytest tests/test_transformers.py $(ARGS)

soak: .venv/installed-dev
	$(BIN)/python -m pytest -m soak $(ARGS)

audit: .venv/installed-dev
	$(BIN)/python benchmarks/audit.py $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed; '$(PYTHON)' is older or missing: install it, then run make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "'$(PYTHON)' lacks the venv module: install it (on Debian and Ubuntu: apt install python3-venv) and run make again"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed-base: .venv/created pyproject.toml constraints.txt
	@echo "Installing into .venv (once) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . -c constraints.txt
	@touch $@

.venv/installed-dev: .venv/installed-base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

# on top of .venv, whose packages it sees and does not install again
.venv-transformers/installed: .venv/installed-dev constraints-transformers.txt
	@echo "Installing into .venv-transformers (once) ..."
	$(PYTHON) -m venv .venv-transformers
	place='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  $(BIN)/python -c "$$place" > "$$(.venv-transformers/bin/python -c "$$place")/venv.pth"
	.venv-transformers/bin/python -m pip install --quiet --no-compile --disable-pip-version-check \
	  -e '.[transformers,lm-eval]' -c constraints-transformers.txt
	@touch $@

clean:
	rm -rf .venv .venv-transformers build *.egg-info
