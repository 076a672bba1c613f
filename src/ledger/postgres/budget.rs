//! The budget that all workers share: one row, from which each takes small blocks of places.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error};

use crate::ledger::Places;

/// How far ahead places and silence can lie: the longest `Retry-After`, and what other workers have
/// taken. What lies further ahead was written under a clock that has since been set back.
const HORIZON: Duration = Duration::from_mins(10);

/// Microseconds since 1970 on the database's clock.
macro_rules! now {
    () => {
        "(extract(epoch from clock_timestamp()) * 1000000)::int8"
    };
}

/// A column of the row, if it does not lie beyond the horizon `$1`.
macro_rules! believed {
    ($column:literal) => {
        concat!(
            "CASE WHEN b.",
            $column,
            " > ",
            now!(),
            " + $1::int8 THEN 0 ELSE b.",
            $column,
            " END"
        )
    };
}

/// Takes a block of `$2`: how many microseconds from now its first place is, and for how many all are
/// quiet. The first place is not before the answer can be there, in `$3`.
const LEASE: &str = concat!(
    "INSERT INTO checkout_worker.budget AS b (name, next_at, quiet_until)
     VALUES ('creem', ",
    now!(),
    " + $2::int8 + $3::int8, 0)
     ON CONFLICT (name) DO UPDATE SET
         next_at = greatest(",
    believed!("next_at"),
    ", ",
    believed!("quiet_until"),
    ", ",
    now!(),
    " + $3::int8) + $2::int8,
         quiet_until = ",
    believed!("quiet_until"),
    "
     RETURNING b.next_at - $2::int8 - ",
    now!(),
    ", greatest(b.quiet_until - ",
    now!(),
    ", $1::int8 * 0)"
);

/// Makes sure of silence for `$2`.
const QUIET: &str = concat!(
    "INSERT INTO checkout_worker.budget AS b (name, next_at, quiet_until)
     VALUES ('creem', 0, ",
    now!(),
    " + $2::int8)
     ON CONFLICT (name) DO UPDATE SET quiet_until = greatest(",
    believed!("quiet_until"),
    ", excluded.quiet_until)
     RETURNING greatest(b.quiet_until - ",
    now!(),
    ", 0)"
);

/// The question alone writes nothing: every worker asks it twice a second.
const HOW_QUIET: &str = concat!(
    "SELECT greatest(",
    believed!("quiet_until"),
    " - ",
    now!(),
    ", 0) FROM checkout_worker.budget AS b WHERE name = 'creem'"
);

/// Takes places; `lead` is how long the last answer took.
pub(super) async fn lease(
    client: &Client,
    count: u32,
    interval: Duration,
    lead: Duration,
) -> Result<Places, Error> {
    let block = micros(interval * count);
    let horizon = micros(HORIZON.max(interval * count * 4));
    let lead = micros(lead);
    let arguments: [(&(dyn ToSql + Sync), Type); 3] =
        [(&horizon, Type::INT8), (&block, Type::INT8), (&lead, Type::INT8)];
    let asked = Instant::now();
    let row = client.query_typed_one(LEASE, &arguments).await?;
    let (offset, quiet): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    // The database's "now" was somewhere between question and answer.
    let middle = asked + asked.elapsed() / 2;
    let offset = offset.clamp(-micros(Duration::from_secs(1)), horizon);
    let first = if offset < 0 {
        middle.checked_sub(duration(-offset)).unwrap_or(middle)
    } else {
        middle + duration(offset)
    };
    Ok(Places { first, count, interval, quiet: duration(quiet) })
}

/// Makes sure that all are quiet for `at_least`, if that is anything; for how long they are.
pub(super) async fn quiet(client: &Client, at_least: Duration) -> Result<Duration, Error> {
    let (horizon, at_least) = (micros(HORIZON), micros(at_least));
    let arguments: [(&(dyn ToSql + Sync), Type); 2] =
        [(&horizon, Type::INT8), (&at_least, Type::INT8)];
    let row = if at_least == 0 {
        client.query_typed_opt(HOW_QUIET, &arguments[..1]).await?
    } else {
        Some(client.query_typed_one(QUIET, &arguments).await?)
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
