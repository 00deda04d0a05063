# Everything a person does with this repository. `make` alone tells.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PARTS := .parts/bin
TOOLS := .tools
NODE_PARTS := etcd kubernetes containerd network helm
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unversioned)
GO_BUILD := go build -ldflags "-s -w -X main.version=$(VERSION)"

# One set of flags for everything, or Go would compile it all once for each set. No cgo: binaries are static, but for
# meshca-pkcs11.
export CGO_ENABLED := 0
export GOFLAGS := -trimpath -buildvcs=false

# What `make run` may be told: UPSTREAM=vault SVID_TTL=30s RUN_FOR=60s RATE=50 make run
UPSTREAM ?=
SVID_TTL ?=
RUN_FOR ?=
RATE ?=

# What `make run-kubernetes` may be told.
KEEP ?=

# What `make image` may be told.
DOCKER ?= docker
IMAGE_REGISTRY ?= ghcr.io/meshca
IMAGE_TAG ?= $(shell sed -n 's/^appVersion: //p' deploy/chart/meshca/Chart.yaml)

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: run
run: need-go ## the demo: two real Envoys, mTLS, rotation under traffic (UPSTREAM=vault, SVID_TTL=30s, RUN_FOR=60s, RATE=50)
	@test/parts/build $(PARTS) envoy $(if $(filter vault,$(UPSTREAM)),vault)
	@echo "building meshca and the demo (a minute or two the first time)"
	@$(GO_BUILD) -o bin/ ./cmd/meshca ./cmd/certctl ./test/demo
	@exec bin/demo $(if $(UPSTREAM),-upstream=$(UPSTREAM)) $(if $(SVID_TTL),-svid-ttl=$(SVID_TTL)) $(if $(RUN_FOR),-run-for=$(RUN_FOR)) $(if $(RATE),-rate=$(RATE))

.PHONY: run-kubernetes
run-kubernetes: need-go ## the same on a real Kubernetes node (as root): helm install, kubectl apply, mTLS, rotation (KEEP=1 leaves it until Ctrl-C)
	@test/parts/build $(PARTS) $(NODE_PARTS) envoy
	@echo "building the demo (a minute or two the first time)"
	@go build -o bin/demo-kubernetes ./test/helm/demo
	@exec bin/demo-kubernetes $(if $(KEEP),-keep)

.PHONY: build
build: need-go ## the three binaries, static, into bin/
	$(GO_BUILD) -o bin/ ./cmd/...

.PHONY: build-pkcs11
build-pkcs11: need-go ## bin/meshca-pkcs11: meshca for keys in HSMs; not static, needs a C compiler
	@command -v "$${CC:-gcc}" >/dev/null || { echo "a C compiler is missing (Debian: apt-get install gcc libc6-dev)"; exit 1; }
	CGO_ENABLED=1 $(GO_BUILD) -o bin/meshca-pkcs11 ./cmd/meshca

.PHONY: test
test: proto-check test-unit test-real ## everything: generated code, unit tests, and the tests against real servers

.PHONY: test-unit
test-unit: need-go ## the tests that need no server: beside the code, and the rules of the house in test/
	go vet ./...
	go test -timeout 30m $$(go list ./... | grep -v /meshca/test/) ./test

