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
    let connected = tokio::time::timeout(PATIENCE, async {
        loop {
            match Connection::connect(url, ConnectionProperties::default()).await {
                Ok(connection) => return connection,
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    });
    connected.await.unwrap_or_else(|_| panic!("no broker within {PATIENCE:?}"))
}

/// Waits until a worker has declared the last of its queues. Only then may anything be published:
/// lapin gives returned messages to the wrong publishes, so a job that no queue took could be
/// taken for a confirmed one in a test as well.
pub(crate) async fn declared(connection: &Connection, prefix: &str) {
    let last = format!("{prefix}.retry.bulk.10m");
    let declared = tokio::time::timeout(PATIENCE, async {
        loop {
            let channel = connection.create_channel().await.unwrap();
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::durable() };
            let asked =
                channel.queue_declare(last.as_str().into(), passive, FieldTable::default()).await;
            if asked.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    declared.await.unwrap_or_else(|_| panic!("no worker has declared {last} within {PATIENCE:?}"));
}
