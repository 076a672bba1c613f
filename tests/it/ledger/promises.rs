//! The suite: what every ledger promises.

use std::time::Duration;

use creem_checkout_worker::clock::Clock as _;
use creem_checkout_worker::job::{Ending, Key, Lane, Mode, Problem, Status};
use creem_checkout_worker::ledger::*;

use super::bench::{Backend, Bench, START};
use super::key;

pub(super) fn link(id: &str) -> Ending {
    Ending::Succeeded { checkout_id: id.into(), checkout_url: format!("https://creem.io/{id}") }
}

pub(super) fn rejected() -> Ending {
    Ending::Rejected(Problem::new("creem_rejected", "no"))
}

fn failed() -> Ending {
    Ending::Failed(Problem::new("attempts_exhausted", "no"))
}

fn expired() -> Ending {
    Ending::Expired(Problem::new("deadline_passed", "no"))
}

fn cancelled() -> Ending {
    Ending::Cancelled(Problem::new("campaign_cancelled", "no"))
}

/// Each ending that says that no session exists.
fn without_a_session() -> [Ending; 4] {
    [rejected(), failed(), expired(), cancelled()]
}

fn unknown() -> Attempt {
    Attempt::Ambiguous { checkout_id: None, reason: "no answer".into() }
}

pub(super) fn wait(until: i64) -> Next {
    Next::Wait { until, uncounted: 0 }
}

pub(super) async fn a_link_is_stored_once_and_repeated_byte_for_byte_for_ever(backend: &Backend) {
    let mut bench = Bench::new(backend, OnUnknown::Retry).await;
    let stored = bench.end("a", link("ch_1")).await;
    assert_eq!(stored.status, Status::Succeeded);
    bench.later();
    assert_eq!(bench.claim("a").await, Claim::Settled(stored.clone()));
    bench.reopen().await;
    assert_eq!(bench.claim("a").await, Claim::Settled(stored.clone()));
    assert_eq!(bench.close("a", expired()).await, Claim::Settled(stored));
}

pub(super) async fn another_body_is_a_conflict_that_names_the_fields_and_touches_nothing(
    backend: &Backend,
) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    let stored = bench.end("a", link("ch_1")).await;
    bench.later();
    let conflict = bench.claim_as(bench.claimant("a", 2)).await;
    assert_eq!(conflict, Claim::Conflict(vec!["units".into()]));
    assert_eq!(bench.claim("a").await, Claim::Settled(stored));
    // In flight and waiting, the id may yet have a link: also a conflict.
    let lease = bench.lease("b").await;
    assert!(matches!(bench.claim_as(bench.claimant("b", 2)).await, Claim::Conflict(_)));
    bench.settle("b", lease, Attempt::Counted, wait(START)).await;
    assert!(matches!(bench.claim_as(bench.claimant("b", 2)).await, Claim::Conflict(_)));
}

pub(super) async fn a_live_claim_keeps_others_out_and_a_dead_one_counts_as_ambiguous(
    backend: &Backend,
) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    let first = bench.lease("a").await;
    assert_eq!(bench.claim("a").await, Claim::Busy { until: START + 25_000 });
    bench.clock.advance(Duration::from_secs(26));
    let second = bench.lease("a").await;
    assert_eq!((second.fence, second.attempt, second.ambiguous), (first.fence + 1, 2, 1));

    // The zombie comes back with a link: no row is touched, the session is an orphan.
    let late = bench.settle("a", first, Attempt::Counted, Next::End(link("ch_late"))).await;
    assert_eq!(late, Settle::Zombie);
    let ended = bench.settle("a", second, Attempt::Counted, Next::End(link("ch_good"))).await;
    assert!(matches!(ended, Settle::Ended(_)));
    assert_eq!(bench.orphans("a").await[0].checkout_id, "ch_late");
    assert_eq!(bench.row("a").await.checkout_id.as_deref(), Some("ch_good"));
}

