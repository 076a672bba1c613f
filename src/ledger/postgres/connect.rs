//! The way to the database: URL, TLS, the pool, and what its errors mean.

use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime, Timeouts};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use secrecy::{ExposeSecret as _, SecretString};
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{BATCHES, STATEMENT};
use crate::job::success_url::is_loopback_name;
use crate::ledger::LedgerError;

/// One connection per batch, one for the budget, one for what is told of Creem, and one for everything else; an index
/// that is made once in a ledger's life takes one of them meanwhile.
const CONNECTIONS: usize = BATCHES + 3;
/// For a TCP connection to one address.
const CONNECT: Duration = Duration::from_secs(3);
/// For TLS, the login and the first question.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// How to reach the database.
#[derive(Debug, Clone)]
pub struct Options {
    /// `postgres://user:password@host[:port][,host[:port]…]/database[?sslmode=…]`
    pub url: SecretString,
    /// Further root certificates, PEM.
    pub ca_pem: Option<Vec<u8>>,
}

impl Options {
    /// Checks them without connecting.
    ///
    /// # Errors
    /// [`OpenError::Options`].
    pub fn check(&self) -> Result<(), OpenError> {
        pool(self).map(|_| ())
    }

    /// The URL without user and password.
    #[must_use]
    pub fn shown(&self) -> String {
        let url = self.url.expose_secret();
        let Some(config) =
            url.parse::<tokio_postgres::Config>().ok().filter(|_| !has_a_stray_at(url))
        else {
            return "postgres://".to_owned();
        };
        let ports = config.get_ports();
        let place = |(at, host): (usize, &Host)| {
            let port = ports.get(at).or(ports.first()).copied().unwrap_or(5432);
            match host {
                Host::Tcp(name) => format!("{name}:{port}"),
                Host::Unix(path) => path.display().to_string(),
            }
        };
        let hosts: Vec<String> = config.get_hosts().iter().enumerate().map(place).collect();
        format!("postgres://{}/{}", hosts.join(","), config.get_dbname().unwrap_or_default())
    }
}

/// Why the database was not opened. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is not there now, or takes no writes; that may pass.
    #[error(
        "the ledger's database cannot be used now: {0}; check that it runs and takes writes, and the host in ledger.url"
    )]
    Unreachable(String),
    /// Its tables are held by a transaction that takes long.
    #[error(
        "the ledger's tables are held by a long transaction, and this version adds columns to them: wait for it (a backup?), or find it with SELECT pid, xact_start, query FROM pg_stat_activity WHERE xact_start < now() - interval '1 minute'. Workers of the version before go on meanwhile"
    )]
    Held,
    /// It says no.
    #[error(
        "the ledger's database refuses: {0}; check user, password and database in ledger.url, and that the user may create a schema (once) and write to checkout_worker.*"
    )]
    Refused(String),
    /// The URL or the certificates are not usable.
    #[error("ledger.url is not usable: {0}")]
    Options(String),
    /// A newer program needs its schema.
    #[error(
        "the ledger's schema is at step {found}, which this version (it knows {known}) must not work on: run the newer version"
    )]
    Newer {
        /// The step that was found.
        found: i32,
        /// The last step that is known.
        known: i32,
    },
    /// A commit would not be durable.
    #[error(
        "the ledger's database runs with {0} = off: a crash could forget links that were handed out; switch it on"
    )]
    NotDurable(&'static str),
    /// There is no ledger in it yet.
    #[error("there is no ledger in the database yet: check ledger.url, or start the worker once")]
    Missing,
    /// What it knows of itself is damaged.
    #[error("the ledger is damaged: {0}; restore it from a backup")]
    Damaged(&'static str),
}

impl OpenError {
    /// Whether it may go by itself.
    #[must_use]
    pub const fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Held)
    }
}

impl From<tokio_postgres::Error> for OpenError {
    fn from(error: tokio_postgres::Error) -> Self {
        let text = describe(&error);
        match error.code() {
            // Neither is mended by waiting.
            None if text.contains("invalid configuration") => {
                Self::Refused(format!("{text} (ledger.url gives none)"))
            }
            None if text.contains("does not support TLS") => Self::Refused(format!(
                "{text}: switch it on there, or end ledger.url in ?sslmode=disable where the way is safe"
            )),
            None => Self::Unreachable(text),
            Some(code) if passes(code) => Self::Unreachable(text),
            Some(_) => Self::Refused(text),
        }
    }
}

/// Connections to the database that can be written.
pub(super) fn pool(options: &Options) -> Result<Pool, OpenError> {
    pool_to(options, TargetSessionAttrs::ReadWrite)
}

/// Connections to any of the databases, for whoever only looks.
pub(super) fn pool_to_read(options: &Options) -> Result<Pool, OpenError> {
    pool_to(options, TargetSessionAttrs::Any)
}

