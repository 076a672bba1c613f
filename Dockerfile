# The worker, and nothing else: no shell, no package manager, no root.
#
# Both base images are arguments, so that a machine without an image registry can use its own:
# scripts/base-images makes them from Debian's packages.
ARG RUST_IMAGE=docker.io/library/rust:1.95-bookworm
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${RUST_IMAGE} AS build
WORKDIR /src
# The dependencies first: they change less often than the program.
COPY Cargo.toml Cargo.lock ./
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    mkdir -p src/bin tests/it tests/budget tests/chaos benches && \
    for file in src/lib.rs src/main.rs src/bin/creem-simulator.rs tests/it/main.rs tests/budget/main.rs tests/chaos/main.rs benches/throughput.rs benches/replicas.rs; do \
        echo 'fn main() {}' >"$file"; \
    done && \
    cargo build --locked --release --bin checkout-worker
COPY . .
# Newer than the stand-ins above, whatever their times say.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    touch src/lib.rs src/main.rs && \
    cargo build --locked --release --bin checkout-worker && \
    # Names of functions stay, for backtraces; their lines are four fifths of the file.
    mkdir /out && strip --strip-debug -o /out/checkout-worker target/release/checkout-worker

FROM ${RUNTIME_IMAGE}
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="checkout-worker" \
      org.opencontainers.image.description="Turns create-checkout jobs from RabbitMQ into Creem checkout links" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.source="https://github.com/creem-checkout-worker/creem-checkout-worker" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /out/checkout-worker /usr/local/bin/checkout-worker
# A number, so that Kubernetes can see that it is not root.
USER 65532:65532
# Probes come from outside; the log is JSON, as nobody looks on. The stack is for lapin's parser: set
# here, so that the program need not start itself again.
ENV CHECKOUT_WORKER__HTTP__LISTEN=0.0.0.0:9464 \
    RUST_MIN_STACK=67108864
EXPOSE 9464
ENTRYPOINT ["/usr/local/bin/checkout-worker"]
CMD ["run"]