pub(super) async fn a_zombie_may_neither_end_nor_delay_a_job_that_is_settled(backend: &Backend) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    let first = bench.lease("a").await;
    bench.clock.advance(Duration::from_secs(26));
    let second = bench.lease("a").await;
    bench.settle("a", second, Attempt::Counted, Next::End(rejected())).await;
    let before = bench.row("a").await;
    for next in [wait(START), Next::End(link("ch_x")), Next::End(failed())] {
        assert_eq!(bench.settle("a", first, unknown(), next).await, Settle::Zombie);
    }
    assert_eq!(bench.row("a").await, before);
}

pub(super) async fn a_claim_or_settle_asked_twice_counts_once(backend: &Backend) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    let request = Bench::request(bench.claimant("a", 1));
    let first = bench.ledger().claim(request.clone()).await.unwrap();
    bench.later();
    assert_eq!(bench.ledger().claim(request).await.unwrap(), first);
    // What was asked again is written again: that commit waits for a standby, as the lost one did.
    assert_eq!(bench.row("a").await.updated_at, bench.clock.now());
    let Claim::Granted(lease) = first else { panic!("{first:?}") };
    let once = bench.settle("a", lease, Attempt::Counted, Next::End(link("ch_1"))).await;
    bench.later();
    assert_eq!(bench.settle("a", lease, Attempt::Counted, Next::End(link("ch_1"))).await, once);
    let row = bench.row("a").await;
    assert_eq!((row.attempts, row.updated_at), (1, bench.clock.now()));
}

pub(super) async fn a_process_that_died_loses_its_leases(backend: &Backend) {
    let mut bench = Bench::new(backend, OnUnknown::Retry).await;
    bench.lease("a").await;
    bench.die().await;
    let lease = bench.lease("a").await;
    assert_eq!((lease.attempt, lease.ambiguous), (2, 1));
}

pub(super) async fn a_job_that_ends_the_process_again_and_again_is_given_up(backend: &Backend) {
    let mut bench = Bench::new(backend, OnUnknown::Retry).await;
    for _ in 0..transition::MOST_CRASHES {
        bench.lease("a").await;
        bench.die().await;
    }
    let Claim::Settled(stored) = bench.claim("a").await else { panic!("it is given up") };
    assert_eq!(
        (stored.status, stored.code.as_deref()),
        (Status::Unresolved, Some("crashes_worker"))
    );
}

pub(super) async fn no_session_exists_is_never_said_after_an_ambiguous_attempt(backend: &Backend) {
    for ending in without_a_session() {
        let bench = Bench::new(backend, OnUnknown::Retry).await;
        let lease = bench.lease("a").await;
        bench.settle("a", lease, unknown(), wait(START)).await;
        assert_eq!(bench.end("a", ending.clone()).await.status, Status::Unresolved);
        let lease = bench.lease("b").await;
        let ended = bench.settle("b", lease, unknown(), Next::End(ending)).await;
        assert!(matches!(ended, Settle::Ended(stored) if stored.status == Status::Unresolved));
        // Nor by closing a job whose call was cut off.
        bench.lease("c").await;
        bench.clock.advance(Duration::from_secs(26));
        assert!(
            matches!(bench.close("c", expired()).await, Claim::Settled(stored) if stored.status == Status::Unresolved)
        );
    }
}

pub(super) async fn what_ended_without_a_session_is_tried_afresh_when_sent_again_with_any_body(
    backend: &Backend,
) {
    for ending in without_a_session() {
        let bench = Bench::new(backend, OnUnknown::Retry).await;
        let stored = bench.end("a", ending.clone()).await;
        bench.later();
        let again = bench.claimant("a", 1);
        // A redelivery was not sent again, nor was a copy picked up before the outcome.
        let redelivered = Claimant { redelivered: true, ..again.clone() };
        assert_eq!(bench.claim_as(redelivered).await, Claim::Settled(stored.clone()));
        let earlier = Claimant { picked_up_at: stored.ended_at, ..again.clone() };
        assert_eq!(bench.claim_as(earlier).await, Claim::Settled(stored.clone()));
        let other = Claimant { redelivered: true, ..bench.claimant("a", 7) };
        let taken = bench.claim_as(other).await;
        assert!(
            matches!(taken, Claim::Conflict(_)),
            "a redelivery does not free the id: {taken:?}"
        );
        let Claim::Granted(lease) = bench.claim_as(bench.claimant("a", 7)).await else {
            panic!("{ending:?} is tried afresh with another body")
        };
        assert_eq!((lease.attempt, lease.ambiguous), (1, 0));
        let ended = bench.settle("a", lease, Attempt::Counted, Next::End(link("ch_2"))).await;
        assert!(matches!(ended, Settle::Ended(new) if new.message_id != stored.message_id));
    }
}