fn pool_to(options: &Options, sessions: TargetSessionAttrs) -> Result<Pool, OpenError> {
    let unusable = |error: String| OpenError::Options(error);
    let mut config: tokio_postgres::Config = options
        .url
        .expose_secret()
        .parse()
        .map_err(|error: tokio_postgres::Error| unusable(describe(&error)))?;
    if has_a_stray_at(options.url.expose_secret()) {
        return Err(unusable("there is an @ too many: write one in a password as %40".to_owned()));
    }
    config
        .application_name("checkout-worker")
        .connect_timeout(CONNECT)
        // Of several hosts, the one that can be written, wherever a failover has put it.
        .target_session_attrs(sessions)
        .tcp_user_timeout(STATEMENT)
        .keepalives_idle(Duration::from_secs(10));
    if !config.get_hostaddrs().is_empty() {
        let text = "hostaddr is not used here: give the address as the host";
        return Err(unusable(text.to_owned()));
    }
    if config.get_ssl_mode() == SslMode::Prefer && !config.get_hosts().iter().all(is_local) {
        // "Prefer" would fall back to clear text, and with it the password and all jobs' ids.
        config.ssl_mode(SslMode::Require);
    }
    let hosts = u32::try_from(config.get_hosts().len().max(1)).unwrap_or(1);
    // A name may have two addresses.
    let create = CONNECT * 2 * hosts + HANDSHAKE;
    let manager = Manager::from_config(
        config,
        tls(options.ca_pem.as_deref()).map_err(unusable)?,
        ManagerConfig { recycling_method: RecyclingMethod::Fast },
    );
    Pool::builder(manager)
        .max_size(CONNECTIONS)
        .runtime(Runtime::Tokio1)
        .timeouts(Timeouts {
            wait: Some(STATEMENT),
            create: Some(create),
            recycle: Some(HANDSHAKE),
        })
        .build()
        .map_err(|error| unusable(error.to_string()))
}

/// Whether what should be the password goes on behind an `@` or a `/`, so that a part of it is taken for a host.
fn has_a_stray_at(url: &str) -> bool {
    let behind_the_scheme = url.split_once("://").map_or(url, |(_, rest)| rest);
    let place = behind_the_scheme.split('?').next().unwrap_or_default();
    let (authority, path) = place.split_once('/').unwrap_or((place, ""));
    authority.matches('@').count() > 1 || path.contains('@')
}

fn is_local(host: &Host) -> bool {
    match host {
        Host::Tcp(name) => is_loopback_name(name),
        Host::Unix(_) => true,
    }
}

/// TLS, where it is spoken, is always verified: against the system's roots and those given.
fn tls(ca_pem: Option<&[u8]>) -> Result<MakeRustlsConnect, String> {
    let mut roots = RootCertStore::empty();
    if let Some(pem) = ca_pem {
        let certificates = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| format!("ledger.ca_file: {error}"))?;
        if certificates.is_empty() {
            return Err("ledger.ca_file holds no certificate".to_owned());
        }
        for certificate in certificates {
            roots.add(certificate).map_err(|error| format!("ledger.ca_file: {error}"))?;
        }
    }
    // A machine without roots of its own still reaches a database whose authority is given.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let config =
        rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    Ok(MakeRustlsConnect::new(config))
}

#[expect(clippy::wildcard_enum_match_arm, reason = "a foreign enum: the rest is one case")]
pub(super) fn pool_error(error: deadpool_postgres::PoolError) -> OpenError {
    match error {
        deadpool_postgres::PoolError::Backend(error) => error.into(),
        error => OpenError::Unreachable(error.to_string()),
    }
}

/// What a pool's error comes down to.
pub(super) fn describe_pool(error: &deadpool_postgres::PoolError) -> String {
    if let deadpool_postgres::PoolError::Backend(error) = error {
        return describe(error);
    }
    error.to_string()
}

/// An error with its cause; neither holds a value of a row, and the database's detail, which may,
/// is left out.
pub(super) fn describe(error: &tokio_postgres::Error) -> String {
    if let Some(database) = error.as_db_error() {
        return format!("{} ({})", database.message(), database.code().code());
    }
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Whether a refusal of the database passes by itself: it starts, stops, fails over, or is full.
fn passes(code: &SqlState) -> bool {
    // Classes: connection, resources, operator intervention, system error, transaction rollback.
    ["08", "53", "57", "58", "40"].iter().any(|class| code.code().starts_with(class))
        || *code == SqlState::READ_ONLY_SQL_TRANSACTION
        || *code == SqlState::LOCK_NOT_AVAILABLE
}

/// Sorts the database's errors into "later" and "never".
pub(super) fn unavailable(error: &tokio_postgres::Error) -> LedgerError {
    let text = describe(error);
    match error.code() {
        Some(code) if code.code().starts_with("XX") && code.code() != "XX000" => {
            LedgerError::Damaged(text)
        }
        Some(_) | None => LedgerError::Unavailable(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_of_the_url_holds_no_part_of_the_password() {
        let show = |url: &str| Options { url: url.to_owned().into(), ca_pem: None }.shown();
        for (url, shown) in [
            ("postgres://u:secret@one,two:5433/shop", "postgres://one:5432,two:5433/shop"),
            ("postgres://u:secret@one/shop?sslmode=require", "postgres://one:5432/shop"),
            ("postgres://one/shop?user=u&password=secret", "postgres://one:5432/shop"),
            ("nonsense:secret", "postgres://"),
            ("postgres://u:sec@ret@one/shop", "postgres://"),
        ] {
            assert_eq!(show(url), shown, "{url}");
        }
        assert!(has_a_stray_at("postgres://u:sec/ret@one/shop"));
        assert!(!has_a_stray_at("postgres://one/shop?user=u&password=a@b"));
        assert!(!has_a_stray_at("postgres://u:p@one/shop"));
        // Not escaped as they should be.
        for url in ["postgres://u:sec?ret@one/shop", "postgres://u:sec#ret@one/shop"] {
            let text = show(url);
            assert!(!text.contains("sec") && !text.contains("ret"), "{text}");
        }
    }
}
