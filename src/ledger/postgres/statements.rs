//! The statements on the hot path. Each is one round trip and one transaction of its own: nothing
//! is held between two of them, so a pooler may give each to another server connection.

use tokio_postgres::types::Type;
use tokio_postgres::{Client, Error};

use crate::clock::Millis;
use crate::job::Key;
use crate::ledger::LedgerError;
use crate::ledger::row::{Columns, Row};
use crate::ledger::transition::Orphan;

/// Milliseconds since 1970 on the database's clock.
macro_rules! now {
    () => {
        "(extract(epoch from clock_timestamp()) * 1000)::int8"
    };
}

/// A column that makes its transaction durable where somebody has switched that off for the session.
macro_rules! durable {
    () => {
        "CASE current_setting('synchronous_commit')
             WHEN 'off' THEN set_config('synchronous_commit', 'on', true) END"
    };
}
pub(super) use {durable, now};

const READ: &str = concat!(
    "SELECT ",
    now!(),
    ", k.at, j.version, j.state, j.updated_at, j.ended_at, j.ambiguous, j.body, j.sum
     FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS k (mode, request_id, at)
     LEFT JOIN checkout_worker.job AS j ON j.mode = k.mode AND j.request_id = k.request_id"
);

/// Rows are written in the order of their keys, so that two workers' batches cannot deadlock, and
/// only over the version that was read.
const WRITE: &str = concat!(
    "WITH written AS (
         INSERT INTO checkout_worker.job AS j
             (mode, request_id, state, version, updated_at, ended_at, ambiguous, body, sum, prior,
              campaign)
         SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::int8[], $5::int8[], $6::int8[],
                              $7::int4[], $8::bytea[], $9::bytea[], $19::bytea[], $21::text[])
         ORDER BY 1, 2
         ON CONFLICT (mode, request_id) DO UPDATE SET
             state = excluded.state, version = excluded.version, updated_at = excluded.updated_at,
             ended_at = excluded.ended_at, ambiguous = excluded.ambiguous, body = excluded.body,
             sum = excluded.sum, prior = excluded.prior, campaign = excluded.campaign
         WHERE j.version = excluded.version - 1 AND j.sum = excluded.prior
         RETURNING j.mode, j.request_id
     ), counted AS (
         INSERT INTO checkout_worker.ambiguous_attempt
             (mode, request_id, number, created_at, found_at)
         SELECT a.mode, a.request_id, a.number, a.created_at, $13
         FROM unnest($10::text[], $11::text[], $12::int8[], $20::int8[])
             AS a (mode, request_id, number, created_at)
         JOIN written AS w ON w.mode = a.mode AND w.request_id = a.request_id
         ON CONFLICT DO NOTHING
     ), orphaned AS (
         INSERT INTO checkout_worker.orphan (mode, request_id, checkout_id, fence, reason, found_at)
         SELECT DISTINCT ON (1, 2, 3) o.mode, o.request_id, o.checkout_id, o.fence, o.reason, $13
         FROM unnest($14::text[], $15::text[], $16::text[], $17::int8[], $18::text[])
             AS o (mode, request_id, checkout_id, fence, reason)
         ORDER BY 1, 2, 3
         ON CONFLICT DO NOTHING
     )
     SELECT ",
    now!(),
    ", w.mode, w.request_id, ",
    durable!(),
    " FROM (SELECT 1) AS one LEFT JOIN written AS w ON true"
);

/// A row as it was read: with the version that a write must find.
#[derive(Debug, Clone)]
pub(super) struct Versioned {
    pub(super) row: Option<Row>,
    /// 0 where there is no row.
    pub(super) version: i64,
    /// The checksum of the row, empty where there is none.
    pub(super) sum: Vec<u8>,
}

/// What became of reading one key.
pub(super) type Found = Result<Versioned, LedgerError>;

/// Reads rows; in the order of the keys. The time comes with them.
pub(super) async fn read(client: &Client, keys: &[&Key]) -> Result<(Millis, Vec<Found>), Error> {
    let modes: Vec<&str> = keys.iter().map(|key| key.mode.as_str()).collect();
    let ids: Vec<&str> = keys.iter().map(|key| key.request_id.as_str()).collect();
    let rows =
        client.query_typed(READ, &[(&modes, Type::TEXT_ARRAY), (&ids, Type::TEXT_ARRAY)]).await?;
    let mut now = 0;
    let absent = || Ok(Versioned { row: None, version: 0, sum: Vec::new() });
    let mut found: Vec<Found> = keys.iter().map(|_| absent()).collect();
    for row in &rows {
        now = row.try_get(0)?;
        let at: i64 = row.try_get(1)?;
        let Some(index) = usize::try_from(at - 1).ok().filter(|index| *index < keys.len()) else {
            continue;
        };
        if let Some(version) = row.try_get(2)? {
            found[index] = decode(row, version, keys[index])?;
        }
    }
    Ok((now, found))
}

fn decode(row: &tokio_postgres::Row, version: i64, key: &Key) -> Result<Found, Error> {
    let (state, body, sum): (&str, &[u8], &[u8]) =
        (row.try_get(3)?, row.try_get(7)?, row.try_get(8)?);
    let ambiguous: i32 = row.try_get(6)?;
    let columns = Columns {
        state,
        updated_at: row.try_get(4)?,
        ended_at: row.try_get(5)?,
        ambiguous: ambiguous.cast_unsigned(),
        body,
    };
    let damaged = |what: &str| LedgerError::DamagedRow(format!("the row of {key} {what}"));
    if sum != columns.checksum(key.mode.as_str(), key.request_id.as_str()) {
        return Ok(Err(damaged("does not match its checksum")));
    }
    Ok(match Row::decode(&columns) {
        Ok(row) => Ok(Versioned { row: Some(row), version, sum: sum.to_vec() }),
        Err(what) => Err(damaged(&format!("has {what}"))),
    })
}