.PHONY: test-real
test-real: parts test-pkcs11 ## the tests against a real Kubernetes node, etcd, Envoy, Vault and SoftHSM; one package after the other
	go test -p 1 -timeout 30m $$(go list ./test/... | grep -v -e /meshca/test$$ -e /meshca/test/softhsm$$)
	@if ls .logs/figures/*.txt >/dev/null 2>&1; then echo "measured, the last time each of these tests ran:"; cat .logs/figures/*.txt; fi
	@go run ./test/node/up -check || echo "SKIPPED: all tests on a real Kubernetes node, for the reason above"

# With cgo, and so compiled once more. What the machine lacks is said last, where it is seen; CI installs it.
.PHONY: test-pkcs11
test-pkcs11: need-go ## the tests of keys in PKCS #11, against SoftHSM (needs softhsm2 and a C compiler)
	@if command -v softhsm2-util >/dev/null && command -v gcc >/dev/null; then set -x; \
	  CGO_ENABLED=1 go vet ./ca/pkcs11 ./test/softhsm; CGO_ENABLED=1 go test -timeout 20m ./ca/pkcs11 ./test/softhsm; \
	else printf '%s\n' '' '!! NOT TESTED: keys in PKCS #11. This machine lacks SoftHSM or a C compiler.' \
	  '!! Debian: apt-get install softhsm2 gcc libc6-dev' ''; fi

.PHONY: test-race
test-race: need-go ## the unit tests under the race detector (needs a C compiler)
	CGO_ENABLED=1 go test -race -timeout 20m $$(go list ./... | grep -v /meshca/test)

.PHONY: bench
bench: need-go ## the figures, as ratios to a floor of the same run; a table, and bench.json
	@test/parts/build $(PARTS) etcd kubernetes
	go run ./test/bench -json bench.json

.PHONY: parts
parts: need-go ## the real servers into .parts/bin (minutes the first time, nothing after)
	@test/parts/build $(PARTS) $(NODE_PARTS) envoy vault

.PHONY: node
node: need-go ## a real Kubernetes node (as root), till Ctrl-C; it tells its KUBECONFIG
	@test/parts/build $(PARTS) $(NODE_PARTS)
	@go build -o bin/node ./test/node/up
	@exec bin/node

.PHONY: lint
lint: need-go proto-check $(TOOLS)/golangci-lint ## golangci-lint, buf lint, gofmt, shell syntax
	@unformatted=$$(git ls-files -co --exclude-standard '*.go' | xargs gofmt -l); \
	  [ -z "$$unformatted" ] || { echo "gofmt these:"; echo "$$unformatted"; exit 1; }
	bash -n test/parts/build .ci/run
	$(TOOLS)/buf lint
	$(TOOLS)/golangci-lint run ./...

.PHONY: manifests
manifests: need-go ## make deploy/manifests and the chart's table of values from the Helm chart
	@test/parts/build $(PARTS) helm
	go run ./test/chart/generate

.PHONY: image
image: need-docker ## the images of the CA and of the agent, IMAGE_REGISTRY=registry.example/meshca IMAGE_TAG=0.1.0 (DOCKER=podman)
	for name in meshca meshca-agent; do \
	  $(DOCKER) build --file deploy/Dockerfile --target "$$name" --build-arg VERSION=$(VERSION) --tag "$(IMAGE_REGISTRY)/$$name:$(IMAGE_TAG)" .; done

.PHONY: need-docker
need-docker:
	@command -v $(DOCKER) >/dev/null || { echo "$(DOCKER) is missing; with podman: make image DOCKER=podman"; exit 1; }

.PHONY: proto
proto: proto-tools ## generate the Go code of api/meshca/v1 from its .proto files
	$(TOOLS)/buf generate

.PHONY: proto-check
proto-check: proto-tools ## fail where the generated code is not what `make proto` makes
	@scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	  $(TOOLS)/buf generate -o "$$scratch"; \
	  made=$$(cd "$$scratch" && find api -name '*.pb.go' | sort); \
	  [ "$$made" = "$$(find api -name '*.pb.go' | sort)" ] || { echo "generated files are missing or left over: run \`make proto\`"; exit 1; }; \
	  for f in $$made; do cmp "$$scratch/$$f" "$$f" || { echo "run \`make proto\` and commit $$f"; exit 1; }; done

.PHONY: proto-tools
proto-tools: need-go $(TOOLS)/buf $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc

# A tool is built from the module that pins it, again when the pin changes.
define tool
$(TOOLS)/$(1): test/tools/$(2)/go.mod test/tools/$(2)/go.sum
	@echo "building $(1)"
	@go -C test/tools/$(2) build -o $$(CURDIR)/$$@.new $(3)
	@mv $$@.new $$@
endef
$(eval $(call tool,buf,buf,github.com/bufbuild/buf/cmd/buf))
$(eval $(call tool,protoc-gen-go,protoc-gen,google.golang.org/protobuf/cmd/protoc-gen-go))
$(eval $(call tool,protoc-gen-go-grpc,protoc-gen,google.golang.org/grpc/cmd/protoc-gen-go-grpc))
$(eval $(call tool,golangci-lint,lint,github.com/golangci/golangci-lint/v2/cmd/golangci-lint))

.PHONY: clean
clean: ## what was built and kept here: bin, .meshca, .logs, .tools; the real servers stay (rm -r .parts takes them too)
	rm -rf bin .meshca .logs $(TOOLS) bench.json

.PHONY: need-go
need-go:
	@command -v go >/dev/null || { echo "Go is missing: install Go 1.26 or newer from https://go.dev/dl/ and put it on the PATH"; exit 1; }
