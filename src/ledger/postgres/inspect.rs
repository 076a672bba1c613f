//! A look into a shared ledger beside running workers; nothing is written.

use std::collections::BTreeMap;

use deadpool_postgres::Pool;
use tokio_postgres::types::{ToSql, Type};

use super::connect::{OpenError, Options, pool_error, pool_to_read};
use super::itself::orders;
use super::{ask, statements};
use crate::job::{Key, Mode, RequestId};
use crate::ledger::{Campaign, KnownOrphan, LedgerError, Orders, Report, Row};

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

    /// What operators have told it.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn orders(&self) -> Result<Orders, LedgerError> {
        ask(&self.pool, async |client| orders(client).await).await
    }

    /// The campaigns of its jobs, by name; of all, or of one.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn campaigns(
        &self,
        name: Option<&str>,
    ) -> Result<BTreeMap<String, Campaign>, LedgerError> {
        const CAMPAIGNS: &str = "SELECT campaign, state, count(*), min(updated_at), max(updated_at)
             FROM checkout_worker.job
             WHERE campaign IS NOT NULL AND ($1::text IS NULL OR campaign = $1) GROUP BY 1, 2";
        let rows = ask(&self.pool, async |client| {
            client.query_typed(CAMPAIGNS, &[(&name, Type::TEXT)]).await
        })
        .await?;
        let mut campaigns: BTreeMap<String, Campaign> = BTreeMap::new();
        let mut note = |row: &tokio_postgres::Row| {
            let jobs: i64 = row.try_get(2)?;
            let campaign = campaigns.entry(row.try_get(0)?).or_default();
            campaign.note(row.try_get(1)?, jobs.cast_unsigned(), row.try_get(3)?, row.try_get(4)?);
            Ok::<_, tokio_postgres::Error>(())
        };
        match rows.iter().try_for_each(&mut note) {
            Ok(()) => Ok(campaigns),
            Err(error) => Err(super::unavailable(&error)),
        }
    }

    /// Visits the jobs of a campaign in the order of their ids; a damaged one comes as an error.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn jobs_of(
        &self,
        campaign: &str,
        mut visit: impl FnMut(Result<(Key, Row), LedgerError>),
    ) -> Result<(), LedgerError> {
        let mut last = (String::new(), String::new());
        loop {
            let of = Some(campaign);
            let page = ask(&self.pool, async |client| keys_after(client, &last, of).await).await?;
            let Some(end) = page.last().cloned() else { return Ok(()) };
            let (keys, strange): (Vec<_>, Vec<_>) =
                page.iter().map(job_key).partition(Result::is_ok);
            strange.into_iter().filter_map(Result::err).for_each(|error| visit(Err(error)));
            let keys: Vec<Key> = keys.into_iter().filter_map(Result::ok).collect();
            let asked: Vec<&Key> = keys.iter().collect();
            let (_, found) =
                ask(&self.pool, async |client| statements::read(client, &asked).await).await?;
            for (key, found) in keys.into_iter().zip(found) {
                // A row that was swept in between is none.
                if let Some(row) = found.map(|versioned| versioned.row).transpose() {
                    visit(row.map(|row| (key, row)));
                }
            }
            last = end;
        }
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
            let page =
                ask(&self.pool, async |client| keys_after(client, &last, None).await).await?;
            let Some(end) = page.last().cloned() else { break };
            let mut keys: Vec<Key> = Vec::with_capacity(page.len());
            for key in &page {
                match job_key(key) {
                    Ok(key) => keys.push(key),
                    Err(error) => report.note(Err(error)),
                }
            }
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
    campaign: Option<&str>,
) -> Result<Vec<(String, String)>, tokio_postgres::Error> {
    const KEYS: &str = "SELECT mode, request_id FROM checkout_worker.job
         WHERE (mode, request_id) > ($1, $2) AND ($4::text IS NULL OR campaign = $4)
         ORDER BY mode, request_id LIMIT $3";
    let parameters: [(&(dyn ToSql + Sync), Type); 4] = [
        (&last.0, Type::TEXT),
        (&last.1, Type::TEXT),
        (&PAGE, Type::INT8),
        (&campaign, Type::TEXT),
    ];
    let rows = client.query_typed(KEYS, &parameters).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

fn job_key((mode, id): &(String, String)) -> Result<Key, LedgerError> {
    let strange = || LedgerError::DamagedRow("a row's key is not a job's".to_owned());
    let (mode, request_id) =
        Mode::parse(mode).zip(RequestId::parse(id).ok()).ok_or_else(strange)?;
    Ok(Key { mode, request_id })
}