pub(super) async fn a_lease_written_under_a_clock_that_ran_ahead_is_over(backend: &Backend) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    bench.lease("a").await;
    bench.clock.advance(Duration::from_secs(20));
    assert!(matches!(bench.claim("a").await, Claim::Busy { .. }), "within its time it is alive");
    bench.clock.set(START - 24 * 3_600_000);
    assert_eq!(bench.lease("a").await.ambiguous, 1);
}

pub(super) async fn unresolved_is_tried_afresh_with_the_same_body_only_and_with_park_not_at_all(
    backend: &Backend,
) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    let lease = bench.lease("a").await;
    bench.settle("a", lease, unknown(), Next::End(failed())).await;
    bench.later();
    assert!(matches!(bench.claim_as(bench.claimant("a", 2)).await, Claim::Conflict(_)));
    let lease = bench.lease("a").await;
    assert_eq!((lease.attempt, lease.ambiguous), (1, 1), "what is known of sessions stays");

    let bench = Bench::new(backend, OnUnknown::Park).await;
    let lease = bench.lease("a").await;
    let Settle::Ended(stored) = bench.settle("a", lease, unknown(), wait(START)).await else {
        panic!("park never asks twice")
    };
    assert_eq!(stored.status, Status::Unresolved);
    bench.later();
    assert_eq!(bench.claim("a").await, Claim::Settled(stored));
}

pub(super) async fn with_park_a_call_that_was_cut_off_is_not_repeated(backend: &Backend) {
    let mut bench = Bench::new(backend, OnUnknown::Park).await;
    let lease = bench.lease("a").await;
    bench.die().await;
    assert!(
        matches!(bench.claim("a").await, Claim::Settled(stored) if stored.status == Status::Unresolved)
    );
    // What it brought back after all is known by its id, and given to nobody.
    let late = bench.settle("a", lease, Attempt::Counted, Next::End(link("ch_late"))).await;
    assert_eq!(late, Settle::Zombie);
    assert_eq!(bench.orphans("a").await[0].checkout_id, "ch_late");
    assert_eq!(bench.row("a").await.checkout_id, None);
}

pub(super) async fn with_park_chosen_since_a_job_whose_call_may_have_made_a_session_is_not_tried_again(
    backend: &Backend,
) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    let lease = bench.lease("a").await;
    let settled = bench.settle("a", lease, unknown(), wait(START)).await;
    assert!(matches!(settled, Settle::Waiting { .. }), "{settled:?}");
    let now = Claimant { on_unknown: OnUnknown::Park, ..bench.claimant("a", 1) };
    let Claim::Settled(stored) = bench.claim_as(now).await else { panic!("it is asked again") };
    assert_eq!(
        (stored.status, stored.code.as_deref(), stored.attempts),
        (Status::Unresolved, Some("outcome_unknown"), 1)
    );
}

pub(super) async fn a_retry_waits_for_its_time_and_gives_its_lease_back_at_once(backend: &Backend) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    let lease = bench.lease("a").await;
    bench.settle("a", lease, unknown(), wait(START + 5_000)).await;
    assert_eq!(bench.claim("a").await, Claim::Waiting { until: START + 5_000 });
    bench.clock.advance(Duration::from_secs(5));
    assert_eq!(bench.lease("a").await.attempt, 2);
}

pub(super) async fn an_attempt_that_was_not_sent_is_given_back_and_a_free_one_is_counted_apart(
    backend: &Backend,
) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    let lease = bench.lease("a").await;
    bench.settle("a", lease, Attempt::GivenBack, wait(START)).await;
    let lease = bench.lease("a").await;
    assert_eq!(lease.attempt, 1);
    bench.settle("a", lease, Attempt::Free, wait(START)).await;
    let lease = bench.lease("a").await;
    assert_eq!((lease.attempt, lease.free), (2, 1));
}

