# The worker, and nothing else: no shell, no package manager, no root.
#
#   docker build -t checkout-worker .                              the worker
#   docker build --target simulator -t creem-simulator .           a local Creem, for trials
#   docker build --target sbom --output DIR .                      DIR/checkout-worker.cdx.json
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
    # A stand-in for each file that the manifest names.
    awk -F '"' '/^path = / { print $2 }' Cargo.toml >stand-ins && \
    while read -r file; do \
        mkdir -p "${file%/*}" && echo 'fn main() {}' >"$file" || exit 1; \
    done <stand-ins && \
    cargo build --locked --release --bin checkout-worker
# No tests and no benches: their stand-ins are enough, and a change of theirs is no reason to build anew.
COPY config config
COPY src src
# Newer than the stand-ins above, whatever their times say.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    touch src/lib.rs src/main.rs && \
    cargo build --locked --release --bin checkout-worker && \
    # Names of functions stay, for backtraces; their lines are four fifths of the file.
    mkdir /out && strip --strip-debug -o /out/checkout-worker target/release/checkout-worker

# From here on only what is asked for is built: the worker's image waits for none of it.

# The second program, on top of the same library.
FROM build AS build-simulator
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    touch src/bin/creem-simulator.rs && \
    cargo build --locked --release --bin creem-simulator && \
    strip --strip-debug -o /out/creem-simulator target/release/creem-simulator

# Not optimised: it runs for a second, and optimising it would take two minutes more.
FROM ${RUST_IMAGE} AS sbom-tool
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/tool-target,sharing=locked \
    CARGO_TARGET_DIR=/tool-target CARGO_PROFILE_DEV_DEBUG=false \
    cargo install --locked --debug --version 0.5.9 --root /tool cargo-cyclonedx

FROM ${RUNTIME_IMAGE} AS runtime

# cargo-cyclonedx knows each crate's licence and checksum, but only the build knows which crates were
# compiled: cargo's metadata, which it goes by, names dozens that no feature asked for.
FROM build AS build-sbom
ARG REVISION=unknown
COPY --from=sbom-tool /tool/bin/cargo-cyclonedx /usr/local/bin/
COPY scripts/sbom-narrow scripts/
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=bind,from=runtime,target=/runtime \
    cargo cyclonedx --quiet --format json --spec-version 1.5 --describe binaries --no-build-deps && \
    scripts/sbom-narrow checkout-worker_bin.cdx.json target/release/deps /out/checkout-worker \
        "${REVISION}" /runtime/var/lib/dpkg/status.d >/out/checkout-worker.cdx.json

FROM scratch AS sbom
COPY --from=build-sbom /out/checkout-worker.cdx.json /

FROM runtime AS simulator
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="creem-simulator" \
      org.opencontainers.image.description="A local Creem with scripted faults; never for production" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.source="https://github.com/creem-checkout-worker/creem-checkout-worker" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build-simulator /out/creem-simulator /usr/local/bin/creem-simulator
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["/usr/local/bin/creem-simulator"]
CMD ["--listen", "0.0.0.0:8080"]

# The last one is what a plain `docker build` makes.
FROM runtime AS worker
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
