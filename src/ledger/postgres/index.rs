//! The indexes that came after the table. A table that is in use gets them beside the work, however long that
//! takes: what is slower without them is no job.

use std::time::Duration;

use deadpool_postgres::Pool;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::connect::{OpenError, pool_error};
use super::statements::now;

/// An index of the table `job`.
struct Index {
    name: &'static str,
    /// The columns that it begins with; one that begins with them will do.
    columns: &'static [&'static str],
    /// What comes behind its name.
    definition: &'static str,
    /// What is slower without it.
    without: &'static str,
    /// The one that it replaces.
    replaces: Option<&'static str>,
}

const INDEXES: [Index; 2] = [
    Index {
        name: "job_campaign",
        columns: &["campaign"],
        definition: "ON checkout_worker.job (campaign, mode, request_id) INCLUDE (state) WHERE campaign IS NOT NULL",
        without: "the campaign commands read the whole table",
        replaces: None,
    },
    Index {
        name: "job_mode_ended",
        columns: &["mode", "ended_at"],
        definition: "ON checkout_worker.job (mode, ended_at) WHERE ended_at IS NOT NULL",
        without: "removing old outcomes reads past those that are kept",
        replaces: Some("job_ended"),
    },
];

/// Between two looks while another worker makes one, and after the first failure.
const PAUSE: Duration = Duration::from_mins(1);
/// Between two tries, however often it has failed: each reads the whole table.
const LONGEST_PAUSE: Duration = Duration::from_hours(1);

/// Of the table: whether it is partitioned, has a usable index with these columns first, an invalid one, and whether
/// one is being made (of which table is not for another role to see).
const FOUND: &str = "
    SELECT t.relkind = 'p',
           coalesce(bool_or(i.indisvalid), false),
           coalesce(bool_or(NOT i.indisvalid), false),
           EXISTS (SELECT FROM pg_stat_progress_create_index AS p WHERE p.datname = current_database()
                   AND (p.relid = t.oid OR p.relid IS NULL))
    FROM pg_class AS t
    LEFT JOIN pg_index AS i ON i.indrelid = t.oid AND $1 = (
        SELECT array_agg(a.attname::text ORDER BY key.place)
        FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS key (number, place)
        JOIN pg_attribute AS a ON a.attrelid = t.oid AND a.attnum = key.number
        WHERE key.place <= cardinality($1))
    WHERE t.oid = 'checkout_worker.job'::regclass
    GROUP BY t.oid, t.relkind";

/// Two that are made at once wait for each other, so whoever writes this row makes one, and the others look
/// again after a while.
const TAKE: &str = concat!(
    "INSERT INTO checkout_worker.meta AS m (name, number) VALUES ('indexing', ",
    now!(),
    ") ON CONFLICT (name) DO UPDATE SET number = excluded.number
       WHERE m.number NOT BETWEEN excluded.number - 60000 AND excluded.number
       RETURNING true"
);
/// The next one may be made.
const GIVE: &str = "DELETE FROM checkout_worker.meta WHERE name = 'indexing'";

/// How a try ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tried {
    /// It is there.
    Made,
    /// Another worker is at it.
    Elsewhere,
    /// A partitioned table gets it from whoever partitioned it.
    Partitioned,
    /// One of its name is there, and is another one.
    Taken,
    /// It is there, and the one that it replaces is, too, for whoever owns the table to drop.
    Beside(&'static str),
}

/// What makes all of them for a table that nobody writes yet.
pub(super) fn make_all() -> String {
    let statements = INDEXES.iter().map(|Index { name, definition, replaces, .. }| {
        let old =
            replaces.map_or(String::new(), |old| format!("DROP INDEX checkout_worker.{old};"));
        format!("CREATE INDEX {name} {definition};{old}")
    });
    statements.collect()
}

