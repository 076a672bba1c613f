//! PostgreSQL: the one at `TEST_POSTGRES_URL`, else Debian's as a private process.

use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::OnceCell;
use tokio_postgres::NoTls;

use super::private::{POSTGRES, Private};

/// The server that most tests share; `None`, and the reason aloud, where none can be had.
pub(crate) async fn shared(test: &str) -> Option<String> {
    static URL: OnceCell<Result<String, String>> = OnceCell::const_new();
    let url = URL
        .get_or_init(|| async {
            match std::env::var("TEST_POSTGRES_URL") {
                Ok(url) => Ok(url),
                Err(_) => super::start_shared(POSTGRES).await,
            }
        })
        .await;
    POSTGRES.skipped(test, url.clone())
}

/// The same server behind a PgBouncer in transaction mode, with two connections for everybody.
pub(crate) async fn pooled(test: &str) -> Option<String> {
    static URL: OnceCell<Result<String, String>> = OnceCell::const_new();
    if std::env::var("TEST_POSTGRES_URL").is_ok() {
        eprintln!("skipped: {test} needs a PgBouncer, which is put before a PostgreSQL of our own");
        return None;
    }
    shared(test).await?;
    let start = || {
        let directory = POSTGRES.directory(&format!("it-{}", std::process::id()));
        POSTGRES.run("pooler", &directory)
    };
    let url = URL.get_or_init(|| async { tokio::task::spawn_blocking(start).await.unwrap() }).await;
    POSTGRES.skipped(test, url.clone())
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

/// A server that speaks TLS with that certificate and key, PEM.
pub(crate) async fn with_tls(test: &str, certificate: &str, key: &str) -> Option<Private> {
    let server = POSTGRES.start(test).await?;
    let client = administrator(&server).await;
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
        let row = administrator(&server).await.query_one("SHOW ssl", &[]).await.unwrap();
        row.get::<_, &str>(0) == "on"
    })
    .await;
    Some(server)
}

/// A connection in the clear.
pub(crate) async fn administrator(server: &Private) -> tokio_postgres::Client {
    connect(&format!("{}?sslmode=disable", server.url)).await
}
