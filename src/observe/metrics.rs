//! Every metric: name, unit, labels, meaning. Labels come from closed sets only; a `request_id`
//! is never one.

use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::job::Lane;

/// Seconds; from a durable write to a campaign's job.
const SECONDS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// Commands in one commit.
const SIZES: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// Installs the recorder of this process.
///
/// # Errors
/// If one is installed already.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets(&SECONDS)?
        .set_buckets_for_metric(
            Matcher::Full("checkout_worker_ledger_batch_size".to_owned()),
            &SIZES,
        )?
        .install_recorder()?;
    describe();
    gauge!("checkout_worker_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    gauge!("checkout_worker_circuit_open").set(0.0);
    Ok(handle)
}

fn describe() {
    describe_counter!(
        "checkout_worker_jobs_total",
        "Deliveries brought to an end, by lane and status"
    );
    describe_histogram!("checkout_worker_job_duration_seconds", "From delivery to ack");
    describe_histogram!(
        "checkout_worker_latency_seconds",
        "From the job's timestamp, which AMQP gives in whole seconds, to its confirmed reply"
    );
    describe_gauge!("checkout_worker_jobs_in_flight", "Deliveries being worked on");
    describe_gauge!("checkout_worker_consuming", "1 while the lane's queue is consumed");
    describe_gauge!("checkout_worker_paused", "1 while intake is paused for the reason");
    describe_counter!(
        "checkout_worker_creem_requests_total",
        "Calls to Creem, by what their answers mean: to create a checkout, and for a link that did not come with it"
    );
    describe_histogram!(
        "checkout_worker_creem_request_duration_seconds",
        "Calls to Creem, whole exchanges: to create a checkout, and for a link that did not come with it"
    );
    describe_counter!("checkout_worker_retries_total", "Tries that are made again, by reason");
    describe_counter!(
        "checkout_worker_ambiguous_attempts_total",
        "Calls, ever, after which a session may exist that nobody was given; starts from the ledger's total"
    );
    describe_gauge!(
        "checkout_worker_orphan_sessions",
        "Sessions known to exist at Creem that nobody was given; starts from the ledger's total"
    );
    describe_counter!(
        "checkout_worker_replies_total",
        "Replies: confirmed, refused by a full queue (tried again), or unroutable (the job is parked)"
    );
    describe_counter!("checkout_worker_parked_total", "Jobs parked, by reason");
    describe_gauge!(
        "checkout_worker_oldest_unsettled_seconds",
        "Age of the oldest delivery that is not brought to its end"
    );
    describe_histogram!("checkout_worker_ledger_commit_seconds", "One durable commit");
    describe_histogram!("checkout_worker_ledger_batch_size", "Commands in one commit");
    describe_histogram!(
        "checkout_worker_rate_limit_wait_seconds",
        "Waiting for rate_limit to let a call through"
    );
    describe_gauge!(
        "checkout_worker_rate_limit_per_second",
        "Most calls to Creem a second, as learned from its 429 and 503 or configured; /status says why"
    );
    describe_gauge!(
        "checkout_worker_lane_paused",
        "1 while an operator has paused the lane (checkout-worker pause)"
    );
    describe_gauge!(
        "checkout_worker_clock_skew_seconds",
        "How far in the future a job of the last ten seconds was published: a producer's clock is ahead of the ledger's, or 0"
    );
    describe_gauge!(
        "checkout_worker_circuit_open",
        "1 while the circuit breaker is open: at least half of the last calls to Creem failed, and none is made but one now and then"
    );
    describe_gauge!(
        "checkout_worker_broker_connected",
        "1 while there is a session with the broker"
    );
    describe_gauge!("checkout_worker_build_info", "1, with the version");
}

/// A delivery was brought to an end.
pub fn job(lane: Lane, verdict: &'static str, took: Duration) {
    counter!("checkout_worker_jobs_total", "lane" => lane.as_str(), "status" => verdict)
        .increment(1);
    histogram!("checkout_worker_job_duration_seconds", "lane" => lane.as_str()).record(took);
}

