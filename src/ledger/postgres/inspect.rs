//! A look into a shared ledger beside running workers; nothing is written.

use deadpool_postgres::Pool;
use tokio_postgres::types::Type;

use super::connect::{OpenError, Options, pool_error, pool_to_read};
use super::itself::paused_lanes;
use super::{ask, statements};
use crate::job::{Key, Mode, RequestId};
use crate::ledger::{KnownOrphan, LedgerError, PausedLane, Report, Row};

/// Rows that a check reads at a time.
const PAGE: i64 = 2_000;

/// An open shared ledger.
pub struct Inspector {
    pool: Pool,
}

impl std::fmt::Debug for Inspector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inspector").finish_non_exhaustive()
    }
}

impl Inspector {
    /// Connects, and makes sure that there is a ledger.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(options: &Options) -> Result<Self, OpenError> {
        let pool = pool_to_read(options)?;
        let client = pool.get().await.map_err(pool_error)?;
        let there: bool = client
            .query_typed_one("SELECT to_regclass('checkout_worker.job') IS NOT NULL", &[])
            .await?
            .try_get(0)?;
        drop(client);
        if there { Ok(Self { pool }) } else { Err(OpenError::Missing) }
    }

    /// Reads one job's row.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn row(&self, key: &Key) -> Result<Option<Row>, LedgerError> {
        let (_, mut found) =
            ask(&self.pool, async |client| statements::read(client, &[key]).await).await?;
        found.pop().map_or(Ok(None), |found| found.map(|versioned| versioned.row))
    }

    /// The lanes that an operator has paused.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn paused_lanes(&self) -> Result<Vec<PausedLane>, LedgerError> {
        ask(&self.pool, async |client| paused_lanes(client).await).await
    }

    /// The sessions nobody was given for one job.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn orphans(&self, key: &Key) -> Result<Vec<KnownOrphan>, LedgerError> {
        const ORPHANS: &str = "SELECT checkout_id, reason, found_at FROM checkout_worker.orphan
             WHERE mode = $1 AND request_id = $2 ORDER BY found_at, checkout_id";
        let (mode, id) = (key.mode.as_str(), key.request_id.as_str());
        ask(&self.pool, async |client| {
            let rows =
                client.query_typed(ORPHANS, &[(&mode, Type::TEXT), (&id, Type::TEXT)]).await?;
            rows.iter()
                .map(|row| {
                    Ok(KnownOrphan {
                        checkout_id: row.try_get(0)?,
                        reason: row.try_get(1)?,
                        found_at: row.try_get(2)?,
                    })
                })
                .collect()
        })
        .await
    }

    /// Reads and verifies every row, page by page in the order of the keys.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn report(&self) -> Result<Report, LedgerError> {
        let mut report = Report::default();
        let mut last = (String::new(), String::new());
        loop {
            let page = ask(&self.pool, async |client| keys_after(client, &last).await).await?;
            let Some(end) = page.last().cloned() else { break };
            let keys: Vec<Key> = page.iter().filter_map(|key| job_key(key, &mut report)).collect();
            let keys: Vec<&Key> = keys.iter().collect();
            let (_, found) =
                ask(&self.pool, async |client| statements::read(client, &keys).await).await?;
            for found in found {
                // A row that was swept in between is none.
                if let Some(row) = found.map(|versioned| versioned.row).transpose() {
                    report.note(row);
                }
            }
            last = end;
        }
        let about_all = ask(&self.pool, async |client| {
            const ABOUT_ALL: &str = "SELECT (SELECT count(*) FROM checkout_worker.orphan),
                        (SELECT number FROM checkout_worker.meta WHERE name = 'restored')";
            let row = client.query_typed_one(ABOUT_ALL, &[]).await?;
            Ok((row.try_get::<_, i64>(0)?, row.try_get(1)?))
        });
        match about_all.await {
            Ok((orphans, restored)) => {
                report.orphan_sessions = orphans.cast_unsigned();
                report.restored = restored;
            }
            Err(error) => report.damage.push(format!("orphan sessions: {error}")),
        }
        Ok(report)
    }
}

async fn keys_after(
    client: &tokio_postgres::Client,
    last: &(String, String),
) -> Result<Vec<(String, String)>, tokio_postgres::Error> {
    const KEYS: &str = "SELECT mode, request_id FROM checkout_worker.job
         WHERE (mode, request_id) > ($1, $2) ORDER BY mode, request_id LIMIT $3";
    let rows = client
        .query_typed(KEYS, &[(&last.0, Type::TEXT), (&last.1, Type::TEXT), (&PAGE, Type::INT8)])
        .await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

fn job_key((mode, id): &(String, String), report: &mut Report) -> Option<Key> {
    let key = Mode::parse(mode).zip(RequestId::parse(id).ok());
    if key.is_none() {
        report.note(Err(LedgerError::DamagedRow("a row's key is not a job's".to_owned())));
    }
    key.map(|(mode, request_id)| Key { mode, request_id })
}