pub(super) async fn test_and_live_are_different_jobs(backend: &Backend) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    bench.end("a", link("ch_1")).await;
    let live = Claimant { key: Key { mode: Mode::Live, ..key("a") }, ..bench.claimant("a", 1) };
    assert!(matches!(bench.claim_as(live).await, Claim::Granted(_)));
}

pub(super) async fn many_racing_claims_of_one_job_grant_one(backend: &Backend) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    let claims = (0..500).map(|_| bench.claim("a"));
    let granted = futures::future::join_all(claims)
        .await
        .into_iter()
        .filter(|claim| matches!(claim, Claim::Granted(_)))
        .count();
    assert_eq!(granted, 1);
}

pub(super) async fn totals_and_pauses_survive_the_process(backend: &Backend) {
    let mut bench = Bench::new(backend, OnUnknown::Retry).await;
    let lease = bench.lease("a").await;
    let orphan = Attempt::Ambiguous { checkout_id: Some("ch_9".into()), reason: "mismatch".into() };
    bench.settle("a", lease, orphan, Next::End(failed())).await;
    bench.ledger().tell(OwnCommand::Pause { from: START - 50, to: START }).await.unwrap();
    bench.clock.advance(Duration::from_secs(60));
    bench.reopen().await;
    let identity = bench.ledger().identity().clone();
    assert_eq!((identity.ambiguous_attempts, identity.orphan_sessions), (1, 1));
    assert!(identity.pauses.contains(&(START - 50, START)));
    // The minute in which no process ran does not count against any job either.
    assert!(
        identity.pauses.iter().any(|(from, to)| *to == START + 60_000 && *from >= START - 1_000)
    );
}

pub(super) async fn retention_removes_old_outcomes_but_nothing_that_may_hide_a_session(
    backend: &Backend,
) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    bench.end("old", link("ch_1")).await;
    let lease = bench.lease("hidden").await;
    bench.settle("hidden", lease, unknown(), Next::End(failed())).await;
    bench.lease("sending").await;
    bench.clock.advance(Duration::from_secs(3600));
    bench.end("new", link("ch_2")).await;
    assert_eq!(bench.sweep(START + 1_000).await, 1);
    for (id, there) in [("old", false), ("hidden", true), ("sending", true), ("new", true)] {
        assert_eq!(bench.look(id).await.is_some(), there, "{id}");
    }
}

pub(super) async fn what_is_as_old_as_swept_outcomes_gets_no_link_whatever_retention_is_now(
    backend: &Backend,
) {
    let mut bench = Bench::new(backend, OnUnknown::Retry).await;
    bench.end("old", link("ch_1")).await;
    bench.clock.advance(Duration::from_secs(86_400));
    assert_eq!(bench.sweep(START + 3_600_000).await, 1);
    // Neither an earlier sweep nor one without a find takes it back.
    assert_eq!(bench.sweep(START).await, 0);
    bench.reopen().await;
    let copy = Claimant { published_at: Some(START), ..bench.claimant("old", 1) };
    let late = CloseRequest { claimant: copy.clone(), ending: expired() };
    for claimed in [bench.claim_as(copy).await, bench.ledger().close(late).await.unwrap()] {
        let Claim::Settled(stored) = claimed else { panic!("it may have a link: {claimed:?}") };
        let told = (stored.status, stored.code.as_deref());
        assert_eq!(told, (Status::Expired, Some("older_than_retention")));
    }
    let waited = Claimant { published_at: Some(START + 7_200_000), ..bench.claimant("waited", 1) };
    assert!(matches!(bench.claim_as(waited).await, Claim::Granted(_)));
    assert!(matches!(bench.claim("unstamped").await, Claim::Granted(_)));
}

const DAY: i64 = 86_400_000;

