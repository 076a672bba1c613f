//! What the ledger knows of itself: its secret, who serves with it, when somebody last did.

use deadpool_postgres::Object;
use tokio_postgres::types::{ToSql, Type};

use super::connect::OpenError;
use super::statements::durable;
use super::{ADOPTION, HOUSEKEEPING};
use crate::clock::{Millis, as_millis};
use crate::job::{LedgerSecret, Mode};
use crate::ledger::retention::{SWEPT_OF_ALL, swept_name};
use crate::ledger::transition::{Forgotten, Swept};
use crate::ledger::{
    Adoption, CANCELLED, Identity, Orders, OwnCommand, PAUSED, SKEW, SKEW_AT, Standing, WAS_PAUSED,
    pause_name, was_paused_prefix,
};

/// What all workers have recorded, and what holds for all.
#[derive(Debug, Clone, Copy)]
pub(super) struct Totals {
    pub(super) ambiguous_attempts: u64,
    pub(super) orphan_sessions: u64,
    pub(super) forgotten: Forgotten,
}

/// Leaves a sign of life, and reads what all workers have recorded.
pub(super) async fn totals(client: &Object, now: Millis) -> Result<Totals, tokio_postgres::Error> {
    let row = client
        .query_typed_one(
            "WITH alive AS (
                 INSERT INTO checkout_worker.meta AS m (name, number) VALUES ('alive', $1)
                 ON CONFLICT (name) DO UPDATE SET number = greatest(m.number, excluded.number)
             )
             SELECT (SELECT count(*) FROM checkout_worker.ambiguous_attempt),
                    (SELECT count(*) FROM checkout_worker.orphan),
                    (SELECT number FROM checkout_worker.meta WHERE name = 'restored'),
                    (SELECT max(number) FROM checkout_worker.meta WHERE name IN ($2, $3)),
                    (SELECT max(number) FROM checkout_worker.meta WHERE name IN ($2, $4))",
            &[
                (&now, Type::INT8),
                (&SWEPT_OF_ALL, Type::TEXT),
                (&swept_name(Mode::Test), Type::TEXT),
                (&swept_name(Mode::Live), Type::TEXT),
            ],
        )
        .await?;
    let (ambiguous, orphans): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    Ok(Totals {
        ambiguous_attempts: ambiguous.cast_unsigned(),
        orphan_sessions: orphans.cast_unsigned(),
        forgotten: Forgotten {
            restored: row.try_get(2)?,
            swept: Swept { test: row.try_get(3)?, live: row.try_get(4)? },
        },
    })
}

/// A value for `$1`, `$2`, … with its type.
type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

/// Something is so from then on.
const SET: &str = concat!(
    "INSERT INTO checkout_worker.meta (name, number) VALUES ($1, $2)
     ON CONFLICT (name) DO UPDATE SET number = excluded.number RETURNING ",
    durable!()
);
/// What was told before is not taken back by an earlier time.
const SET_LATEST: &str = concat!(
    "INSERT INTO checkout_worker.meta AS m (name, number) VALUES ($1, $2)
     ON CONFLICT (name) DO UPDATE SET number = greatest(m.number, excluded.number) RETURNING ",
    durable!()
);
/// It stays as it was.
const SET_FIRST: &str = concat!(
    "INSERT INTO checkout_worker.meta (name, number) VALUES ($1, $2)
     ON CONFLICT (name) DO NOTHING RETURNING ",
    durable!()
);
const FORGET: &str =
    concat!("DELETE FROM checkout_worker.meta WHERE name = $1 RETURNING ", durable!());
/// What was so since then is so no more, and is kept as what was.
const RESUME: &str = concat!(
    "WITH over AS (DELETE FROM checkout_worker.meta WHERE name = $1 RETURNING number)
     INSERT INTO checkout_worker.meta (name, number)
     SELECT $2 || number, $3 FROM over WHERE number < $3
     ON CONFLICT (name) DO UPDATE SET number = excluded.number RETURNING ",
    durable!()
);
/// Who refuses does so for all: a job that nobody took before must not adopt it afterwards.
const ADOPT: &str = concat!(
    "INSERT INTO checkout_worker.meta (name, number)
     SELECT 'adopted', $1 WHERE NOT EXISTS
         (SELECT FROM checkout_worker.meta WHERE name = 'refused')
     ON CONFLICT (name) DO NOTHING RETURNING ",
    durable!()
);
const PAUSE: &str = concat!(
    "INSERT INTO checkout_worker.pause VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING ",
    durable!()
);
/// What workers write is tried without a change: a right may be missing that jobs need.
const TRIED: [&str; 3] = [
    "INSERT INTO checkout_worker.job SELECT * FROM checkout_worker.job WHERE false",
    "UPDATE checkout_worker.job SET version = version WHERE false",
    "UPDATE checkout_worker.budget SET next_at = next_at WHERE false",
];

