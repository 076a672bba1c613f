//! How fast Creem can be asked, as all workers have learned it: one row for each of Creem's worlds. Apart from the
//! budget, as it is written often and no place depends on when.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Error, Row};

use super::budget::{Parameter, micros, now};
use crate::job::Mode;
use crate::ledger::budget::Reckoning;
use crate::ledger::{Learned, Taught, Teaching};

/// Writes the rate `$3` and its interval `$4`, as it was at `$5`, after version `$2`, or says which one there is, and
/// what the clock shows. Where another one can be seen already nothing is locked. What a crash of the database forgets
/// of it is learned again.
const TEACH: &str = concat!(
    "WITH written (version) AS (
     INSERT INTO checkout_worker.rate AS r (mode, version, learned, learned_at, interval_us)
     SELECT $1, $2 + 1, $3, coalesce($5::int8, ",
    now!(),
    "), $4
     WHERE NOT EXISTS (SELECT FROM checkout_worker.rate WHERE mode = $1 AND version <> $2)
     ON CONFLICT (mode) DO UPDATE SET version = excluded.version, learned = excluded.learned,
         learned_at = excluded.learned_at, interval_us = excluded.interval_us
     WHERE r.version = $2
     RETURNING r.version
     )
     SELECT true, version, NULL, 0::int8, ",
    now!(),
    ", set_config('synchronous_commit', 'off', true) FROM written
     UNION ALL
     SELECT false, version, learned, learned_at, ",
    now!(),
    ", NULL FROM checkout_worker.rate WHERE mode = $1 AND NOT EXISTS (SELECT FROM written)"
);

/// Writes down what was learned.
pub(super) async fn teach(
    client: &Client,
    mode: Mode,
    teaching: Teaching<'_>,
    reckoning: &Reckoning,
) -> Result<Taught, Error> {
    let Teaching { version, text, at, interval } = teaching;
    let (mode, interval, at) = (mode.as_str(), micros(interval).max(1), reckoning.micros(at));
    let arguments: [Parameter<'_>; 5] = [
        (&mode, Type::TEXT),
        (&version, Type::INT8),
        (&text, Type::TEXT),
        (&interval, Type::INT8),
        (&at, Type::INT8),
    ];
    let asked = Instant::now();
    let Some(row) = client.query_typed_opt(TEACH, &arguments).await? else {
        return Ok(Taught::Busy);
    };
    reckoning.hear(row.try_get(4)?, asked);
    if row.try_get(0)? {
        return Ok(Taught::Written);
    }
    Ok(match learned(&row, 1, reckoning)? {
        // Whoever wrote meanwhile was waited for, and what it wrote is not seen yet.
        Some(other) if other.version != version => Taught::Other(other),
        _ => Taught::Busy,
    })
}

/// What all have learned, as it stands in three columns of a row: the version, the rate, and when it was so.
pub(super) fn learned(
    row: &Row,
    at: usize,
    reckoning: &Reckoning,
) -> Result<Option<Learned>, Error> {
    let Some(version) = row.try_get(at)? else { return Ok(None) };
    let text = row.try_get(at + 1)?;
    let then = reckoning.instant(row.try_get(at + 2)?);
    let age = then.map_or(Duration::ZERO, |then| Instant::now().saturating_duration_since(then));
    Ok(Some(Learned { version, text, age }))
}