/// Sees to it that the indexes are there; ends when they are. One that cannot be made now holds up no other.
pub(super) async fn keep(pool: Pool) {
    let mut left: Vec<&Index> = INDEXES.iter().collect();
    let mut pause = PAUSE;
    loop {
        let (mut again, mut failed) = (Vec::new(), false);
        for index in left {
            match index.make(&pool).await {
                Ok(Tried::Made) => {}
                Ok(Tried::Elsewhere) => again.push(index),
                Ok(Tried::Partitioned) => tracing::warn!(
                    "the ledger's table is partitioned and has no index like {}: {}. docs/scaling.md says how to make one",
                    index.name,
                    index.without
                ),
                Ok(Tried::Taken) => tracing::warn!(
                    statement = drop_beside(index.name),
                    "the ledger's table has an index {} of other columns: until it has the right one, {}. As the table's owner, run the statement; the worker makes it at its next start",
                    index.name,
                    index.without
                ),
                Ok(Tried::Beside(old)) => tracing::warn!(
                    statement = drop_beside(old),
                    "the ledger's index {old} is of no use any more, and every write keeps it up. As the table's owner, run the statement"
                ),
                Err(error) if error.is_passing() => {
                    index.tell_failure(&error, pause);
                    failed = true;
                    again.push(index);
                }
                Err(error) => index.tell_refusal(&error),
            }
        }
        if again.is_empty() {
            return;
        }
        left = again;
        tokio::time::sleep(pause).await;
        pause = if failed { (pause * 2).min(LONGEST_PAUSE) } else { PAUSE };
    }
}

impl Index {
    fn tell_failure(&self, error: &OpenError, pause: Duration) {
        tracing::warn!(
            %error,
            again_in = %humantime::format_duration(pause),
            "the ledger's index {} cannot be made now: until it is there, {}",
            self.name,
            self.without
        );
    }

    fn tell_refusal(&self, error: &OpenError) {
        let drop_old = self.replaces.map_or(String::new(), |old| format!("; {}", drop_beside(old)));
        tracing::warn!(
            %error,
            statement = format!("{}{drop_old}", self.make_beside()),
            "the ledger's index {} cannot be made: until it is there, {}. As the table's owner, run the statement, and if there are two, one after the other",
            self.name,
            self.without
        );
    }

    /// Whether the table is partitioned, and an index is usable, invalid, or being made.
    async fn found(&self, client: &Client) -> Result<[bool; 4], tokio_postgres::Error> {
        let row = client.query_typed_one(FOUND, &[(&self.columns, Type::TEXT_ARRAY)]).await?;
        Ok([row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?])
    }

    async fn make(&self, pool: &Pool) -> Result<Tried, OpenError> {
        let client = pool.get().await.map_err(pool_error)?;
        let [partitioned, usable, invalid, under_way] = self.found(&client).await?;
        if !usable {
            if partitioned {
                return Ok(Tried::Partitioned);
            }
            if under_way || client.query_typed(TAKE, &[]).await?.is_empty() {
                return Ok(Tried::Elsewhere);
            }
            // Each statement by itself: none may be part of a transaction.
            let made = async {
                if invalid {
                    // One that was not finished is kept up by every write and used by nothing.
                    client.batch_execute(&drop_beside(self.name)).await?;
                }
                client.batch_execute(&self.make_beside()).await
            };
            let made = made.await;
            client.batch_execute(GIVE).await?;
            made?;
            if !matches!(self.found(&client).await?, [_, true, ..]) {
                return Ok(Tried::Taken);
            }
            tracing::info!("the ledger's index {} is made", self.name);
        }
        if let Some(old) = self.replaces {
            let there = "SELECT to_regclass('checkout_worker.' || $1) IS NOT NULL";
            let there = client.query_typed_one(there, &[(&old, Type::TEXT)]).await?;
            if !partitioned && there.try_get(0)? {
                match client.batch_execute(&drop_beside(old)).await.map_err(OpenError::from) {
                    Err(error) if !error.is_passing() => return Ok(Tried::Beside(old)),
                    dropped => dropped?,
                }
            }
        }
        Ok(Tried::Made)
    }

    /// What makes it beside writers. PostgreSQL does it in transactions of its own, which wait for older ones.
    fn make_beside(&self) -> String {
        format!("CREATE INDEX CONCURRENTLY IF NOT EXISTS {} {}", self.name, self.definition)
    }
}

fn drop_beside(name: &str) -> String {
    format!("DROP INDEX CONCURRENTLY IF EXISTS checkout_worker.{name}")
}
