//! The budget that all workers share: one row, from which each takes small blocks of places.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Error};

use crate::ledger::Places;

/// Microseconds since 1970 on the database's clock.
macro_rules! now {
    () => {
        "(extract(epoch from clock_timestamp()) * 1000000)::int8"
    };
}

/// Takes a block: how many microseconds from now its first place is (in the past, if nobody has taken
/// one for a while), and for how many all are quiet.
const LEASE: &str = concat!(
    "INSERT INTO checkout_worker.budget AS b (name, next_at, quiet_until)
     VALUES ('creem', ",
    now!(),
    " + $1::int8, 0)
     ON CONFLICT (name) DO UPDATE SET next_at = greatest(b.next_at, b.quiet_until, ",
    now!(),
    ") + $1::int8
     RETURNING b.next_at - $1::int8 - ",
    now!(),
    ", greatest(b.quiet_until - ",
    now!(),
    ", 0)"
);

const QUIET: &str = concat!(
    "INSERT INTO checkout_worker.budget AS b (name, next_at, quiet_until)
     VALUES ('creem', 0, ",
    now!(),
    " + $1::int8)
     ON CONFLICT (name) DO UPDATE SET quiet_until = greatest(b.quiet_until, excluded.quiet_until)
     RETURNING greatest(b.quiet_until - ",
    now!(),
    ", 0)"
);

/// The question alone writes nothing: every worker asks it twice a second.
const HOW_QUIET: &str = concat!(
    "SELECT greatest(quiet_until - ",
    now!(),
    ", 0) FROM checkout_worker.budget WHERE name = 'creem'"
);

pub(super) async fn lease(
    client: &Client,
    count: u32,
    interval: Duration,
) -> Result<Places, Error> {
    let block = micros(interval * count);
    let asked = Instant::now();
    let row = client.query_typed_one(LEASE, &[(&block, Type::INT8)]).await?;
    let (offset, quiet): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    // The database's "now" was somewhere between question and answer.
    let middle = asked + asked.elapsed() / 2;
    let offset = offset.clamp(-micros(Duration::from_secs(1)), i64::MAX);
    let first = if offset < 0 {
        middle.checked_sub(duration(-offset)).unwrap_or(middle)
    } else {
        middle + duration(offset)
    };
    Ok(Places { first, count, interval, quiet: duration(quiet) })
}

pub(super) async fn quiet(client: &Client, at_least: Duration) -> Result<Duration, Error> {
    let row = if at_least.is_zero() {
        client.query_typed_opt(HOW_QUIET, &[]).await?
    } else {
        Some(client.query_typed_one(QUIET, &[(&micros(at_least), Type::INT8)]).await?)
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