/// Carries out what is about no job.
pub(super) async fn about_itself(
    client: &Object,
    command: &OwnCommand,
    now: Millis,
) -> Result<(), tokio_postgres::Error> {
    let write = async |sql: &str, parameters: &[Parameter<'_>]| {
        client.query_typed(sql, parameters).await.map(|_| ())
    };
    let set = async |sql: &str, name: &str, number: Millis| {
        write(sql, &[(&name, Type::TEXT), (&number, Type::INT8)]).await
    };
    match command {
        OwnCommand::Pause { from, to } => {
            write(PAUSE, &[(from, Type::INT8), (to, Type::INT8)]).await
        }
        OwnCommand::Keep(retention) => set(SET, &retention.name(), now).await,
        OwnCommand::Probe => {
            for same in TRIED {
                write(same, &[]).await?;
            }
            set(SET, "probed", now).await
        }
        OwnCommand::Restored { until } => set(SET_LATEST, "restored", *until).await,
        OwnCommand::PauseLane(lane) => set(SET_FIRST, pause_name(*lane), now).await,
        OwnCommand::ResumeLane(lane) => {
            let (paused, past) = (pause_name(*lane), was_paused_prefix(*lane));
            write(RESUME, &[(&paused, Type::TEXT), (&past, Type::TEXT), (&now, Type::INT8)]).await
        }
        OwnCommand::Skew { ahead } => {
            set(SET, SKEW, *ahead).await?;
            set(SET, SKEW_AT, now).await
        }
        OwnCommand::CancelCampaign { campaign, before } => {
            set(SET_LATEST, &format!("{CANCELLED}{campaign}"), *before).await
        }
        OwnCommand::ReinstateCampaign { campaign } => {
            write(FORGET, &[(&format!("{CANCELLED}{campaign}"), Type::TEXT)]).await
        }
        OwnCommand::Adopt(Adoption::Adopted) => write(ADOPT, &[(&now, Type::INT8)]).await,
        OwnCommand::Adopt(Adoption::Refused) => set(SET, "refused", now).await,
        OwnCommand::Adopt(Adoption::Accepted) => {
            write(FORGET, &[(&"refused", Type::TEXT)]).await?;
            // As if long ago: for no worker is it a new one any more.
            set(SET, "adopted", 0).await
        }
    }
}

/// What operators have told it.
pub(super) async fn orders(client: &Object) -> Result<Orders, tokio_postgres::Error> {
    let rows = client
        .query_typed(
            "SELECT name, number FROM checkout_worker.meta
             WHERE starts_with(name, $1) OR starts_with(name, $2) OR starts_with(name, $3) OR name IN ($4, $5)",
            &[
                (&PAUSED, Type::TEXT),
                (&WAS_PAUSED, Type::TEXT),
                (&CANCELLED, Type::TEXT),
                (&SKEW, Type::TEXT),
                (&SKEW_AT, Type::TEXT),
            ],
        )
        .await?;
    let mut orders = Orders::default();
    for row in &rows {
        let (name, number): (&str, Option<Millis>) = (row.try_get(0)?, row.try_get(1)?);
        orders.note(name, number.unwrap_or(0));
    }
    Ok(orders)
}

/// Whether the ledger is a new one, or a worker has refused it.
pub(super) async fn standing(
    client: &Object,
    now: Millis,
) -> Result<Standing, tokio_postgres::Error> {
    let row = client
        .query_typed_one(
            "SELECT (SELECT number FROM checkout_worker.meta WHERE name = 'adopted'),
                    EXISTS (SELECT FROM checkout_worker.meta WHERE name = 'refused')",
            &[],
        )
        .await?;
    let adopted: Option<Millis> = row.try_get(0)?;
    Ok(if row.try_get(1)? {
        Standing::Refused
    } else if adopted.is_none_or(|adopted| now.saturating_sub(adopted) < ADOPTION) {
        Standing::New
    } else {
        Standing::Established
    })
}

/// Reads what the ledger knows of itself.
pub(super) async fn identity(client: &Object, now: Millis) -> Result<Identity, OpenError> {
    let row = client
        .query_typed_one(
            "SELECT (SELECT value FROM checkout_worker.meta WHERE name = 'secret'),
                    (SELECT number FROM checkout_worker.meta WHERE name = 'alive')",
            &[],
        )
        .await?;
    let secret: Option<&[u8]> = row.try_get(0)?;
    let secret = secret.and_then(|secret| secret.try_into().ok());
    let secret =
        secret.map(LedgerSecret::new).ok_or(OpenError::Damaged("its secret is missing"))?;
    let alive: Option<Millis> = row.try_get(1)?;
    if let Some(alive) = alive.filter(|alive| now - alive > 3 * as_millis(HOUSEKEEPING)) {
        // No worker ran: that time counts against nobody.
        about_itself(client, &OwnCommand::Pause { from: alive, to: now }, now).await?;
    }
    let pauses = client
        .query_typed(
            "SELECT started, ended FROM checkout_worker.pause ORDER BY ended DESC LIMIT 512",
            &[],
        )
        .await?;
    let pauses = pauses
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect::<Result<_, tokio_postgres::Error>>()?;
    let Totals { ambiguous_attempts, orphan_sessions, forgotten } = totals(client, now).await?;
    let standing = standing(client, now).await?;
    Ok(Identity {
        secret,
        standing,
        ambiguous_attempts,
        orphan_sessions,
        pauses,
        restored: forgotten.restored,
    })
}
