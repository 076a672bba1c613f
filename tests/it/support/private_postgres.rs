//! Debian's PostgreSQL as a private process, through scripts/postgres.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::OnceCell;
use tokio_postgres::NoTls;

use super::clean_up_after;
use super::private_broker::root;

fn script() -> PathBuf {
    root().join("scripts/postgres")
}

/// Runs a verb of the script.
pub(crate) fn run(verb: &str, directory: &Path) -> Result<String, String> {
    let output = Command::new(script())
        .arg(verb)
        .arg(directory)
        .output()
        .map_err(|error| format!("scripts/postgres cannot be run: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

/// The URL, or nothing and the reason aloud; with `CI` set, a server must be had.
fn skipped(test: &str, url: Result<String, String>) -> Option<String> {
    match url {
        Ok(url) => Some(url),
        Err(why) => {
            assert!(std::env::var("CI").is_err(), "{test} needs PostgreSQL: {why}");
            eprintln!("skipped: {test} needs PostgreSQL ({why}); `make test` sets one up");
            None
        }
    }
}

/// The server that most tests share: the one at `TEST_POSTGRES_URL`, else a private one.
pub(crate) async fn shared(test: &str) -> Option<String> {
    static URL: OnceCell<Result<String, String>> = OnceCell::const_new();
    let url = URL
        .get_or_init(|| async {
            if let Ok(url) = std::env::var("TEST_POSTGRES_URL") {
                return Ok(url);
            }
            let name = format!("test-postgres-it-{}", std::process::id());
            let directory = root().join("target").join(name);
            tokio::task::spawn_blocking(move || {
                let url = run("start", &directory)?;
                clean_up_after(&script(), &directory);
                Ok(url)
            })
            .await
            .unwrap()
        })
        .await;
    skipped(test, url.clone())
}

/// A connection of the test's own.
pub(crate) async fn connect(url: &str) -> tokio_postgres::Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// A new database on the server; its URL.
pub(crate) async fn database(server: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("t{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    connect(server).await.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
    let (before, _) = server.rsplit_once('/').unwrap();
    format!("{before}/{name}")
}

/// A private server that a test may stop, kill and start again.
pub(crate) struct Private {
    directory: PathBuf,
    pub(crate) url: String,
}

impl Private {
    pub(crate) async fn start(test: &str) -> Option<Self> {
        let directory = root().join("target").join(format!("test-postgres-{test}"));
        let at = directory.clone();
        let url = tokio::task::spawn_blocking(move || run("start", &at)).await.unwrap();
        skipped(test, url).map(|url| Self { directory, url })
    }

    /// One that speaks TLS with that certificate and key, PEM.
    pub(crate) async fn with_tls(test: &str, certificate: &str, key: &str) -> Option<Self> {
        let server = Self::start(test).await?;
        let client = server.administrator().await;
        let directory: String = client.query_one("SHOW data_directory", &[]).await.unwrap().get(0);
        // The server's user must own its key; it writes both itself.
        for (name, text) in [("server.crt", certificate), ("server.key", key)] {
            let write = format!(
                "COPY (SELECT unnest(string_to_array($pem${text}$pem$, E'\\n'))) TO PROGRAM 'umask 077; cat > {directory}/{name}'"
            );
            client.batch_execute(&write).await.unwrap();
        }
        client.batch_execute("ALTER SYSTEM SET ssl = on").await.unwrap();
        client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        super::eventually("it speaks TLS", || async {
            let row = server.administrator().await.query_one("SHOW ssl", &[]).await.unwrap();
            row.get::<_, &str>(0) == "on"
        })
        .await;
        Some(server)
    }

    /// A connection in the clear.
    pub(crate) async fn administrator(&self) -> tokio_postgres::Client {
        connect(&format!("{}?sslmode=disable", self.url)).await
    }

    /// `stop`, `kill`, `start`.
    pub(crate) async fn act(&self, verb: &'static str) {
        let at = self.directory.clone();
        tokio::task::spawn_blocking(move || run(verb, &at)).await.unwrap().unwrap();
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        drop(run("clean", &self.directory));
    }
}
