//! Times, retries and lanes, and what they ask of each other.

use std::time::Duration;

use super::{Problem, Settings};
use crate::job::Lane;
use crate::retry::Backoff;
use crate::worker::{LaneSize, SETTLING};

/// RabbitMQ caps the prefetch of quorum queues here.
pub(super) const MAX_PREFETCH: i64 = 2_000;

/// Longest `retry.longest`; the ledger takes a wait that is much longer for a clock that jumped.
pub(super) const LONGEST_RETRY: Duration = Duration::from_mins(30);

pub(super) fn check_times(settings: &Settings, problems: &mut Vec<Problem>) {
    let timeout = settings.creem.request_timeout.0;
    let shown = humantime::format_duration;
    if !(Duration::from_millis(100)..=Duration::from_mins(2)).contains(&timeout) {
        problems.push(Problem::new(
            format!("`creem.request_timeout` is {}", shown(timeout)),
            "give 100ms to 120s",
        ));
    }
    let grace = settings.shutdown.grace.0;
    let least = timeout + SETTLING;
    if grace < least {
        problems.push(Problem::new(
            format!("`shutdown.grace` is {}, shorter than `creem.request_timeout` ({}) and {} to settle", shown(grace), shown(timeout), shown(SETTLING)),
            format!("give at least {}", shown(least)),
        ));
    }
    let retention = settings.ledger.retention.0;
    let longest = [settings.lanes.interactive, settings.lanes.bulk]
        .map(|lane| lane.max_elapsed.0)
        .into_iter()
        .max()
        .unwrap_or_default();
    let least = longest + Duration::from_hours(24);
    if retention < least {
        problems.push(Problem::new(
            format!(
                "`ledger.retention` is {}, and jobs are tried for up to {}",
                shown(retention),
                shown(longest)
            ),
            format!(
                "give at least {}: a job that outlives its row could get a second link",
                shown(least)
            ),
        ));
    }
}

pub(super) fn check_retry(settings: &Settings, problems: &mut Vec<Problem>) -> Option<Backoff> {
    if !(1..=1000).contains(&settings.retry.max_attempts) {
        problems.push(Problem::new(
            format!("`retry.max_attempts` is {}", settings.retry.max_attempts),
            "give 1 to 1000",
        ));
    }
    let (first, longest) = (settings.retry.first.0, settings.retry.longest.0);
    if longest > LONGEST_RETRY {
        problems.push(Problem::new("`retry.longest` is longer than 30m", "give at most 30m"));
    }
    if first < Duration::from_millis(1) {
        problems.push(Problem::new("`retry.first` is shorter than 1ms", "give at least 1ms"));
        return None;
    }
    match Backoff::try_new(first, longest) {
        Ok(backoff) => Some(backoff),
        Err(why) => {
            problems.push(Problem::new(
                format!("`retry.first` and `retry.longest` do not fit: {why}"),
                "give e.g. 250ms and 60s",
            ));
            None
        }
    }
}

pub(super) fn check_lanes(settings: &Settings, problems: &mut Vec<Problem>) -> Vec<LaneSize> {
    let lanes =
        [(Lane::Interactive, settings.lanes.interactive), (Lane::Bulk, settings.lanes.bulk)];
    let mut sizes = Vec::new();
    for (lane, section) in lanes {
        match u16::try_from(section.concurrency) {
            Ok(concurrency) if (1..=MAX_PREFETCH).contains(&section.concurrency) => sizes.push(LaneSize { lane, concurrency }),
            _ => problems.push(Problem::new(
                format!("`lanes.{lane}.concurrency` is {}", section.concurrency),
                format!("give 1 to {MAX_PREFETCH}, which is the most that a quorum queue lets out unacked"),
            )),
        }
        // AMQP's timestamps are in whole seconds.
        let least = Duration::from_secs(1);
        if let Some(age) = section.max_age.filter(|age| age.0 < least) {
            problems.push(Problem::new(
                format!("`lanes.{lane}.max_age` is {}", humantime::format_duration(age.0)),
                "give 1s or more, or leave it out: every job with a timestamp would expire",
            ));
        }
        if section.max_elapsed.0 < least {
            let elapsed = humantime::format_duration(section.max_elapsed.0);
            problems.push(Problem::new(
                format!("`lanes.{lane}.max_elapsed` is {elapsed}"),
                "give 1s or more: the time a job may be tried",
            ));
        }
    }
    sizes
}
