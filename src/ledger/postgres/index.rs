//! The index by which a campaign's jobs are found. A table that is in use gets it beside the work, however
//! long that takes: nothing but the commands about campaigns is slower without it.

use std::time::Duration;

use deadpool_postgres::Pool;
use tokio_postgres::Client;

use super::connect::{OpenError, pool_error};
use super::statements::now;

/// What makes it; a table that nobody writes yet takes it at once.
pub(super) const MAKE: &str = "CREATE INDEX job_campaign ON checkout_worker.job (campaign, mode, request_id) INCLUDE (state) WHERE campaign IS NOT NULL";
/// The same beside writers. PostgreSQL does it in transactions of its own, which wait for older ones.
const MAKE_BESIDE: &str = "CREATE INDEX CONCURRENTLY IF NOT EXISTS job_campaign ON checkout_worker.job (campaign, mode, request_id) INCLUDE (state) WHERE campaign IS NOT NULL";
/// One that was not finished is kept up by every write and used by nothing.
const REMOVE_UNFINISHED: &str = "DROP INDEX CONCURRENTLY IF EXISTS checkout_worker.job_campaign";
/// Between two looks while another worker makes it, and after the first failure.
const PAUSE: Duration = Duration::from_mins(1);
/// Between two tries, however often it has failed: each reads the whole table.
const LONGEST_PAUSE: Duration = Duration::from_hours(1);

/// Of the table: whether it has parts, a usable index, an unfinished one, and whether one is being made (of which
/// table is not for another role to see).
const FOUND: &str = "
    SELECT t.relkind = 'p',
           coalesce(bool_or(i.indisvalid), false),
           coalesce(bool_or(NOT i.indisvalid), false),
           EXISTS (SELECT FROM pg_stat_progress_create_index AS p WHERE p.datname = current_database()
                   AND (p.relid = t.oid OR p.relid IS NULL))
    FROM pg_class AS t
    JOIN pg_attribute AS a ON a.attrelid = t.oid AND a.attname = 'campaign'
    LEFT JOIN pg_index AS i ON i.indrelid = t.oid AND i.indkey[0] = a.attnum
    WHERE t.oid = 'checkout_worker.job'::regclass
    GROUP BY t.oid, t.relkind";

/// Two that are made at once wait for each other, so whoever writes this row makes it, and the others look
/// again after a while.
const TAKE: &str = concat!(
    "INSERT INTO checkout_worker.meta AS m (name, number) VALUES ('indexing', ",
    now!(),
    ") ON CONFLICT (name) DO UPDATE SET number = excluded.number
       WHERE m.number NOT BETWEEN excluded.number - 60000 AND excluded.number
       RETURNING true"
);

/// How a try ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tried {
    /// It is there.
    Made,
    /// Another worker is at it.
    Elsewhere,
    /// A table in parts gets it from whoever parted it.
    Parted,
}

/// Sees to it that the index is there; ends when it is.
pub(super) async fn keep(pool: Pool) {
    let mut pause = PAUSE;
    loop {
        match make(&pool).await {
            Ok(Tried::Made) => return,
            Ok(Tried::Elsewhere) => {}
            Ok(Tried::Parted) => {
                tracing::warn!(
                    "the ledger's table is in parts and has no index on campaign: the campaign commands read all of it. docs/scaling.md says how to make one"
                );
                return;
            }
            Err(error) if !error.is_passing() => {
                tracing::warn!(
                    %error,
                    statement = MAKE_BESIDE,
                    "the ledger's index on campaign cannot be made: until it is there, the campaign commands read the whole table. As the table's owner, run the statement"
                );
                return;
            }
            Err(error) => {
                tracing::warn!(
                    %error,
                    again_in = %humantime::format_duration(pause),
                    "the ledger's index on campaign cannot be made now: until it is there, the campaign commands read the whole table"
                );
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
        tokio::time::sleep(pause).await;
    }
}

async fn make(pool: &Pool) -> Result<Tried, OpenError> {
    let client = pool.get().await.map_err(pool_error)?;
    let found = client.query_typed_one(FOUND, &[]).await?;
    let (parted, usable): (bool, bool) = (found.try_get(0)?, found.try_get(1)?);
    let (unfinished, under_way): (bool, bool) = (found.try_get(2)?, found.try_get(3)?);
    if usable {
        return Ok(Tried::Made);
    }
    if parted {
        return Ok(Tried::Parted);
    }
    if under_way || client.query_typed(TAKE, &[]).await?.is_empty() {
        return Ok(Tried::Elsewhere);
    }
    make_beside(&client, unfinished).await?;
    tracing::info!("the ledger's index on campaign is made");
    Ok(Tried::Made)
}

/// Each statement by itself: neither may be part of a transaction.
async fn make_beside(client: &Client, unfinished: bool) -> Result<(), tokio_postgres::Error> {
    if unfinished {
        client.batch_execute(REMOVE_UNFINISHED).await?;
    }
    client.batch_execute(MAKE_BESIDE).await
}
