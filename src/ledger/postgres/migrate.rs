//! The shared ledger's schema: numbered steps, each applied once, by one replica at a time.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Error, Transaction};

use super::connect::OpenError;
use super::index;

/// A step: its number, the least number that a program must know to work on what it leaves behind,
/// and its SQL. Steps only add, so that replicas of the version before go on beside it; a step that
/// must not be worked beside raises the second number.
const STEPS: [(i32, i32, &str); 3] = [
    (1, 1, include_str!("../schema/postgres_1.sql")),
    (2, 1, include_str!("../schema/postgres_2.sql")),
    (3, 1, include_str!("../schema/postgres_3.sql")),
];
/// The last step that this program knows.
pub(super) const VERSION: i32 = STEPS[STEPS.len() - 1].0;
/// Names the lock under which steps are applied: "crCW".
const LOCK: i64 = 0x6372_4357;
/// How long a step waits for a table that others hold. Whatever comes after it waits behind it, the
/// workers of the version before included: less than their patience, and then a pause for them. And longer than
/// `deadlock_timeout` (1 s), after which PostgreSQL ends an autovacuum that is in the way.
const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '3s'";
/// The pause, and as much again at most, so that replicas do not stand in line one after another.
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// Longest time for all tries.
const PATIENCE: Duration = Duration::from_secs(90);

/// Brings the schema up to date, if it is not.
pub(super) async fn migrate(client: &mut Client, secret: &[u8; 32]) -> Result<(), OpenError> {
    let began = Instant::now();
    while applied(client).await? < VERSION {
        match apply(client, secret).await {
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                if began.elapsed() >= PATIENCE {
                    return Err(OpenError::Held);
                }
                let random = f64::from(getrandom::u32().unwrap_or(0)) / f64::from(u32::MAX);
                tracing::warn!(
                    "a long transaction holds the ledger's tables (a backup?), and this version adds columns to them; trying again"
                );
                tokio::time::sleep(RETRY_PAUSE + RETRY_PAUSE.mul_f64(random)).await;
            }
            applied => applied?,
        }
    }
    Ok(())
}

/// Applies what is missing, in one transaction.
async fn apply(client: &mut Client, secret: &[u8; 32]) -> Result<(), Error> {
    let transaction = client.transaction().await?;
    // Freed with the transaction, so a pooler may sit in between.
    transaction.query_typed("SELECT pg_advisory_xact_lock($1)", &[(&LOCK, Type::INT8)]).await?;
    transaction.batch_execute(LOCK_TIMEOUT).await?;
    // Even with IF NOT EXISTS it takes the right to make schemas, which whoever was given one lacks.
    let there: bool = transaction
        .query_typed_one("SELECT to_regnamespace('checkout_worker') IS NOT NULL", &[])
        .await?
        .try_get(0)?;
    if !there {
        transaction.batch_execute("CREATE SCHEMA checkout_worker").await?;
    }
    transaction
        .batch_execute(
            "CREATE TABLE IF NOT EXISTS checkout_worker.schema_step (
                 version int PRIMARY KEY, least_reader int NOT NULL, applied_at timestamptz NOT NULL
             );",
        )
        .await?;
    // Another replica may have been faster.
    let done = version(&transaction).await?;
    for (number, least_reader, sql) in STEPS.iter().filter(|(number, ..)| *number > done) {
        transaction.batch_execute(sql).await?;
        transaction
            .query_typed(
                "INSERT INTO checkout_worker.schema_step VALUES ($1, $2, now())",
                &[(number, Type::INT4), (least_reader, Type::INT4)],
            )
            .await?;
    }
    if done == 0 {
        transaction.batch_execute(&index::make_all()).await?;
    }
    transaction
        .query_typed(
            "INSERT INTO checkout_worker.meta (name, value) VALUES ('secret', $1) ON CONFLICT DO NOTHING",
            &[(&secret.as_slice(), Type::BYTEA)],
        )
        .await?;
    transaction.commit().await
}

/// The last step that was applied, or 0.
pub(super) async fn applied(client: &Client) -> Result<i32, OpenError> {
    let there: bool = client
        .query_typed_one("SELECT to_regclass('checkout_worker.schema_step') IS NOT NULL", &[])
        .await?
        .try_get(0)?;
    if !there {
        return Ok(0);
    }
    let row = client
        .query_typed_one(
            "SELECT coalesce(max(version), 0), coalesce(max(least_reader), 0) FROM checkout_worker.schema_step",
            &[],
        )
        .await?;
    let (version, least_reader): (i32, i32) = (row.try_get(0)?, row.try_get(1)?);
    if least_reader > VERSION {
        return Err(OpenError::Newer { found: version, known: VERSION });
    }
    Ok(version)
}

async fn version(transaction: &Transaction<'_>) -> Result<i32, Error> {
    transaction
        .query_typed_one("SELECT coalesce(max(version), 0) FROM checkout_worker.schema_step", &[])
        .await?
        .try_get(0)
}
