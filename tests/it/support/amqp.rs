//! The broker as tests, chaos and benchmarks reach it: patient, but not for ever. A broker sends no
//! signal when it comes or when a queue does, so it is asked again and again.

use std::time::Duration;

use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};

/// How long a broker may be away, or a queue missing, before something is wrong.
const PATIENCE: Duration = Duration::from_secs(90);

/// A connection, as soon as there is a broker to connect to.
pub(crate) async fn connect(url: &str) -> Connection {
    const HANDSHAKE: Duration = Duration::from_secs(5);
    let connected = tokio::time::timeout(PATIENCE, async {
        loop {
            for url in each_host(url) {
                // A broker that is just starting may take a connection and never answer.
                let connect = Connection::connect(&url, ConnectionProperties::default());
                if let Ok(Ok(connection)) = tokio::time::timeout(HANDSHAKE, connect).await {
                    return connection;
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    connected.await.unwrap_or_else(|_| panic!("no broker within {PATIENCE:?}"))
}

/// A URL for each of the hosts in one.
fn each_host(url: &str) -> Vec<String> {
    let (before, rest) = url.rsplit_once('@').unwrap();
    let (hosts, vhost) = rest.split_once('/').unwrap();
    hosts.split(',').map(|host| format!("{before}@{host}/{vhost}")).collect()
}

/// Waits until a worker has declared the last of its queues. Only then may anything be published:
/// lapin gives returned messages to the wrong publishes, so a job that no queue took could be
/// taken for a confirmed one in a test as well.
pub(crate) async fn declared(connection: &Connection, prefix: &str) {
    let last = format!("{prefix}.retry.bulk.10m");
    let declared = tokio::time::timeout(PATIENCE, async {
        loop {
            if let Ok(channel) = connection.create_channel().await {
                let passive =
                    QueueDeclareOptions { passive: true, ..QueueDeclareOptions::durable() };
                let asked = channel
                    .queue_declare(last.as_str().into(), passive, FieldTable::default())
                    .await;
                if asked.is_ok() {
                    return;
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    declared.await.unwrap_or_else(|_| panic!("no worker has declared {last} within {PATIENCE:?}"));
}
