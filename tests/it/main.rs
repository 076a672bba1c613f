//! The integration tests, in one binary so that it links once.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "tests say what went wrong by panicking, and helpers of tests are not tests to clippy"
)]

mod architecture;
mod bulk;
mod campaigns;
mod cli;
mod creem;
mod deploy;
mod faults;
mod journey;
mod lanes;
mod ledger;
mod outage;
mod publisher;
mod replicas;
mod replies;
mod support;
mod tls;
mod worker;
