# diffusion-runtime. `make` alone lists the targets.
PYTHON            ?= python3
VENV              ?= .venv
PY                := $(VENV)/bin/python
CONTAINER_RUNTIME ?= podman
IMAGE             ?= diffusion-runtime
TAG               ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
URL               ?= http://localhost:8080
MODEL             ?= model
MODEL_ID          ?=
HTTP_PORT         ?= 8080
GRPC_PORT         ?= 8081
TESTS             ?= tests
OFFLINE           ?= 0
FLASH_ATTN        ?= 1
BASE_IMAGE        := $(shell sed -n 's/^FROM \(.*\) AS dependencies$$/\1/p' Containerfile)
STAMP             := $(VENV)/.complete

.DEFAULT_GOAL := help
.PHONY: help setup demo dev test test-gpu test-browser test-v1 test-v2 check format wheels build save load run push clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv and install everything into it

$(STAMP): requirements-base.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"{sys.executable} is Python {v[0]}.{v[1]}; this needs 3.11 to 3.13: make PYTHON=python3.12 …")'
	@echo "==> installing into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-base.txt -r requirements-dev.txt
	@touch $@

demo: setup ## Serve tiny models, make a picture and a video through the API, save them, stop
	@$(PY) -m runtime.demo

dev: setup ## Serve MODEL_ID, or a tiny GLM-Image, in the foreground
	@set -e; folder="$(MODEL_ID)"; \
	if [ -z "$$folder" ]; then $(PY) -m runtime.tiny .cache/tiny-models --family glm-image >/dev/null; folder=.cache/tiny-models/glm-image; fi; \
	printf '%s\n' "When it is ready, in another terminal:" "" \
	  "  curl -s http://localhost:$(HTTP_PORT)/v1/models/model:predict -H 'Content-Type: application/json' \\" \
	  "    -d '{\"instances\": [{\"prompt\": \"a red fox in the snow\", \"seed\": 7}]}' \\" \
	  "  | python3 -c 'import base64, json, sys; p = json.load(sys.stdin)[\"predictions\"][0]; m = p.get(\"video\") or p[\"image\"]; open(\"result.\" + m[\"format\"].lower(), \"wb\").write(base64.b64decode(m[\"b64\"]))'" ""; \
	exec $(PY) -m runtime --model_id "$$folder" --http_port $(HTTP_PORT) --grpc_port $(GRPC_PORT)

test: setup ## Run the tests (TESTS=tests/server for a part)
	@$(PY) -m pytest -q -n auto --dist loadfile --reruns 1 $(TESTS)

test-gpu: setup ## Run the tests that need a CUDA device; fails where there is none
	@$(PY) -m pytest -q -m gpu tests

test-browser: setup ## Run the tests of the page in the system's Chromium; fails where there is none
	@$(PY) -m pytest -q -m browser -n auto --reruns 1 tests/browser

test-v1: setup ## Call the endpoint at URL over v1, save the result
	@$(PY) -m runtime.demo call --url $(URL) --model $(MODEL) --protocol v1

test-v2: setup ## Call the endpoint at URL over v2, save the result
	@$(PY) -m runtime.demo call --url $(URL) --model $(MODEL) --protocol v2

check: setup ## Lint, format and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: setup ## Format the code
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

wheels: ## Fill image/wheelhouse on a connected machine, for make build OFFLINE=1
	$(CONTAINER_RUNTIME) run --rm --user 0 -v "$(CURDIR)":/src:Z $(BASE_IMAGE) /src/image/install.sh wheels /src/image/wheelhouse
	@test "$(FLASH_ATTN)" = 0 || \
	  $(CONTAINER_RUNTIME) build -f Containerfile --target flash-attn-wheel --output type=local,dest=image/wheelhouse .

build: ## Build the container image; OFFLINE=1 from image/wheelhouse alone, FLASH_ATTN=0 without flash-attn
	$(CONTAINER_RUNTIME) build -f Containerfile -t $(IMAGE):$(TAG) \
	  $(if $(filter 1,$(OFFLINE)),--pull=never --network=none --build-arg OFFLINE=1 --build-arg FLASH_ATTN=0,--build-arg FLASH_ATTN=$(FLASH_ATTN)) \
	  --build-arg VERSION=$(TAG) --build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null || echo unknown) .

save: ## Write the image to diffusion-runtime-TAG.tar, to carry it to a machine without a network
	$(CONTAINER_RUNTIME) save -o diffusion-runtime-$(TAG).tar $(IMAGE):$(TAG)

load: ## Read the image from diffusion-runtime-TAG.tar
	$(CONTAINER_RUNTIME) load -i diffusion-runtime-$(TAG).tar

run: ## Run the image on MODEL_ID, a folder of this machine
	@test -n "$(MODEL_ID)" || { echo "make run needs MODEL_ID=/path/to/a/model"; exit 1; }
	$(CONTAINER_RUNTIME) run --rm -p $(HTTP_PORT):8080 -p $(GRPC_PORT):8081 -v "$(abspath $(MODEL_ID))":/mnt/models:ro $(IMAGE):$(TAG)

push: ## Push the image
	$(CONTAINER_RUNTIME) push $(IMAGE):$(TAG)

clean: ## Remove what the other targets made
	rm -rf $(VENV) .cache demo-output .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