/// A reply was confirmed this long after the job's timestamp.
pub fn latency(lane: Lane, age: Duration) {
    histogram!("checkout_worker_latency_seconds", "lane" => lane.as_str()).record(age);
}

/// Deliveries being worked on.
pub fn jobs_in_flight(lane: Lane, count: usize) {
    gauge!("checkout_worker_jobs_in_flight", "lane" => lane.as_str()).set(as_float(count));
}

/// Whether a lane is consumed.
pub fn consuming(lane: Lane, yes: bool) {
    gauge!("checkout_worker_consuming", "lane" => lane.as_str()).set(f64::from(u8::from(yes)));
}

/// Whether intake is paused for a reason.
pub fn paused(reason: &'static str, yes: bool) {
    gauge!("checkout_worker_paused", "reason" => reason).set(f64::from(u8::from(yes)));
}

/// Creem answered, or did not.
pub fn creem_request(result: &'static str, took: Duration) {
    counter!("checkout_worker_creem_requests_total", "result" => result).increment(1);
    histogram!("checkout_worker_creem_request_duration_seconds").record(took);
}

/// A try will be made again.
pub fn retry(reason: &'static str) {
    counter!("checkout_worker_retries_total", "reason" => reason).increment(1);
}

/// What the ledger has recorded so far.
pub fn ledger_totals(ambiguous_attempts: u64, orphan_sessions: u64) {
    counter!("checkout_worker_ambiguous_attempts_total").absolute(ambiguous_attempts);
    gauge!("checkout_worker_orphan_sessions")
        .set(u32::try_from(orphan_sessions).map_or(f64::MAX, f64::from));
}

/// Most calls a second, as learned or configured.
pub fn rate_limit(per_second: f64) {
    gauge!("checkout_worker_rate_limit_per_second").set(per_second);
}

/// Whether an operator has paused a lane.
pub fn lane_paused(lane: Lane, paused: bool) {
    gauge!("checkout_worker_lane_paused", "lane" => lane.as_str()).set(f64::from(u8::from(paused)));
}

/// How far in the future a job was published.
pub fn clock_skew(ahead: Duration) {
    gauge!("checkout_worker_clock_skew_seconds").set(ahead.as_secs_f64());
}

/// Whether calls to Creem are held back because most failed.
pub fn circuit_open(open: bool) {
    gauge!("checkout_worker_circuit_open").set(f64::from(u8::from(open)));
}

/// What became of a reply.
pub fn reply(result: &'static str) {
    counter!("checkout_worker_replies_total", "result" => result).increment(1);
}

/// A job was parked. Whatever Creem said has one code, so the label is of a closed set.
pub fn parked(code: &str) {
    counter!("checkout_worker_parked_total", "reason" => code.to_owned()).increment(1);
}

/// Age of the oldest delivery in the works.
pub fn oldest_unsettled(age: Duration) {
    gauge!("checkout_worker_oldest_unsettled_seconds").set(age.as_secs_f64());
}

/// A commit of the ledger, and what it added to the ledger's totals.
pub fn ledger_commit(size: usize, took: Duration, ambiguous: u64, orphans: u64) {
    histogram!("checkout_worker_ledger_commit_seconds").record(took);
    histogram!("checkout_worker_ledger_batch_size").record(as_float(size));
    if ambiguous > 0 {
        counter!("checkout_worker_ambiguous_attempts_total").increment(ambiguous);
    }
    if orphans > 0 {
        gauge!("checkout_worker_orphan_sessions")
            .increment(u32::try_from(orphans).map_or(f64::MAX, f64::from));
    }
}

/// Waiting for the right to call.
pub fn rate_limit_wait(lane: Lane, waited: Duration) {
    histogram!("checkout_worker_rate_limit_wait_seconds", "lane" => lane.as_str()).record(waited);
}

/// Whether there is a session with the broker.
pub fn broker_connected(yes: bool) {
    gauge!("checkout_worker_broker_connected").set(f64::from(u8::from(yes)));
}

fn as_float(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::MAX, f64::from)
}
