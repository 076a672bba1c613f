//! What a ledger promises, on every back-end; and what each has to stand besides.

mod bench;
mod embedded;
#[path = "../../budget/line.rs"]
mod line;
mod promises;
mod ready;
mod shared;

use std::path::Path;

use creem_checkout_worker::job::{Key, Mode, RequestId};
use creem_checkout_worker::ledger::Row;
use creem_checkout_worker::ledger::sqlite::inspect::Inspector;

pub(crate) fn key(id: &str) -> Key {
    Key { mode: Mode::Test, request_id: RequestId::parse(id).unwrap() }
}

/// The row of a test job in an embedded ledger, read beside the worker.
pub(crate) fn row(path: &Path, id: &str) -> Row {
    Inspector::open(path).unwrap().row(&key(id)).unwrap().expect("the ledger has a row")
}

/// Makes a test of each promise for each back-end.
macro_rules! on_every_ledger {
    ($($promise:ident,)*) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $promise() {
                super::promises::$promise(&super::bench::Backend::Sqlite).await;
            })*
        }
        mod postgres {
            $(#[tokio::test]
            async fn $promise() {
                let server = crate::support::postgres::shared(stringify!($promise)).await;
                let Some(server) = server else { return };
                super::promises::$promise(&super::bench::Backend::Postgres(server)).await;
            })*
        }
        /// Behind a PgBouncer in transaction mode: no two statements of a worker meet one session.
        mod pooled {
            $(#[tokio::test]
            async fn $promise() {
                let server = crate::support::postgres::pooled(stringify!($promise)).await;
                let Some(server) = server else { return };
                super::promises::$promise(&super::bench::Backend::Postgres(server)).await;
            })*
        }
    };
}

on_every_ledger! {
    a_link_is_stored_once_and_repeated_byte_for_byte_for_ever,
    another_body_is_a_conflict_that_names_the_fields_and_touches_nothing,
    a_live_claim_keeps_others_out_and_a_dead_one_counts_as_ambiguous,
    a_zombie_may_neither_end_nor_delay_a_job_that_is_settled,
    a_claim_or_settle_asked_twice_counts_once,
    a_process_that_died_loses_its_leases,
    a_job_that_ends_the_process_again_and_again_is_given_up,
    no_session_exists_is_never_said_after_an_ambiguous_attempt,
    what_ended_without_a_session_is_tried_afresh_when_sent_again_with_any_body,
    a_lease_written_under_a_clock_that_ran_ahead_is_over,
    unresolved_is_tried_afresh_with_the_same_body_only_and_with_park_not_at_all,
    with_park_a_call_that_was_cut_off_is_not_repeated,
    with_park_chosen_since_a_job_whose_call_may_have_made_a_session_is_not_tried_again,
    a_retry_waits_for_its_time_and_gives_its_lease_back_at_once,
    an_attempt_that_was_not_sent_is_given_back_and_a_free_one_is_counted_apart,
    test_and_live_are_different_jobs,
    many_racing_claims_of_one_job_grant_one,
    totals_and_pauses_survive_the_process,
    retention_removes_old_outcomes_but_nothing_that_may_hide_a_session,
    what_is_kept_longer_by_a_worker_of_the_other_mode_is_not_swept,
    the_longest_retention_that_was_said_holds_until_what_was_made_under_it_is_old,
    when_a_lane_was_paused_is_known_as_long_as_its_jobs_are,
    a_parked_copy_is_noted_for_its_own_outcome_only,
    what_is_as_old_as_swept_outcomes_gets_no_link_whatever_retention_is_now,
    a_restored_ledger_gives_no_link_to_a_job_that_it_may_have_forgotten,
    a_restored_ledger_gives_no_link_for_an_old_outcome_that_is_sent_again,
    an_id_that_is_used_again_after_retention_counts_its_attempts_anew,
    a_job_of_another_ledgers_delay_queue_is_unresolved_unless_it_is_known,
}