pub(super) async fn what_is_kept_longer_by_a_worker_of_the_other_mode_is_not_swept(
    backend: &Backend,
) {
    let mut bench = Bench::new(backend, OnUnknown::Retry).await;
    let live = |id| Key { mode: Mode::Live, ..key(id) };
    let keep = Retention { mode: Mode::Live, keep: 7 * DAY };
    bench.ledger().tell(OwnCommand::Keep(keep)).await.unwrap();
    bench.end("tried", link("ch_1")).await;
    let claimed = bench.claim_as(Claimant { key: live("sold"), ..bench.claimant("sold", 1) }).await;
    let Claim::Granted(lease) = claimed else { panic!("{claimed:?}") };
    let (attempt, next) = (Attempt::Counted, Next::End(link("ch_2")));
    let on_unknown = OnUnknown::Retry;
    let settle = SettleRequest { key: live("sold"), lease, attempt, next, on_unknown };
    let Settle::Ended(sold) = bench.ledger().settle(settle).await.unwrap() else { panic!() };
    bench.ledger().tell(OwnCommand::PauseLane(Lane::Bulk)).await.unwrap();
    let campaign = "spring".to_owned();
    let cancelled = OwnCommand::CancelCampaign { campaign, before: START };
    bench.ledger().tell(cancelled).await.unwrap();
    bench.later();
    bench.ledger().tell(OwnCommand::ResumeLane(Lane::Bulk)).await.unwrap();
    bench.clock.advance(Duration::from_hours(25));
    assert_eq!(bench.sweep(bench.clock.now() - DAY).await, 1);
    let orders = bench.ledger().orders().await.unwrap();
    assert_eq!((orders.cancelled.len(), orders.lane_pauses.len()), (1, 1), "for live jobs, too");
    bench.reopen().await;
    let again = |id| Claimant { published_at: Some(START), ..bench.claimant(id, 1) };
    let resent = Claimant { key: live("sold"), ..again("sold") };
    assert_eq!(bench.claim_as(resent).await, Claim::Settled(sold));
    let Claim::Settled(stored) = bench.claim_as(again("tried")).await else { panic!("a link?") };
    assert_eq!(stored.code.as_deref(), Some("older_than_retention"));
    // That test jobs of that time are forgotten is no reason to refuse a live one.
    let waited = Claimant { key: live("waited"), ..again("waited") };
    assert!(matches!(bench.claim_as(waited).await, Claim::Granted(_)));
}

pub(super) async fn the_longest_retention_that_was_said_holds_until_what_was_made_under_it_is_old(
    backend: &Backend,
) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    bench.end("a", link("ch_1")).await;
    let long = Retention { mode: Mode::Test, keep: 7 * DAY };
    assert_eq!(bench.ledger().sweep(long).await.unwrap(), 0);
    let short = Retention { mode: Mode::Test, keep: DAY };
    bench.clock.advance(Duration::from_hours(7 * 24));
    assert_eq!(bench.ledger().sweep(short).await.unwrap(), 0, "another one may still promise it");
    bench.end("b", link("ch_2")).await;
    bench.later();
    assert_eq!(bench.ledger().sweep(short).await.unwrap(), 1);
    assert!(bench.look("b").await.is_some());
    bench.clock.advance(Duration::from_hours(24));
    assert_eq!(bench.ledger().sweep(short).await.unwrap(), 1);
    // One that is said again after it was over holds again.
    bench.end("c", link("ch_3")).await;
    bench.clock.advance(Duration::from_hours(7 * 24));
    bench.later();
    assert_eq!(bench.ledger().sweep(long).await.unwrap(), 1);
    bench.end("d", link("ch_4")).await;
    bench.clock.advance(Duration::from_hours(2 * 24));
    assert_eq!(bench.ledger().sweep(short).await.unwrap(), 0);
}

