# Every target says what it does. The heavy Python environment (vLLM for CPU) lives
# outside the tree: env/setup builds it once per lock file; target/venv is the view of
# it that has this tree's kvxfer installed.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.PHONY: help demo test rust kernels standin conformance gpu-check gpu-bundle python examples e2e sim bench bench-gpu fmt clean

# Cut once here, so that a log shows where the minutes went.
say = printf '\n\033[1m[%(%H:%M:%S)T] %s\033[0m\n' -1 "$(1)"
VENV := target/venv/bin
PYTHON_CODE := kvxfer-py examples env kvxfer-cuda/kernels
# Not a path of this machine: env/setup prints where it put the environment.
TOOLS = $$(env/setup)/venv/bin

help: ## this list
	@echo "kvxfer: KV caches from a prefill engine to a decode engine"
	echo
	grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):[^#]*## /\1\t/' | expand -t 12 | sed 's/^/  make /'
	echo
	echo "The environment of the tests and the demo: $${KVXFER_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/kvxfer}, about 7 GB, made by the first target that needs it"

demo: ## prefill and decode in two real vLLM servers with kvxfer between them (PROMPT="..." takes your text, KEEP=1 leaves them up)
	@$(call say,kvxfer demo: the environment and the wheel)
	python=$$(env/install)
	exec "$$python" examples/disaggregated-prefill/demo.py
# As environment variables, so that no shell reads the text.
export PROMPT KEEP
# SECONDS is a variable of bash itself.
export SECONDS_TO_RUN := $(or $(SECONDS),60)

test: rust standin conformance kernels examples python e2e ## everything: Rust, Python, types, and two real engines end to end
	@$(call say,all tests passed)

rust: ## formatting, clippy, Rust tests and doc tests
	@$(call say,rust: formatting)
	cargo fmt --all --check
	$(call say,rust: clippy)
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo clippy --package kvxfer-cuda --all-targets --features faults --locked -- -D warnings
	$(call say,rust: tests; UCX is the wheel's)
	export KVXFER_TEST_UCX=$$(env/ucx)
	if cargo nextest --version >/dev/null 2>&1; then
		cargo nextest run --workspace --features kvxfer-cuda/faults --locked --no-fail-fast
	else
		cargo test --workspace --features kvxfer-cuda/faults --locked --no-fail-fast --lib --bins --tests --examples
	fi
	$(call say,rust: doc tests)
	cargo test --workspace --locked --doc

standin: ## the GPU path on a stand-in for the CUDA driver, planted ordering bugs included (target/reports/standin.json); it proves order, never speed
	@$(call say,standin: building)
	cargo build --workspace --features kvxfer-cuda/faults --locked --bin gpu-check --test cuda --test conformance
	folder=$$(kvxfer-cuda/standin/build)
	$(call say,standin: the tests that need a driver)
	target/debug/gpu-check --standin "$$folder"
	$(call say,standin: gpu-check in small)
	mkdir -p target/standin/rehearsal
	LD_LIBRARY_PATH="$$folder" KVXFER_STANDIN="devices=2;ledger=$$PWD/target/standin/rehearsal" target/debug/gpu-check --rehearse

conformance: ## every transport held to one contract: local, shm, tcp, ucx, and cuda_ipc on the stand-in (target/reports/conformance.json)
	@$(call say,conformance: building)
	cargo build --workspace --features kvxfer-cuda/faults --locked --bin conformance --test conformance
	folder=$$(kvxfer-cuda/standin/build)
	export KVXFER_TEST_UCX=$$(env/ucx)
	$(call say,conformance: each transport)
	target/debug/conformance "$$folder"

gpu-check: ## everything that needs a GPU, on this machine's own: what is proven goes to target/reports/gpu.json and gpu.md, and to docs/; without a GPU it says so (gpu-check ends with 77, which make turns into its own 2)
	@$(call say,gpu-check: building)
	cargo build --release --package kvxfer-benches --locked --bin gpu-check
	$(call say,gpu-check: tests and speeds)
	target/release/gpu-check
	$(call say,gpu-check: the table of what the driver does)
	KVXFER_WRITE=1 cargo test --workspace --features kvxfer-cuda/faults --locked --test cuda -- --exact contract::table::the_table_is_as_committed

gpu-bundle: ## the same for a machine without Rust: copy target/gpu-bundle there and run gpu-check --bundle in it
	@$(call say,gpu-bundle: building)
	mkdir -p target/gpu-bundle
	# The program that measures has no switches for faults in it; the tests have.
	strip='profile.release.strip="symbols"'
	cargo build --release --config "$$strip" --package kvxfer-benches --locked --bin gpu-check
	cp target/release/gpu-check target/gpu-bundle/
	cargo build --release --config "$$strip" --package kvxfer-cuda --features faults --locked --test cuda --test conformance \
		--message-format json-render-diagnostics |
		sed -nE 's/.*"name":"(cuda|conformance)".*"executable":"([^"]+)".*/\1 \2/p' |
		while read -r name file; do cp "$$file" "target/gpu-bundle/$$name"; done
	echo "$$(git rev-parse --short=12 HEAD)$$(test -z "$$(git status --porcelain -uno)" || echo +)" >target/gpu-bundle/COMMIT
	ls -lh target/gpu-bundle

kernels: ## the copy kernel without a GPU: its PTX against its source, no spills, ASAN, planted bugs (target/reports/kernels.json; KVXFER_WRITE=1 writes the PTX)
	@$(call say,kernels: the CUDA compilers)
	compilers=$$(env/cuda)
	$(call say,kernels: compiling and checking)
	"$$compilers/venv/bin/python" -B kvxfer-cuda/kernels/build.py

python: ## the wheel, ruff, mypy, the stubs against the binary, and the Python tests without engines
	@$(call say,python: the environment and the wheel)
	python=$$(env/install --faults)
	$(call say,python: ruff)
	"$(TOOLS)/ruff" format --check $(PYTHON_CODE)
	"$(TOOLS)/ruff" check $(PYTHON_CODE)
	$(call say,python: types)
	"$$python" -m mypy --config-file kvxfer-py/pyproject.toml kvxfer-py/python examples/disaggregated-prefill examples/python kvxfer-py/tests/engines
	"$$python" -m mypy --strict kvxfer-cuda/kernels
	"$$python" -m mypy.stubtest kvxfer._kvxfer
	$(call say,python: tests without engines; KV on a GPU is on the stand-in for its driver)
	config=kvxfer-py/pyproject.toml
	standin=$$(kvxfer-cuda/standin/build)
	LD_LIBRARY_PATH="$$standin$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH}" KVXFER_REQUIRE_CUDA=1 \
		"$$python" -m pytest -c $$config -m "not e2e" -q kvxfer-py/tests
	"$$python" -m pytest -c $$config -q examples/disaggregated-prefill

examples: ## the examples of the README, in Rust and in Python
	@$(call say,examples: Rust)
	cargo run --package kvxfer-examples --example hello --locked
	$(call say,examples: Python)
	python=$$(env/install)
	timeout 60 "$$python" examples/python/hello.py

e2e: ## two real vLLM engines on a real and on a tiny model, faults included
	@$(call say,e2e: the environment and the wheel)
	python=$$(env/install --faults)
	$(call say,e2e: two real engines; their logs are in target/logs)
	"$$python" -m pytest -c kvxfer-py/pyproject.toml kvxfer-py/tests/e2e --durations 15 -v

sim: ## the protocol's state machines in a simulated fleet, with faults, for SECONDS=60; first, each planted bug is to be found (target/reports/sim.json)
	@reports=$$PWD/target/reports
	mkdir -p "$$reports"
	$(call say,sim: planted bugs)
	# In a target directory of its own: the flag would have everything built again here.
	RUSTFLAGS="--cfg kvxfer_planted" KVXFER_SIM_PLANTED=$$reports/sim-planted.json \
		cargo test --package kvxfer-core --test sim --locked --target-dir target/planted -- --exact planted --nocapture
	$(call say,sim: seeds for $${SECONDS_TO_RUN} s)
	KVXFER_SIM_SECONDS=$$SECONDS_TO_RUN KVXFER_SIM_REPORT=$$reports/sim.json KVXFER_SIM_PLANTED=$$reports/sim-planted.json \
		cargo test --package kvxfer-core --test sim --locked -- --exact timed --ignored --nocapture

bench: ## criterion benchmarks and the machine's own copy limit (target/reports/bench.json)
	@$(call say,bench: building)
	cargo bench --package kvxfer-benches --locked --no-run
	log=target/logs/criterion.log
	mkdir -p target/logs
	rm -rf target/criterion
	$(call say,bench: single parts; criterion says more in target/logs/criterion.log)
	cargo bench --package kvxfer-benches --locked --bench micro >"$$log" 2>&1 || { cat "$$log"; exit 1; }
	$(call say,bench: between two processes)
	cargo bench --package kvxfer-benches --locked --bench transfer

bench-gpu: ## criterion benchmarks of copies on a GPU (target/criterion); it says so and ends where there is none
	@$(call say,bench-gpu)
	cargo bench --package kvxfer-benches --locked --bench gpu

fmt: ## format Rust and Python
	@$(call say,fmt)
	cargo fmt --all
	tools=$(TOOLS)
	"$$tools/ruff" format $(PYTHON_CODE)
	"$$tools/ruff" check --fix $(PYTHON_CODE)

clean: ## remove target/ (the environment in the cache stays)
	@$(call say,clean: removing target/)
	rm -rf target
