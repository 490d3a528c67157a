# What each target does is said by `make help`. On a fresh Debian, `make demo` and `make test` (as root) first install
# what is missing: see scripts/bootstrap.

PREFIX ?= /usr/local
DESTDIR ?=
PACKAGES := bus/shoal_bus services/content/shoal_content services/snapshot/shoal_snapshot \
	services/runtime/shoal_runtime services/network/shoal_network gateway/shoal_gateway cli/shoal_cli
SOURCES := $(shell git ls-files -co --exclude-standard 2>/dev/null -- '*/shoal_*/*' '*pyproject.toml') uv.lock scripts/make-binaries scripts/launcher.in
RUN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help
help: ## Says what the targets do
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12

.PHONY: demo
demo: ## A node, a registry, an image, a container and its events, from nothing and back to nothing (root)
	@scripts/bootstrap demo
	@$(MAKE) --no-print-directory binaries
	@build/env/bin/python3 -I demo/demo.py

.PHONY: test
test: ## Everything that CI runs: lint, then all tests on real NATS, runc and registry (root)
	@scripts/bootstrap test
	@$(MAKE) --no-print-directory lint
	@dir=$$(mktemp -d /var/tmp/shoal-test.XXXXXX); $(RUN)/python -m pytest -q -p no:cacheprovider -n 3 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS) tests --basetemp="$$dir/t"; status=$$?; \
		rm -rf --one-file-system "$$dir"; exit $$status

.PHONY: lint
lint: .venv/.synced ## Format, style, types, who imports whom, generated code
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy $(PACKAGES)
	$(RUN)/lint-imports
	$(RUN)/python gateway/generate.py --check

.PHONY: format
format: .venv/.synced ## Puts the code into its form
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

.PHONY: generate
generate: .venv/.synced ## Generates what is made from something else: protobuf modules
	$(RUN)/python gateway/generate.py

.PHONY: binaries
binaries: bin/shoal ## Launchers in bin/, from a relocatable environment in build/env

bin/shoal: $(SOURCES)
	@scripts/bootstrap binaries
	@scripts/make-binaries

.PHONY: install
install: binaries ## That environment under PREFIX/lib/shoal, the launchers under PREFIX/bin (DESTDIR is honoured)
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/lib"
	rm -rf "$(DESTDIR)$(PREFIX)/lib/shoal"
	cp -a build/env "$(DESTDIR)$(PREFIX)/lib/shoal"
	install -m 755 bin/* "$(DESTDIR)$(PREFIX)/bin/"

.PHONY: bench
bench: .venv/.synced ## The measurements, each in bench/*.py; docs/benchmarks.md says of what (root; BENCH_FLAGS=--quick)
	@scripts/bootstrap bench
	@$(MAKE) --no-print-directory binaries
	@set -e; for script in $(sort $(wildcard bench/*.py)); do echo "== $$script"; $(RUN)/python "$$script" $(BENCH_FLAGS); done

.PHONY: clean
clean: ## Removes what was built
	rm -rf build bin .venv

.venv/.synced: pyproject.toml uv.lock $(wildcard */pyproject.toml services/*/pyproject.toml)
	@scripts/bootstrap binaries
	@scripts/uv sync --quiet --frozen --all-packages
	@touch $@