pub(super) async fn when_a_lane_was_paused_is_known_as_long_as_its_jobs_are(backend: &Backend) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    let tell = async |command| bench.ledger().tell(command).await.unwrap();
    let orders = async || bench.ledger().orders().await.unwrap();
    // One that is resumed again was not paused again.
    for command in [OwnCommand::PauseLane, OwnCommand::ResumeLane, OwnCommand::ResumeLane] {
        tell(command(Lane::Bulk)).await;
        bench.later();
    }
    let first = LanePause { lane: Lane::Bulk, from: START, to: START + 1_000 };
    assert_eq!(orders().await.lane_pauses, [first]);
    tell(OwnCommand::PauseLane(Lane::Interactive)).await;
    let since = PausedLane { lane: Lane::Interactive, since: START + 3_000 };
    assert_eq!(orders().await.paused_lanes, [since]);
    bench.clock.advance(Duration::from_hours(1));
    tell(OwnCommand::ResumeLane(Lane::Interactive)).await;
    assert_eq!(orders().await.lane_pauses.len(), 2);
    let second = LanePause { lane: Lane::Interactive, from: START + 3_000, to: START + 3_603_000 };
    bench.sweep(START + 2_000).await;
    assert_eq!(orders().await.lane_pauses, [second]);
}

pub(super) async fn a_parked_copy_is_noted_for_its_own_outcome_only(backend: &Backend) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    let stored = bench.end("a", rejected()).await;
    for (fence, parked) in [(stored.fence + 1, false), (stored.fence, true)] {
        bench.ledger().parked(key("a"), fence).await.unwrap();
        assert_eq!(bench.row("a").await.parked, parked);
    }
}

pub(super) async fn an_id_that_is_used_again_after_retention_counts_its_attempts_anew(
    backend: &Backend,
) {
    let mut bench = Bench::new(backend, OnUnknown::Retry).await;
    for round in 1..=2 {
        let lease = bench.lease("a").await;
        bench.settle("a", lease, unknown(), wait(START)).await;
        bench.end("a", link("ch_1")).await;
        bench.clock.advance(Duration::from_secs(3600));
        assert_eq!(bench.sweep(bench.clock.now()).await, 1);
        bench.clock.advance(Duration::from_secs(3600));
        bench.reopen().await;
        assert_eq!(bench.ledger().identity().ambiguous_attempts, round);
    }
}

pub(super) async fn a_job_of_another_ledgers_delay_queue_is_unresolved_unless_it_is_known(
    backend: &Backend,
) {
    let bench = Bench::new(backend, OnUnknown::Retry).await;
    let elsewhere = |id| Claimant { elsewhere: true, ..bench.claimant(id, 1) };
    let Claim::Settled(stored) = bench.claim_as(elsewhere("a")).await else { panic!("no link") };
    let told = (stored.status, stored.code.as_deref());
    assert_eq!(told, (Status::Unresolved, Some("other_ledger")));
    let stored = bench.end("b", link("ch_1")).await;
    bench.later();
    assert_eq!(bench.claim_as(elsewhere("b")).await, Claim::Settled(stored));
}

pub(super) async fn a_restored_ledger_gives_no_link_for_an_old_outcome_that_is_sent_again(
    backend: &Backend,
) {
    let mut bench = Bench::new(backend, OnUnknown::Retry).await;
    // As an old backup has them: each may have been sent again since, and have got a link.
    bench.end("failed", failed()).await;
    let lease = bench.lease("given_up").await;
    bench.settle("given_up", lease, unknown(), Next::End(failed())).await;
    let until = bench.clock.now();
    bench.ledger().tell(OwnCommand::Restored { until }).await.unwrap();
    bench.reopen().await;
    bench.later();
    // A copy of before repeats what it was told; the producer then sends again.
    let copy = Claimant { redelivered: true, ..bench.claimant("given_up", 1) };
    let Claim::Settled(stored) = bench.claim_as(copy).await else { panic!("it is settled") };
    assert_eq!(stored.code.as_deref(), Some("attempts_exhausted"));
    for id in ["failed", "given_up"] {
        let anew = Claimant { published_at: Some(bench.clock.now()), ..bench.claimant(id, 1) };
        let Claim::Settled(stored) = bench.claim_as(anew).await else { panic!("{id}") };
        assert_eq!(stored.code.as_deref(), Some("ledger_restored"), "{id}");
    }
    // Each doubt counts as a session that nobody was given.
    let counts = [bench.row("failed").await.ambiguous, bench.row("given_up").await.ambiguous];
    assert_eq!(counts, [1, 2]);
    bench.reopen().await;
    assert_eq!(bench.ledger().identity().ambiguous_attempts, 3);
}

