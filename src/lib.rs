//! Turns create-checkout jobs from RabbitMQ into Creem checkout links.
//!
//! No job is lost, and no `request_id` is ever given two links, whatever crashes. Creem does not
//! deduplicate and cannot be asked afterwards, so both promises rest on the [`ledger`]: an intent
//! is durable before a call, the outcome with the bytes of its reply before the reply, and a
//! message is acked only after what replaces it is confirmed *and* known to be in a queue (but for
//! direct reply-to, where the broker's answer says nothing).
//!
//! # The house
//!
//! Layers, lowest first; each knows only those above it in this list, but for [`cli`], whose sandbox is the
//! double. `tests/it/architecture.rs` holds who may import whom, and which crate may be named where.
//!
//! | layer | modules |
//! |---|---|
//! | words: no I/O | [`job`], [`clock`] |
//! | rules: no I/O; only [`retry::backoff::chance`] draws, only [`pace`] waits | [`retry`], [`pace`] |
//! | outsiders: siblings that never meet | [`ledger`], [`creem`], [`rabbit`], [`observe`] |
//! | the work | [`worker`]: `intake` reads, `journey` decides, `settle` acts |
//! | files in the place of queues | [`bulk`] |
//! | the frame | [`config`], [`lifecycle`], [`cli`] |
//! | a double of Creem, which knows nothing of all this | [`simulator`] |
//!
//! One job is one pipe: [`worker::journey`] takes it from its turn to a verdict and never touches
//! the broker; [`worker::settle`] carries the verdict out and never asks Creem.
//!
//! # Why it is built this way
//!
//! * The ledger's state machine is one pure function, [`ledger::transition`], for every back-end.
//!   A back-end loads rows, applies commands in order and makes the result durable; it has no
//!   opinion of its own on what a claim means. That leaves one place to read, to model and to
//!   break on purpose.
//! * The embedded ledger has one writer; the shared one has no locks: each write compares the version
//!   of the row that was read, and whoever loses reads again. Both give the machine a row and a clock.
//! * A claim and its intent are one durable write: the permit to call is taken first, so a lease
//!   waits for its call for a few seconds at most, which it has to spare. A job costs two commits,
//!   shared with whatever is ready.
//! * The reply's bytes are made inside the transition that ends the job, so "the reply says what
//!   the ledger says" is not something two places have to agree on.
//! * There are four domain traits. [`ledger::Ledger`] and, for what only a shared one has,
//!   [`ledger::Budget`], because there are two back-ends; [`ledger::group::Store`], what an embedded one has to do
//!   for a group of commands; and [`clock::Clock`]. Creem and RabbitMQ have none: their doubles in tests are a real
//!   server and a real broker.

// Words.
pub mod clock;
pub mod job;
// Rules.
pub mod pace;
pub mod retry;
// Outsiders.
pub mod creem;
pub mod ledger;
pub mod observe;
pub mod rabbit;
// The work.
pub mod bulk;
pub mod worker;
// The frame.
pub mod cli;
pub mod config;
pub mod lifecycle;
// The double.
pub mod simulator;
