//! The budgets that all workers share: one row for each of Creem's worlds, from which each worker
//! takes small blocks of places.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error};

use crate::job::Mode;
use crate::ledger::Places;
use crate::ledger::budget::Reckoning;

/// A value with its type.
type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

/// How much earlier than the row's own time the clock may show, in microseconds, before the row is
/// taken to be written under a clock that has since been set back: then its times are as far ahead of the
/// clock as they were. Places that were leased before are still to come, and silence is not over.
macro_rules! set_back {
    () => {
        "1000000"
    };
}

/// Microseconds since 1970 on the database's clock.
macro_rules! now {
    () => {
        "(extract(epoch from clock_timestamp()) * 1000000)::int8"
    };
}

/// A column of the row, unless the clock was set back since.
macro_rules! believed {
    ($column:literal) => {
        concat!(
            "CASE WHEN ",
            now!(),
            " < b.written_at - ",
            set_back!(),
            " THEN b.",
            $column,
            " - b.written_at + ",
            now!(),
            " ELSE b.",
            $column,
            " END"
        )
    };
}

/// Takes a block of `$2` microseconds: when its first place is, what the clock shows, and for how long
/// all are quiet. The first place is not before the answer can be there, in `$3`.
const LEASE: &str = concat!(
    "INSERT INTO checkout_worker.budget AS b (mode, next_at, quiet_until, written_at)
     VALUES ($1, ",
    now!(),
    " + $2::int8 + $3::int8, 0, ",
    now!(),
    ")
     ON CONFLICT (mode) DO UPDATE SET
         next_at = greatest(",
    believed!("next_at"),
    ", ",
    believed!("quiet_until"),
    ", ",
    now!(),
    " + $3::int8) + $2::int8,
         quiet_until = ",
    believed!("quiet_until"),
    ", written_at = ",
    now!(),
    "
     RETURNING b.next_at - $2::int8, ",
    now!(),
    ", greatest(b.quiet_until - ",
    now!(),
    ", 0)"
);

/// The clock alone, asked a few times: the fastest answer tells it best.
const CLOCK: &str = concat!("SELECT ", now!());
const CLOCK_QUESTIONS: usize = 5;

/// Makes sure of silence for `$2` microseconds.
const QUIET: &str = concat!(
    "INSERT INTO checkout_worker.budget AS b (mode, next_at, quiet_until, written_at)
     VALUES ($1, 0, ",
    now!(),
    " + $2::int8, ",
    now!(),
    ")
     ON CONFLICT (mode) DO UPDATE SET
         next_at = ",
    believed!("next_at"),
    ",
         quiet_until = greatest(",
    believed!("quiet_until"),
    ", excluded.quiet_until), written_at = excluded.written_at
     RETURNING greatest(b.quiet_until - ",
    now!(),
    ", 0)"
);

/// The question alone writes nothing: every worker asks it several times a second.
const HOW_QUIET: &str = concat!(
    "SELECT greatest(",
    believed!("quiet_until"),
    " - ",
    now!(),
    ", 0) FROM checkout_worker.budget AS b WHERE mode = $1"
);

/// Takes places, so many and so far apart; `lead` is how long the last answer took.
pub(super) async fn lease(
    client: &Client,
    mode: Mode,
    (count, interval): (u32, Duration),
    lead: Duration,
    reckoning: &Reckoning,
) -> Result<Places, Error> {
    let (block, lead, mode) = (micros(interval * count), micros(lead), mode.as_str());
    let arguments: [Parameter<'_>; 3] =
        [(&mode, Type::TEXT), (&block, Type::INT8), (&lead, Type::INT8)];
    if reckoning.should_try() {
        for _ in 0..CLOCK_QUESTIONS {
            let asked = Instant::now();
            let now = client.query_typed_one(CLOCK, &[]).await?.try_get(0)?;
            reckoning.hear(now, asked);
        }
    }
    let asked = Instant::now();
    let row = client.query_typed_one(LEASE, &arguments).await?;
    let (first, now, quiet): (i64, i64, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    reckoning.hear(now, asked);
    let first = reckoning.instant(first).unwrap_or(asked);
    Ok(Places { first, count, interval, quiet: duration(quiet) })
}

/// Makes sure that all are quiet for `at_least`, if that is anything; for how long they are.
pub(super) async fn quiet(
    client: &Client,
    mode: Mode,
    at_least: Duration,
) -> Result<Duration, Error> {
    let (at_least, mode) = (micros(at_least), mode.as_str());
    let mode: Parameter<'_> = (&mode, Type::TEXT);
    let row = if at_least == 0 {
        client.query_typed_opt(HOW_QUIET, &[mode]).await?
    } else {
        Some(client.query_typed_one(QUIET, &[mode, (&at_least, Type::INT8)]).await?)
    };
    let quiet: i64 = row.map_or(Ok(0), |row| row.try_get(0))?;
    Ok(duration(quiet))
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

fn duration(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}
