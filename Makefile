# `make demo` shows it, `make test` proves it. Everything needed is set up by the scripts; what
# they install they say first, and no service of yours is touched.

CARGO ?= cargo

.PHONY: demo test chaos chaos-fleet simulate bench bench-bulk lint clean

demo:
	@scripts/demo

test:
	@scripts/test

# Ten thousand jobs, twenty kills, a broker that is restarted and one that is killed; prints its figures. `make chaos SEED=7`.
SEED ?= 1
chaos:
	@scripts/broker install
	$(CARGO) test --locked --test chaos -- --workers 0 --jobs 10000 --kills 20 --restarts 2 --seed $(SEED)

# Four workers, one PostgreSQL, three brokers: a kill -9 every two seconds, ten freezes beyond the lease, a restart and a
# kill -9 of the database, and the death of the broker that leads. `make chaos-fleet SEED=7`.
chaos-fleet:
	@scripts/broker install
	@scripts/postgres install
	$(CARGO) test --locked --test chaos -- --workers 4 --jobs 20000 --freezes 10 --restarts 3 --seed $(SEED)

# Up to 64 workers under one API budget, in virtual time. `make simulate SEEDS=1000`.
SEEDS ?= 100
simulate:
	$(CARGO) test --locked --test budget -- --seeds $(SEEDS)

bench:
	@scripts/broker install
	@scripts/postgres install
	$(CARGO) bench --locked --bench throughput --bench lanes --bench replicas

# A million rows through `bulk --sandbox`, killed three times. `make bench-bulk ROWS=100000`.
ROWS ?= 1000000
bench-bulk:
	ROWS=$(ROWS) $(CARGO) bench --locked --bench bulk

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items

clean:
	@for broker in target/*broker*; do if [ -d "$$broker" ]; then scripts/broker clean "$$broker"; fi; done
	@for server in target/*postgres*; do if [ -d "$$server" ]; then scripts/postgres clean "$$server"; fi; done
	$(CARGO) clean
