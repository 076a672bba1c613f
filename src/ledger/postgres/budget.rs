//! The budgets that all workers share: one row for each of Creem's worlds, from which each worker
//! takes small blocks of places.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error, Row};

use crate::job::Mode;
use crate::ledger::budget::Reckoning;
use crate::ledger::{Learned, News, Places, Taught, Wish};

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

/// How far apart places lie: `$6` at least, and where nobody has learned it yet, `$7`.
macro_rules! interval {
    ($learned:literal) => {
        concat!("greatest($6::int8, coalesce(", $learned, ", $7::int8), 1)")
    };
    () => {
        interval!("b.interval_us")
    };
}

/// How many places a block has: `$2` at most, and no more than `$8` lasts, but one at least.
macro_rules! count {
    ($learned:literal) => {
        concat!("greatest(least($2::int8, $8::int8 / ", interval!($learned), "), 1)")
    };
    () => {
        count!("b.interval_us")
    };
}

/// What a block of places lasts.
macro_rules! block {
    () => {
        concat!(count!(), " * ", interval!())
    };
}

/// Takes a block of places: how many there are, when its first place is, what the clock shows, for how long all are
/// quiet, and how far apart the places are. The first place is not before the answer can be there, in `$3`. Bulk gets
/// none that lies further ahead than `$4`, but every `$5` at the end of the line; where it gets none, it is told when
/// there may be one. Interactive goes up to `$9` ahead of that end, behind its own; either way the line grows.
const LEASE: &str = concat!(
    "WITH leased (given, first, clock, quiet, interval) AS (
     INSERT INTO checkout_worker.budget AS b (mode, next_at, quiet_until, written_at, bulk_at, buyers_at)
     VALUES ($1, ",
    now!(),
    " + $3::int8 + ",
    count!("NULL"),
    " * ",
    interval!("NULL"),
    ", 0, ",
    now!(),
    ", ",
    now!(),
    " + coalesce($5::int8, 0), CASE WHEN $5::int8 IS NULL THEN ",
    now!(),
    " + $3::int8 + ",
    count!("NULL"),
    " * ",
    interval!("NULL"),
    " ELSE 0 END)
     ON CONFLICT (mode) DO UPDATE SET
         next_at = greatest(",
    next!(),
    ", ",
    now!(),
    " + $3::int8) + ",
    block!(),
    ", buyers_at = CASE WHEN $5::int8 IS NULL THEN greatest(",
    believed!("buyers_at"),
    ", ",
    next!(),
    " - $9::int8, ",
    believed!("quiet_until"),
    ", ",
    now!(),
    " + $3::int8) + ",
    block!(),
    " ELSE ",
    believed!("buyers_at"),
    " END, quiet_until = ",
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
     RETURNING ",
    count!(),
    ", CASE WHEN $5::int8 IS NULL THEN b.buyers_at ELSE b.next_at END - ",
    block!(),
    ", ",
    now!(),
    ", greatest(b.quiet_until - ",
    now!(),
    ", 0), ",
    interval!(),
    "
     )
     SELECT * FROM leased
     UNION ALL
     SELECT 0::int8, least(",
    next!(),
    " - $4::int8, ",
    believed!("bulk_at"),
    "), ",
    now!(),
    ", greatest(",
    believed!("quiet_until"),
    " - ",
    now!(),
    ", 0), ",
    interval!(),
    "
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

/// What all have learned: which version, the rate, and how many microseconds ago.
macro_rules! learned {
    () => {
        concat!("b.learned_version, b.learned, greatest(", now!(), " - b.learned_at, 0)")
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
    ", buyers_at = ",
    believed!("buyers_at"),
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
    news!("b.quiet_until", "b.down_until"),
    ", ",
    learned!()
);

/// The question alone writes nothing: every worker asks it several times a second.
const ASK: &str = concat!(
    "SELECT ",
    news!(believed!("quiet_until"), believed!("down_until")),
    ", ",
    learned!(),
    " FROM checkout_worker.budget AS b WHERE mode = $1"
);

/// Writes the rate `$3` and its interval `$4` after version `$2`, or says which one there is.
const TEACH: &str = concat!(
    "WITH written (version) AS (
     INSERT INTO checkout_worker.budget AS b
         (mode, next_at, quiet_until, written_at, learned, learned_version, learned_at, interval_us)
     VALUES ($1, 0, 0, ",
    now!(),
    ", $3, $2 + 1, ",
    now!(),
    ", $4)
     ON CONFLICT (mode) DO UPDATE SET learned = excluded.learned, interval_us = excluded.interval_us,
         learned_at = excluded.learned_at, learned_version = excluded.learned_version
     WHERE b.learned_version = $2
     RETURNING b.learned_version
     )
     SELECT true, version, NULL, 0::int8 FROM written
     UNION ALL
     SELECT false, ",
    learned!(),
    " FROM checkout_worker.budget AS b WHERE b.mode = $1 AND NOT EXISTS (SELECT FROM written)"
);

/// Takes places; `lead` is how long the last answer took.
pub(super) async fn lease(
    client: &Client,
    mode: Mode,
    wish: Wish,
    lead: Duration,
    reckoning: &Reckoning,
) -> Result<Places, Error> {
    let Wish { count, lasting, least, usual, ahead, bulk } = wish;
    let (places, lead, mode) = (i64::from(count), micros(lead), mode.as_str());
    let (least, usual, lasting) = (micros(least), micros(usual), micros(lasting));
    let ahead = micros(ahead);
    let horizon = bulk.map(|terms| micros(terms.horizon));
    let every = bulk.map(|terms| micros(terms.every));
    let arguments: [Parameter<'_>; 9] = [
        (&mode, Type::TEXT),
        (&places, Type::INT8),
        (&lead, Type::INT8),
        (&horizon, Type::INT8),
        (&every, Type::INT8),
        (&least, Type::INT8),
        (&usual, Type::INT8),
        (&lasting, Type::INT8),
        (&ahead, Type::INT8),
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
        let interval = wish.least.max(wish.usual);
        return Ok(Places { first: asked, count: 0, interval, quiet: Duration::ZERO });
    };
    let (count, first): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    let (now, quiet): (i64, i64) = (row.try_get(2)?, row.try_get(3)?);
    let interval = duration(row.try_get(4)?);
    reckoning.hear(now, asked);
    let first = reckoning.instant(first).unwrap_or(asked);
    let count = u32::try_from(count).unwrap_or(0);
    Ok(Places { first, count, interval, quiet: duration(quiet) })
}

/// Tells all what one knows; what all know together, and have learned.
pub(super) async fn share(
    client: &Client,
    mode: Mode,
    news: News,
) -> Result<(News, Option<Learned>), Error> {
    let (quiet, down, mode) = (micros(news.quiet), micros(news.down), mode.as_str());
    let mode: Parameter<'_> = (&mode, Type::TEXT);
    let row = if news == News::default() {
        client.query_typed_opt(ASK, &[mode]).await?
    } else {
        let arguments = [mode, (&quiet, Type::INT8), (&down, Type::INT8)];
        Some(client.query_typed_one(SHARE, &arguments).await?)
    };
    let Some(row) = row else { return Ok((News::default(), None)) };
    let news = News { quiet: duration(row.try_get(0)?), down: duration(row.try_get(1)?) };
    Ok((news, learned(&row, 2)?))
}

/// Writes down what was learned.
pub(super) async fn teach(
    client: &Client,
    mode: Mode,
    version: i64,
    text: &str,
    interval: Duration,
) -> Result<Taught, Error> {
    let (mode, interval) = (mode.as_str(), micros(interval).max(1));
    let arguments: [Parameter<'_>; 4] =
        [(&mode, Type::TEXT), (&version, Type::INT8), (&text, Type::TEXT), (&interval, Type::INT8)];
    let Some(row) = client.query_typed_opt(TEACH, &arguments).await? else {
        return Ok(Taught::Busy);
    };
    if row.try_get(0)? {
        return Ok(Taught::Written);
    }
    let nothing = Learned { version: row.try_get(1)?, text: String::new(), age: Duration::ZERO };
    Ok(Taught::Other(learned(&row, 1)?.unwrap_or(nothing)))
}

/// What all have learned, as it stands in a row from that column on.
fn learned(row: &Row, at: usize) -> Result<Option<Learned>, Error> {
    let (version, text, age) = (row.try_get(at)?, row.try_get(at + 1)?, row.try_get(at + 2)?);
    let text: Option<String> = text;
    Ok(text.map(|text| Learned { version, text, age: duration(age) }))
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

fn duration(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}