/// A row to be written over the one that was read.
#[derive(Debug)]
pub(super) struct Change<'a> {
    key: &'a Key,
    read: (i64, &'a [u8]),
    row: &'a Row,
    body: Vec<u8>,
    sum: [u8; 8],
}

impl<'a> Change<'a> {
    /// `version` and `prior` are what was read: the version and the checksum.
    pub(super) fn new(key: &'a Key, version: i64, prior: &'a [u8], row: &'a Row) -> Self {
        let body = row.encode();
        let sum = row.columns(&body).checksum(key.mode.as_str(), key.request_id.as_str());
        Self { key, read: (version, prior), row, body, sum }
    }

    /// The new row's checksum.
    pub(super) const fn sum(&self) -> [u8; 8] {
        self.sum
    }
}

/// What one statement writes.
#[derive(Debug, Default)]
pub(super) struct Changes<'a> {
    /// Sorted by key, each key once.
    pub(super) rows: Vec<Change<'a>>,
    /// Attempts that became ambiguous by a write above: key, the how manieth of the row, and when the row
    /// was made.
    pub(super) ambiguous: Vec<(&'a Key, u32, i64)>,
    /// Sessions nobody was given.
    pub(super) orphans: Vec<(&'a Key, &'a Orphan)>,
}

/// Arrays for `unnest`, one a column.
struct Arrays<'a> {
    modes: Vec<&'a str>,
    ids: Vec<&'a str>,
}

impl<'a> Arrays<'a> {
    fn of(keys: impl Iterator<Item = &'a Key> + Clone) -> Self {
        Self {
            modes: keys.clone().map(|key| key.mode.as_str()).collect(),
            ids: keys.map(|key| key.request_id.as_str()).collect(),
        }
    }
}

/// Writes; returns the time and the keys whose row was still the one that was read.
pub(super) async fn write(
    client: &Client,
    changes: &Changes<'_>,
    now: Millis,
) -> Result<(Millis, Vec<(String, String)>), Error> {
    let rows = &changes.rows;
    let keys = Arrays::of(rows.iter().map(|change| change.key));
    let states: Vec<&str> = rows.iter().map(|change| change.row.state.as_str()).collect();
    let versions: Vec<i64> = rows.iter().map(|change| change.read.0 + 1).collect();
    let updated: Vec<i64> = rows.iter().map(|change| change.row.updated_at).collect();
    let ended: Vec<Option<i64>> = rows.iter().map(|change| change.row.ended_at).collect();
    let ambiguous: Vec<i32> =
        rows.iter().map(|change| change.row.ambiguous.cast_signed()).collect();
    let bodies: Vec<&[u8]> = rows.iter().map(|change| change.body.as_slice()).collect();
    let sums: Vec<&[u8]> = rows.iter().map(|change| change.sum.as_slice()).collect();
    let priors: Vec<&[u8]> = rows.iter().map(|change| change.read.1).collect();
    let campaigns: Vec<Option<&str>> =
        rows.iter().map(|change| change.row.campaign.as_deref()).collect();
    let lost = Arrays::of(changes.ambiguous.iter().map(|(key, ..)| *key));
    let fences: Vec<i64> =
        changes.ambiguous.iter().map(|(_, number, _)| i64::from(*number)).collect();
    let created: Vec<i64> = changes.ambiguous.iter().map(|(.., created_at)| *created_at).collect();
    let orphans = Arrays::of(changes.orphans.iter().map(|(key, _)| *key));
    let sessions: Vec<&str> =
        changes.orphans.iter().map(|(_, orphan)| orphan.checkout_id.as_str()).collect();
    let makers: Vec<i64> =
        changes.orphans.iter().map(|(_, orphan)| orphan.fence.cast_signed()).collect();
    let reasons: Vec<&str> =
        changes.orphans.iter().map(|(_, orphan)| orphan.reason.as_str()).collect();
    let answers = client
        .query_typed(
            WRITE,
            &[
                (&keys.modes, Type::TEXT_ARRAY),
                (&keys.ids, Type::TEXT_ARRAY),
                (&states, Type::TEXT_ARRAY),
                (&versions, Type::INT8_ARRAY),
                (&updated, Type::INT8_ARRAY),
                (&ended, Type::INT8_ARRAY),
                (&ambiguous, Type::INT4_ARRAY),
                (&bodies, Type::BYTEA_ARRAY),
                (&sums, Type::BYTEA_ARRAY),
                (&lost.modes, Type::TEXT_ARRAY),
                (&lost.ids, Type::TEXT_ARRAY),
                (&fences, Type::INT8_ARRAY),
                (&now, Type::INT8),
                (&orphans.modes, Type::TEXT_ARRAY),
                (&orphans.ids, Type::TEXT_ARRAY),
                (&sessions, Type::TEXT_ARRAY),
                (&makers, Type::INT8_ARRAY),
                (&reasons, Type::TEXT_ARRAY),
                (&priors, Type::BYTEA_ARRAY),
                (&created, Type::INT8_ARRAY),
                (&campaigns, Type::TEXT_ARRAY),
            ],
        )
        .await?;
    let mut time = 0;
    let mut written = Vec::with_capacity(answers.len());
    for row in &answers {
        time = row.try_get(0)?;
        if let (Some(mode), Some(id)) = (row.try_get(1)?, row.try_get(2)?) {
            written.push((mode, id));
        }
    }
    Ok((time, written))
}
