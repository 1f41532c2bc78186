# The two commands of this project, `make demo` and `make test`, set up everything from nothing but Python and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-app test-oldest nightly lint format audit cli-page licences clean

demo: $(VENV)/.installed
	$(BIN)/e5v demo --html demo.html

test: $(VENV)/.installed-for-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

nightly: $(VENV)/.installed-for-tests
	E5V_NIGHTLY=1 OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m slow

# The fast tests with the oldest versions that setup.cfg allows, in an environment of their own: nightly, not in CI.
# Where a test fails, raise the version in setup.cfg, and REQUIREMENTS in e5v_st/model/modeling_e5v.py with it.
# Types depend on the versions of libraries, so they are not checked here. Old versions of torch come with the libraries
# for GPUs (5 GB installed), and run on a CPU too; OLDEST_PIP passes options to pip, such as another index.
test-oldest: $(VENV)/oldest/.installed
	OMP_NUM_THREADS=1 $(VENV)/oldest/bin/python -m pytest -n 2 --dist loadfile -m "not slow" --ignore tests/test_types.py

# The tests of `e5v app`, in a browser too if there is a Chromium: nightly, not in CI. They have an environment of their
# own, as Gradio wants Pillow below 13 and the golden numbers want 13.
test-app: $(VENV)/app/.installed
	OMP_NUM_THREADS=1 $(VENV)/app/bin/python -m pytest tests/e5v_st/index/test_app.py tests/e5v_st/test_frameworks.py

lint: $(VENV)/.installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typing_baseline.py

format: $(VENV)/.installed-for-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Known weaknesses of what is installed. pip-audit has an environment of its own; without a network it says so and fails.
audit: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet pip-audit
	$(VENV)/audit/bin/pip-audit --skip-editable --path $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")

cli-page: $(VENV)/.installed-for-tests
	$(BIN)/python tests/cli_page.py

licences: $(VENV)/.installed-for-tests
	$(BIN)/python tests/licences.py

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.installed: setup.cfg setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[all]"
	touch $@

# Real tokenizers for tests/real_tokenizers.py, under their owners' licences: installed for tests, never part of this
# project, and where nothing imports them.
TOKENIZERS = llama-models==0.3.0 mistral-common==1.13.1 qwen-agent==0.0.34
$(VENV)/.installed-for-tests: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/tokenizers $(TOKENIZERS)
	touch $@

$(VENV)/oldest/.installed: setup.cfg setup.py constraints.txt tests/oldest.py
	$(PYTHON) -m venv --clear $(VENV)/oldest
	$(PYTHON) tests/oldest.py > $(VENV)/oldest/requirements.txt
	$(VENV)/oldest/bin/pip install --quiet $(OLDEST_PIP) -r $(VENV)/oldest/requirements.txt -e .
	$(VENV)/oldest/bin/pip install --quiet --no-deps --target $(VENV)/oldest/tokenizers $(TOKENIZERS)
	touch $@

$(VENV)/app/.installed: setup.cfg setup.py constraints.txt
	$(PYTHON) -m venv --clear $(VENV)/app
	grep -v '^pillow=' constraints.txt > $(VENV)/app/constraints.txt
	$(VENV)/app/bin/pip install --quiet -c $(VENV)/app/constraints.txt -e ".[app]" langchain-core playwright pytest pytest-xdist
	touch $@
