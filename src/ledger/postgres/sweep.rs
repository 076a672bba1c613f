//! Removing old outcomes, in batches that no job notices.

use deadpool_postgres::Object;
use tokio_postgres::types::{ToSql, Type};

use super::itself::about_itself;
use crate::clock::Millis;
use crate::ledger::retention::{Cutoffs, RETENTION, swept_name};
use crate::ledger::{CANCELLED, OwnCommand, Retention, WAS_PAUSED};

/// Rows per sweep: short enough that no job notices.
const SWEPT_AT_ONCE: i64 = 500;

/// Another replica's batch is passed over, not waited for.
const SWEEP: &str = "
    WITH old AS (
        SELECT mode, request_id FROM checkout_worker.job
        WHERE mode = $3 AND ended_at IS NOT NULL AND ended_at < $1 AND state <> 'unresolved'
        ORDER BY ended_at LIMIT $2 FOR UPDATE SKIP LOCKED
    )
    , gone AS (
        DELETE FROM checkout_worker.job AS j USING old
        WHERE j.mode = old.mode AND j.request_id = old.request_id RETURNING 1
    ), noted AS (
        INSERT INTO checkout_worker.meta AS m (name, number)
        SELECT $4, $1 WHERE EXISTS (SELECT FROM gone)
        ON CONFLICT (name) DO UPDATE SET number = greatest(m.number, excluded.number)
    )
    SELECT count(*) FROM gone";

/// Says how long this worker keeps outcomes, and removes what nobody keeps any more.
pub(super) async fn sweep(
    client: &Object,
    own: Retention,
    now: Millis,
) -> Result<usize, tokio_postgres::Error> {
    about_itself(client, &OwnCommand::Keep(own), now).await?;
    let said = client
        .query_typed(
            "SELECT name, number FROM checkout_worker.meta
             WHERE starts_with(name, $1) AND number IS NOT NULL",
            &[(&RETENTION, Type::TEXT)],
        )
        .await?;
    let said = said.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
    let cutoffs = Cutoffs::new(&said.collect::<Result<Vec<_>, tokio_postgres::Error>>()?, own, now);
    let mut gone = 0;
    for (mode, before) in cutoffs.of_modes() {
        let old: [(&(dyn ToSql + Sync), Type); 4] = [
            (&before, Type::INT8),
            (&SWEPT_AT_ONCE, Type::INT8),
            (&mode.as_str(), Type::TEXT),
            (&swept_name(mode), Type::TEXT),
        ];
        let of_mode: i64 = client.query_typed_one(SWEEP, &old).await?.try_get(0)?;
        gone += usize::try_from(of_mode).unwrap_or(0);
    }
    let before = cutoffs.of_all();
    client
        .query_typed("DELETE FROM checkout_worker.pause WHERE ended < $1", &[(&before, Type::INT8)])
        .await?;
    client
        .query_typed(
            "DELETE FROM checkout_worker.meta
             WHERE (starts_with(name, $1) OR starts_with(name, $2)) AND number < $3",
            &[(&CANCELLED, Type::TEXT), (&WAS_PAUSED, Type::TEXT), (&before, Type::INT8)],
        )
        .await?;
    for name in &cutoffs.over {
        // One that was said again meanwhile stays.
        client
            .query_typed(
                "DELETE FROM checkout_worker.meta WHERE name = $1 AND number < $2",
                &[(name, Type::TEXT), (&now, Type::INT8)],
            )
            .await?;
    }
    Ok(gone)
}