pub(super) async fn a_restored_ledger_gives_no_link_to_a_job_that_it_may_have_forgotten(
    backend: &Backend,
) {
    let mut bench = Bench::new(backend, OnUnknown::Retry).await;
    bench.end("known", link("ch_1")).await;
    bench.later();
    // Rows as an old backup has them: since then, each may have been given a link.
    let lease = bench.lease("waiting").await;
    bench.settle("waiting", lease, Attempt::Counted, wait(START)).await;
    bench.lease("sending").await;
    bench.end("failed", failed()).await;
    bench.end("resent", failed()).await;
    let until = bench.clock.now();
    bench.ledger().tell(OwnCommand::Restored { until }).await.unwrap();
    // An earlier time does not take it back.
    bench.ledger().tell(OwnCommand::Restored { until: until - 1_000_000 }).await.unwrap();
    bench.reopen().await;
    bench.later();
    assert!(matches!(bench.claim("known").await, Claim::Settled(_)), "what it knows, it knows");
    let old = Claimant { published_at: Some(until), ..bench.claimant("old", 1) };
    let redelivered = Claimant { redelivered: true, ..bench.claimant("redelivered", 1) };
    for claimant in [old.clone(), redelivered] {
        let Claim::Settled(stored) = bench.claim_as(claimant).await else {
            panic!("it may have a link")
        };
        let told = (stored.status, stored.code.as_deref());
        assert_eq!(told, (Status::Unresolved, Some("ledger_restored")));
    }
    assert_eq!(bench.row("old").await.ambiguous, 1);
    // A copy that was picked up before, whatever its producer's clock said.
    let ahead = Claimant {
        published_at: Some(until + 60_000),
        picked_up_at: until,
        ..bench.claimant("ahead", 1)
    };
    let Claim::Settled(stored) = bench.claim_as(ahead).await else { panic!("it may have a link") };
    assert_eq!(stored.code.as_deref(), Some("ledger_restored"));
    bench.clock.advance(Duration::from_secs(60));
    for id in ["waiting", "sending", "failed"] {
        let again =
            Claimant { redelivered: true, published_at: Some(until - 1), ..bench.claimant(id, 1) };
        let Claim::Settled(stored) = bench.claim_as(again).await else { panic!("{id}") };
        assert_eq!(stored.status, Status::Unresolved, "{id}");
    }
    // Nor is the id free for another body: the one that failed may have been resent with success.
    let other = Claimant { published_at: Some(bench.clock.now()), ..bench.claimant("resent", 9) };
    assert!(matches!(bench.claim_as(other).await, Claim::Conflict(_)));
    // Jobs of later days are not doubted, redelivered or not.
    let fresh = Claimant {
        redelivered: true,
        published_at: Some(until + 3_600_000),
        ..bench.claimant("fresh", 1)
    };
    assert!(matches!(bench.claim_as(fresh).await, Claim::Granted(_)));
    // Too late is no way round it.
    let late = Claimant { published_at: Some(until), ..bench.claimant("late", 1) };
    let request = CloseRequest { claimant: late, ending: expired() };
    let closed = bench.ledger().close(request).await.unwrap();
    assert!(matches!(closed, Claim::Settled(stored) if stored.status == Status::Unresolved));
    let new = Claimant { published_at: Some(until + 1), ..bench.claimant("new", 1) };
    assert!(matches!(bench.claim_as(new).await, Claim::Granted(_)));
    // Producers resend by themselves what is unresolved; this is for a person, whatever they send.
    bench.later();
    let again = Claimant { published_at: Some(bench.clock.now()), ..bench.claimant("old", 1) };
    let Claim::Settled(stored) = bench.claim_as(again).await else { panic!("it may have a link") };
    let reply: serde_json::Value = serde_json::from_slice(&stored.reply).unwrap();
    assert_eq!(reply["next"], "ask_operator");
}
