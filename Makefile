# make demo    compare a data job and a hostile job as process, container and virtual machine
# make test    every check and every test; make test-long those that take long besides
# Both set up all that they need first. See `make help`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:
.NOTPARALLEL:
, := ,
.PHONY: help setup system venv test-tools foreign-tools core demo docs report test test-long lint fuzz clean

# The system's own Python where there is one: a sandbox with image="host" shows it too.
PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
VENV := .venv
BIN := $(VENV)/bin
CORE := src/ringfence/_core/ringfence-core
CORE_SOURCES := $(wildcard core/*.c core/*.h) core/build.py src/ringfence/__init__.py
# How long each fuzz harness runs, seconds.
FUZZ_SECONDS ?= 5
PYTEST_ARGS ?=
REPORT_ARGS ?=
# What no other work on this machine disturbs, nor is disturbed by it.
IN_A_GUEST := tests/levels/test_inside_a_vm.py
BESIDE := $(patsubst %,tests/unit/test_%.py,choice compare_isolation comparison_changes comparison_document comparison_html \
    docs erofs errors hostile_channel initramfs kernel network_dns network_flows network_packets network_policy \
    network_resolver observe own_kernel parse probes qmp report result seccomp seccomp_profile site spec value)
PYTEST = $(BIN)/python -m pytest $(PYTEST_ARGS)

export PIP_DISABLE_PIP_VERSION_CHECK = 1

say = @printf '\033[1m== %s\033[0m\n' "$(1)"

# Shell functions: `need PACKAGE COMMAND…` notes a package whose trial COMMAND fails, `install` gets what was noted.
define APT
missing=()
need() { local package=$$1; shift; "$$@" >/dev/null 2>&1 || missing+=("$$package"); }
install() {
    [ $${#missing[@]} -gt 0 ] || return 0
    local command=(apt-get install -y --no-install-recommends "$${missing[@]}")
    if ! command -v apt-get >/dev/null; then
        echo "This machine has no apt-get. Please install what Debian calls: $${missing[*]}" >&2; return 1
    fi
    if [ "$$(id -u)" != 0 ]; then
        echo "Installing packages needs root. Please run:  sudo $${command[*]}" >&2; return 1
    fi
    echo "installing $${missing[*]}"
    local log; log=$$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    # Package lists may be missing or stale: fetch them when the first try fails.
    if "$${command[@]}" >"$$log" 2>&1 || { apt-get update && "$${command[@]}"; } >"$$log" 2>&1; then rm "$$log"; return 0; fi
    tail -n 20 "$$log" >&2; rm "$$log"; return 1
}
endef
export APT

help:
	@echo 'make setup   get compiler, Python environment, QEMU and the guest kernel; quick when all is there'
	@echo 'make demo    setup, then compare a data job and a hostile job at every level'
	@echo 'make test    setup, then lint, fuzz and the whole test suite'
	@echo 'make test-long  setup, then what takes longer: 1,000 kills, 10,000 starts, more of the suite in a guest, real other tools'
	@echo 'make docs    the site of docs/, into build/site'
	@echo 'make report  setup, then measure, and put the tables and plots into README, SPECIFICATION and docs/measurements'
	@echo 'make lint    ruff, mypy --strict, import-linter, C warnings of gcc and clang'
	@echo 'make fuzz    each parser of the C core under ASan and UBSan (FUZZ_SECONDS=5 each)'
	@echo 'make clean   remove what was built, and the Python environment'

# ---- setting up ----

setup: system venv core
	$(call say,QEMU$(,) guest kernel$(,) filters: ringfence setup)
	@$(BIN)/ringfence setup

system:
	$(call say,system packages)
	@eval "$$APT"
	need python3 test -x "$$(command -v $(PYTHON))"
	need python3-venv $(PYTHON) -c 'import ensurepip, venv'
	need libseccomp2 $(PYTHON) -c 'import ctypes; ctypes.CDLL("libseccomp.so.2")'
	# With a compiler that serves, of whatever kind, nothing is installed.
	if ! $(PYTHON) core/build.py --check >/dev/null 2>&1; then missing+=(gcc libc6-dev); fi
	install
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"ringfence needs Python 3.11, {sys.executable} is {sys.version.split()[0]}; name another one by PYTHON=")'

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py | system
	$(call say,Python environment in $(VENV))
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

core: $(CORE)

$(CORE): $(CORE_SOURCES) | $(VENV)/.installed
	$(call say,C core)
	@$(BIN)/python core/build.py
	touch $(CORE)

# What only the tests need: a second compiler with the runtime of its fuzzer, and ip for networks between namespaces.
test-tools: system
	$(call say,packages for the tests)
	@eval "$$APT"
	need gcc gcc --version
	need libc6-dev test -e /usr/include/stdio.h
	need clang clang --version
	need e2fsprogs mkfs.ext4 -V
	need iproute2 ip -V
	# A browser without a window, for the page of `compare --html`: 96 MB to fetch, a third of chromium.
	need chromium-headless-shell bash -c 'command -v chromium-headless-shell || command -v chromium || command -v google-chrome'
	need procps pgrep -V
	need uidmap test -x /usr/bin/newuidmap
	need systemd test -x /lib/systemd/systemd # not run here: in a guest, for a user's scopes
	install
	missing=()
	need "libclang-rt-$$(clang -dumpversion | cut -d. -f1)-dev" bash -c 'cd "$$(mktemp -d)" && echo "int LLVMFuzzerTestOneInput(void) { return 0; }" > t.c && clang -fsanitize=fuzzer,address,undefined t.c'
	install

# What only `make test-long` looks at: other tools that confine processes. Some 80 MB to fetch. No service of theirs is
# started: the tests run them, in namespaces.
foreign-tools: system
	$(call say,packages of other tools)
	@eval "$$APT"
	policy=/usr/sbin/policy-rc.d
	if [ "$$(id -u)" = 0 ] && ! [ -e "$$policy" ]; then
	    trap 'rm -f "$$policy"' EXIT
	    printf '#!/bin/sh\nexit 101\n' >"$$policy"; chmod 755 "$$policy"
	fi
	need bubblewrap bwrap --version
	need crun crun --version
	need runc runc --version
	need podman podman --version
	need docker.io test -x /usr/sbin/dockerd
	need lxc lxc-start --version
	need systemd-container systemd-nspawn --version
	install

# ---- the two commands ----

demo: setup
	$(call say,a data job: the same bytes at every level$(,) what was isolated$(,) what it cost)
	@$(BIN)/ringfence compare --input examples/data/jargon.txt --file job.py=examples/data/job.py --collect words.csv -- python3 job.py
	$(call say,a hostile job: which attempt worked where)
	@$(BIN)/python examples/hostile/demo.py

# On a quiet machine, some minutes; REPORT_ARGS=--measures takes the whole cost suite too, --render measures nothing.
report: setup
	$(call say,measuring$(,) for the documents)
	@$(BIN)/python tools/report.py $(REPORT_ARGS)

docs: $(VENV)/.installed
	$(call say,the site)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	echo 'open build/site/index.html'

# The suite in a guest keeps one CPU busy for minutes: the checks run beside it, and some tests. Much in the others is
# a race on purpose, or measures time on a machine that others use too: what fails is tried once more, by itself. Both are
# told.
test: setup test-tools
	@log=$$(mktemp); trap 'rm -f "$$log"' EXIT
	$(PYTEST) $(IN_A_GUEST) >"$$log" 2>&1 & guest=$$!
	failed=0 again=0
	$(MAKE) lint fuzz || failed=1
	$(call say,tests)
	$(PYTEST) -q $(BESIDE) || [ $$? = 5 ] || again=1 # 5: PYTEST_ARGS left none
	wait $$guest || [ $$? = 5 ] || again=1
	cat "$$log"
	# The tests of style/test_tools.py are what lint did.
	$(PYTEST) --durations=25 --durations-min=5 $(addprefix --ignore=,$(IN_A_GUEST) $(BESIDE) tests/style/test_tools.py) tests || again=$$?
	if [ $$again = 1 ]; then
	    printf '\033[1m== once more, what failed\033[0m\n'
	    again=0; $(PYTEST) --last-failed --last-failed-no-failures none tests || again=$$?
	fi
	[ $$failed = 0 ] && [ $$again = 0 ]

# Some ten minutes on two idle CPUs.
test-long: setup test-tools foreign-tools
	$(call say,tests that take long)
	@RINGFENCE_CI_PROMISES=$${RINGFENCE_CI_PROMISES:+$$RINGFENCE_CI_PROMISES,}foreign $(PYTEST) -m long tests

lint:
	$(call say,ruff)
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ." >&2; exit 1; }
	$(call say,mypy --strict$(,) import-linter$(,) C warnings of gcc and clang)
	@directory=$$(mktemp -d); trap 'rm -r "$$directory"' EXIT
	# mypy takes as long as all the others.
	$(BIN)/mypy >"$$directory/mypy" 2>&1 & types=$$!
	$(BIN)/lint-imports
	for compiler in gcc clang; do CC=$$compiler $(BIN)/python core/build.py --strict "$$directory" >/dev/null; done
	wait $$types || { cat "$$directory/mypy"; exit 1; }
	cat "$$directory/mypy"

fuzz:
	$(call say,fuzzing each parser for $(FUZZ_SECONDS) s)
	@core/fuzz/run $(FUZZ_SECONDS)

clean:
	rm -rf build dist src/*.egg-info $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f src/ringfence/_core/ringfence-core src/ringfence/_core/ringfence-probe
	find src tests core examples -name __pycache__ -type d -prune -exec rm -r {} +
