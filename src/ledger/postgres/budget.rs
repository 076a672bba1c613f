//! The budgets that all workers share: one row for each of Creem's worlds, from which each worker
//! takes small blocks of places.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error};

use super::rate;
use crate::job::Mode;
use crate::ledger::budget::Reckoning;
use crate::ledger::{Learned, News, Places, Wish};

/// A value with its type.
pub(super) type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

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
pub(super) use now;

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

/// What a block of places lasts.
macro_rules! block {
    () => {
        "(SELECT interval * count FROM wish)"
    };
}

/// When a place may be at the soonest.
macro_rules! soonest {
    () => {
        concat!(now!(), " + $3::int8")
    };
}

/// Up to when interactive has places: up to `$9` before the end of the line, and behind its own.
macro_rules! interactive {
    () => {
        concat!(
            "greatest(least(",
            believed!("interactive_next_at"),
            ", ",
            next!(),
            "), ",
            next!(),
            " - $9::int8, ",
            believed!("quiet_until"),
            ")"
        )
    };
}

/// Up to when whoever asks has places.
macro_rules! line {
    () => {
        concat!("CASE WHEN $5::int8 IS NULL THEN ", interactive!(), " ELSE ", next!(), " END")
    };
}

/// Takes a block of places: how many there are, when its first place is, what the clock shows, for how long all are
/// quiet, and how far apart the places are.
///
/// * `$1` the mode
/// * `$2` most places
/// * `$3` how long the last answer took: no place is sooner
/// * `$4` how far ahead the first of them may lie (NULL: however far, as once after the clock was set back); who gets none
///   is told when there may be one
/// * `$5` for bulk, how often it gets some all the same (NULL: they are for interactive)
/// * `$6` how far apart they are at least
/// * `$7` how far apart they are where nobody has learned it
/// * `$8` how long the block lasts at most, but one place at least
/// * `$9` how much of the line interactive may overtake
///
/// All but `$1` and `$2` are microseconds. Bulk's lie at the end of the line; whoever gets some, the line grows.
const LEASE: &str = concat!(
    "WITH learned (interval) AS (
     SELECT greatest($6::int8, coalesce(
         (SELECT least(interval_us, 1000000) FROM checkout_worker.rate WHERE mode = $1),
         $7::int8), 1)
     ), wish (interval, count) AS (
     SELECT interval, greatest(least($2::int8, $8::int8 / interval), 1) FROM learned
     ), leased (given, first, clock, quiet, interval) AS (
     INSERT INTO checkout_worker.budget AS b
         (mode, next_at, quiet_until, written_at, bulk_at, interactive_next_at)
     VALUES ($1, ",
    soonest!(),
    " + ",
    block!(),
    ", 0, ",
    now!(),
    ", ",
    now!(),
    " + coalesce($5::int8, 0), CASE WHEN $5::int8 IS NULL THEN ",
    soonest!(),
    " + ",
    block!(),
    " ELSE 0 END)
     ON CONFLICT (mode) DO UPDATE SET
         next_at = greatest(",
    next!(),
    ", ",
    soonest!(),
    ") + ",
    block!(),
    ", interactive_next_at = CASE WHEN $5::int8 IS NULL THEN greatest(",
    interactive!(),
    ", ",
    soonest!(),
    ") + ",
    block!(),
    " ELSE ",
    believed!("interactive_next_at"),
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
    line!(),
    " <= ",
    now!(),
    " + $4::int8 OR $5::int8 IS NOT NULL AND ",
    believed!("bulk_at"),
    " <= ",
    now!(),
    " OR ",
    // Else the line would stay as far ahead until the clock shows what it did.
    now!(),
    " < b.written_at - ",
    set_back!(),
    "
     RETURNING (SELECT count FROM wish),
         CASE WHEN $5::int8 IS NULL THEN b.interactive_next_at ELSE b.next_at END - ",
    block!(),
    ", ",
    now!(),
    ", greatest(b.quiet_until - ",
    now!(),
    ", 0), (SELECT interval FROM wish)
     )
     SELECT * FROM leased
     UNION ALL
     SELECT 0, least(",
    line!(),
    " - $4::int8, CASE WHEN $5::int8 IS NOT NULL THEN ",
    believed!("bulk_at"),
    " END), ",
    now!(),
    ", greatest(",
    believed!("quiet_until"),
    " - ",
    now!(),
    ", 0), (SELECT interval FROM wish)
     FROM checkout_worker.budget AS b WHERE b.mode = $1 AND NOT EXISTS (SELECT FROM leased)"
);

/// The clock alone, asked a few times: the fastest answer tells it best.
const CLOCK: &str = concat!("SELECT ", now!());
const CLOCK_QUESTIONS: usize = 5;
/// So many microseconds pass between two readings of the clock in one statement.
const HAIR: i64 = 1_000;

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
    ", interactive_next_at = ",
    believed!("interactive_next_at"),
    ", bulk_at = ",
    believed!("bulk_at"),
    ",
         quiet_until = greatest(",
    believed!("quiet_until"),
    ", excluded.quiet_until),
         down_until = greatest(",
    believed!("down_until"),
    ", excluded.down_until), written_at = excluded.written_at"
);

/// The question alone writes nothing: every worker asks it several times a second. For how long all are quiet, and Creem
/// is taken to be down; what all have learned; and what the clock shows.
const ASK: &str = concat!(
    "SELECT greatest(",
    believed!("quiet_until"),
    " - ",
    now!(),
    ", 0), greatest(",
    believed!("down_until"),
    " - ",
    now!(),
    ", 0), r.version, r.learned, r.learned_at, ",
    now!(),
    " FROM (VALUES ($1)) AS asked (mode)
     LEFT JOIN checkout_worker.budget AS b USING (mode)
     LEFT JOIN checkout_worker.rate AS r USING (mode)"
);

/// Takes places; `lead` is how long the last answer took. Returns how long this one took as well.
pub(super) async fn lease(
    client: &Client,
    mode: Mode,
    wish: Wish,
    lead: Duration,
    reckoning: &Reckoning,
) -> Result<(Places, Duration), Error> {
    let Wish { count, lasting, least_interval, default_interval, overtakes, horizon, bulk_every } =
        wish;
    let (places, lead, mode) = (i64::from(count), micros(lead), mode.as_str());
    // A ceiling is kept to the last microsecond.
    let least = micros(least_interval + Duration::from_nanos(999));
    let (default, lasting) = (micros(default_interval), micros(lasting));
    let overtakes = micros(overtakes);
    let (horizon, every) = (horizon.map(micros), bulk_every.map(micros));
    let arguments: [Parameter<'_>; 9] = [
        (&mode, Type::TEXT),
        (&places, Type::INT8),
        (&lead, Type::INT8),
        (&horizon, Type::INT8),
        (&every, Type::INT8),
        (&least, Type::INT8),
        (&default, Type::INT8),
        (&lasting, Type::INT8),
        (&overtakes, Type::INT8),
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
        let interval = least_interval.max(default_interval);
        let none =
            Places { first: asked, count: 0, interval, waited: false, quiet: Duration::ZERO };
        return Ok((none, asked.elapsed()));
    };
    let took = asked.elapsed();
    let (count, first): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    let (now, quiet): (i64, i64) = (row.try_get(2)?, row.try_get(3)?);
    let interval = duration(row.try_get(4)?);
    reckoning.hear(now, asked);
    let waited = count == 0 || first > now + lead + HAIR;
    let first = reckoning.instant(first).unwrap_or(asked);
    let count = u32::try_from(count).unwrap_or(0);
    Ok((Places { first, count, interval, waited, quiet: duration(quiet) }, took))
}

/// Tells all what one knows; what all know together, and have learned.
pub(super) async fn share(
    client: &Client,
    mode: Mode,
    news: News,
    reckoning: &Reckoning,
) -> Result<(News, Option<Learned>), Error> {
    let (quiet, down, mode) = (micros(news.quiet), micros(news.down), mode.as_str());
    if news != News::default() {
        let arguments: [Parameter<'_>; 3] =
            [(&mode, Type::TEXT), (&quiet, Type::INT8), (&down, Type::INT8)];
        client.query_typed(SHARE, &arguments).await?;
    }
    let asked = Instant::now();
    let row = client.query_typed_one(ASK, &[(&mode, Type::TEXT)]).await?;
    reckoning.hear(row.try_get(5)?, asked);
    let news = News { quiet: duration(row.try_get(0)?), down: duration(row.try_get(1)?) };
    Ok((news, rate::learned(&row, 2, reckoning)?))
}

pub(super) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

fn duration(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}
