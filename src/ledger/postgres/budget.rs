//! The budgets that all workers share: one row for each of Creem's worlds, from which each worker
//! takes small blocks of places.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error};

use crate::job::Mode;
use crate::ledger::budget::Reckoning;
use crate::ledger::{News, Places, Wish};

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

/// When the next place is, as far as the row says and silence allows.
macro_rules! next {
    () => {
        concat!("greatest(", believed!("next_at"), ", ", believed!("quiet_until"), ")")
    };
}

/// Takes a block of `$2` microseconds: how many there are (one or none), when its first place is, what the
/// clock shows, and for how long all are quiet. The first place is not before the answer can be there, in
/// `$3`. Bulk gets none that lies further ahead than `$4`, but every `$5` at the end of the line; where it
/// gets none, it is told when there may be one.
const LEASE: &str = concat!(
    "WITH leased (given, first, clock, quiet) AS (
     INSERT INTO checkout_worker.budget AS b (mode, next_at, quiet_until, written_at, bulk_at)
     VALUES ($1, ",
    now!(),
    " + $2::int8 + $3::int8, 0, ",
    now!(),
    ", ",
    now!(),
    " + coalesce($5::int8, 0))
     ON CONFLICT (mode) DO UPDATE SET
         next_at = greatest(",
    next!(),
    ", ",
    now!(),
    " + $3::int8) + $2::int8,
         quiet_until = ",
    believed!("quiet_until"),
    ", down_until = ",
    believed!("down_until"),
    ", bulk_at = CASE WHEN $5::int8 IS NULL THEN ",
    believed!("bulk_at"),
    " ELSE ",
    now!(),
    " + $5::int8 END, written_at = ",
    now!(),
    "
     WHERE $4::int8 IS NULL OR ",
    next!(),
    " <= ",
    now!(),
    " + $4::int8 OR ",
    believed!("bulk_at"),
    " <= ",
    now!(),
    "
     RETURNING 1, b.next_at - $2::int8, ",
    now!(),
    ", greatest(b.quiet_until - ",
    now!(),
    ", 0)
     )
     SELECT * FROM leased
     UNION ALL
     SELECT 0, least(",
    next!(),
    " - $4::int8, ",
    believed!("bulk_at"),
    "), ",
    now!(),
    ", greatest(",
    believed!("quiet_until"),
    " - ",
    now!(),
    ", 0)
     FROM checkout_worker.budget AS b WHERE b.mode = $1 AND NOT EXISTS (SELECT FROM leased)"
);

/// The clock alone, asked a few times: the fastest answer tells it best.
const CLOCK: &str = concat!("SELECT ", now!());
const CLOCK_QUESTIONS: usize = 5;

/// What all know together, in microseconds from now.
macro_rules! news {
    ($quiet:expr, $down:expr) => {
        concat!("greatest(", $quiet, " - ", now!(), ", 0), greatest(", $down, " - ", now!(), ", 0)")
    };
}

/// Makes sure of silence for `$2` microseconds, and that Creem is taken to be down for `$3`.
const SHARE: &str = concat!(
    "INSERT INTO checkout_worker.budget AS b (mode, next_at, quiet_until, down_until, written_at)
     VALUES ($1, 0, ",
    now!(),
    " + $2::int8, ",
    now!(),
    " + $3::int8, ",
    now!(),
    ")
     ON CONFLICT (mode) DO UPDATE SET
         next_at = ",
    believed!("next_at"),
    ", bulk_at = ",
    believed!("bulk_at"),
    ",
         quiet_until = greatest(",
    believed!("quiet_until"),
    ", excluded.quiet_until),
         down_until = greatest(",
    believed!("down_until"),
    ", excluded.down_until), written_at = excluded.written_at
     RETURNING ",
    news!("b.quiet_until", "b.down_until")
);

/// The question alone writes nothing: every worker asks it several times a second.
const ASK: &str = concat!(
    "SELECT ",
    news!(believed!("quiet_until"), believed!("down_until")),
    " FROM checkout_worker.budget AS b WHERE mode = $1"
);

/// Takes places; `lead` is how long the last answer took.
pub(super) async fn lease(
    client: &Client,
    mode: Mode,
    wish: Wish,
    lead: Duration,
    reckoning: &Reckoning,
) -> Result<Places, Error> {
    let Wish { count, interval, bulk } = wish;
    let (block, lead, mode) = (micros(interval * count), micros(lead), mode.as_str());
    let horizon = bulk.map(|terms| micros(terms.horizon));
    let every = bulk.map(|terms| micros(terms.every));
    let arguments: [Parameter<'_>; 5] = [
        (&mode, Type::TEXT),
        (&block, Type::INT8),
        (&lead, Type::INT8),
        (&horizon, Type::INT8),
        (&every, Type::INT8),
    ];
    if reckoning.should_try() {
        for _ in 0..CLOCK_QUESTIONS {
            let asked = Instant::now();
            let now = client.query_typed_one(CLOCK, &[]).await?.try_get(0)?;
            reckoning.hear(now, asked);
        }
    }
    let asked = Instant::now();
    let Some(row) = client.query_typed_opt(LEASE, &arguments).await? else {
        // Somebody else has just made the row.
        return Ok(Places { first: asked, count: 0, quiet: Duration::ZERO });
    };
    let (given, first): (i32, i64) = (row.try_get(0)?, row.try_get(1)?);
    let (now, quiet): (i64, i64) = (row.try_get(2)?, row.try_get(3)?);
    reckoning.hear(now, asked);
    let first = reckoning.instant(first).unwrap_or(asked);
    let count = if given == 1 { count } else { 0 };
    Ok(Places { first, count, quiet: duration(quiet) })
}

/// Tells all what one knows; what all know together.
pub(super) async fn share(client: &Client, mode: Mode, news: News) -> Result<News, Error> {
    let (quiet, down, mode) = (micros(news.quiet), micros(news.down), mode.as_str());
    let mode: Parameter<'_> = (&mode, Type::TEXT);
    let row = if news == News::default() {
        client.query_typed_opt(ASK, &[mode]).await?
    } else {
        let arguments = [mode, (&quiet, Type::INT8), (&down, Type::INT8)];
        Some(client.query_typed_one(SHARE, &arguments).await?)
    };
    let Some(row) = row else { return Ok(News::default()) };
    Ok(News { quiet: duration(row.try_get(0)?), down: duration(row.try_get(1)?) })
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

fn duration(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}
