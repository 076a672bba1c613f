//! Whether a worker could work with the database, asked without changing anything in it.

use tokio_postgres::Client;

use super::connect::{OpenError, Options, pool, pool_error};
use super::migrate::{VERSION, applied};
use super::statements::now;
use crate::clock::Millis;

/// What a worker would find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// A ledger of its version.
    Ledger,
    /// No ledger yet, or an older one; it would make it, and may.
    ToBeMade,
}

/// What a worker does with each table, and so must be allowed to.
const RIGHTS: &str = "
    SELECT current_user::text, need.privilege, need.name
    FROM (VALUES
        ('job', 'SELECT'), ('job', 'INSERT'), ('job', 'UPDATE'), ('job', 'DELETE'),
        ('ambiguous_attempt', 'SELECT'), ('ambiguous_attempt', 'INSERT'),
        ('orphan', 'SELECT'), ('orphan', 'INSERT'),
        ('pause', 'SELECT'), ('pause', 'INSERT'), ('pause', 'DELETE'),
        ('meta', 'SELECT'), ('meta', 'INSERT'), ('meta', 'UPDATE'), ('meta', 'DELETE'),
        ('budget', 'SELECT'), ('budget', 'INSERT'), ('budget', 'UPDATE'),
        ('rate', 'SELECT'), ('rate', 'INSERT'), ('rate', 'UPDATE'),
        ('schema_step', 'SELECT')
    ) AS need (name, privilege)
    JOIN pg_namespace AS n ON n.nspname = 'checkout_worker'
    JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = need.name
    WHERE NOT has_table_privilege(c.oid, need.privilege)
    ORDER BY 3, 2";

/// Whether the schema is there and may be used, and whether what is missing may be made.
const SCHEMA: &str = "
    SELECT current_user::text, has_schema_privilege(n.oid, 'USAGE'),
           coalesce(has_schema_privilege(n.oid, 'CREATE'),
                    has_database_privilege(current_database(), 'CREATE'))
    FROM (SELECT 1) AS one LEFT JOIN pg_namespace AS n ON n.nspname = 'checkout_worker'";

/// Connects as a worker does, and asks for all that it needs.
///
/// # Errors
/// What would keep a worker from its work: see [`OpenError`].
pub async fn ready(options: &Options) -> Result<Ready, OpenError> {
    let client = pool(options)?.get().await.map_err(pool_error)?;
    durable_time(&client).await?;
    let schema = client.query_typed_one(SCHEMA, &[]).await?;
    let (user, usable): (&str, Option<bool>) = (schema.try_get(0)?, schema.try_get(1)?);
    let step = match usable {
        None => 0,
        Some(true) => {
            let missing = client.query_typed(RIGHTS, &[]).await?;
            let missing = missing
                .iter()
                .map(|row| {
                    Ok(format!("{} on {}", row.try_get::<_, &str>(1)?, row.try_get::<_, &str>(2)?))
                })
                .collect::<Result<Vec<_>, tokio_postgres::Error>>()?;
            if !missing.is_empty() {
                let missing = missing.join(", ");
                return Err(OpenError::Refused(format!(
                    "in schema checkout_worker {user:?} lacks {missing}"
                )));
            }
            applied(&client).await?
        }
        Some(false) => {
            let text = format!("{user:?} may not use the schema checkout_worker");
            return Err(OpenError::Refused(text));
        }
    };
    if step >= VERSION {
        return Ok(Ready::Ledger);
    }
    if schema.try_get(2)? {
        return Ok(Ready::ToBeMade);
    }
    Err(OpenError::Refused(format!("{user:?} may not create the schema checkout_worker")))
}

/// The database's time, if it keeps what it has committed.
pub(super) async fn durable_time(client: &Client) -> Result<Millis, OpenError> {
    const ABOUT: &str = concat!(
        "SELECT ",
        now!(),
        ", current_setting('fsync'), current_setting('full_page_writes')"
    );
    let about = client.query_typed_one(ABOUT, &[]).await?;
    for (column, name) in [(1, "fsync"), (2, "full_page_writes")] {
        if about.try_get::<_, &str>(column)? == "off" {
            return Err(OpenError::NotDurable(name));
        }
    }
    Ok(about.try_get(0)?)
}
