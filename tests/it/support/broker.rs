//! The broker: the one at `TEST_AMQP_URL`, RabbitMQ 4 in a container where `TEST_BROKER=container`
//! asks for it, and otherwise Debian's as a private process.

use std::process::Command;
use std::sync::OnceLock;

use testcontainers::core::{IntoContainerPort as _, WaitFor};
use testcontainers::runners::AsyncRunner as _;
use testcontainers::{ContainerAsync, GenericImage};
use tokio::sync::OnceCell;

use super::private::{BROKER, Private};

/// The image that scripts/rabbitmq-image makes.
const IMAGE: (&str, &str) = ("checkout-worker/rabbitmq", "4.3");

/// The broker that most tests share; `None`, and the reason aloud, where none can be had.
pub(crate) async fn shared(test: &str) -> Option<String> {
    static URL: OnceCell<Result<String, String>> = OnceCell::const_new();
    let url = URL
        .get_or_init(|| async {
            if let Ok(url) = std::env::var("TEST_AMQP_URL") {
                return Ok(url);
            }
            if std::env::var("TEST_BROKER").as_deref() == Ok("container") {
                return in_container().await;
            }
            super::start_shared(BROKER).await
        })
        .await;
    BROKER.skipped(test, url.clone())
}

async fn in_container() -> Result<String, String> {
    static CONTAINER: OnceLock<ContainerAsync<GenericImage>> = OnceLock::new();
    let container = container().await?;
    let port = container.get_host_port_ipv4(5672).await.map_err(|error| error.to_string())?;
    // Kept until the test binary ends; `make test` removes it by its label.
    CONTAINER.set(container).map_err(|_| "started twice".to_owned())?;
    Ok(format!("amqp://guest:guest@127.0.0.1:{port}/%2f"))
}

/// A RabbitMQ 4 of its own.
pub(crate) async fn container() -> Result<ContainerAsync<GenericImage>, String> {
    use testcontainers::ImageExt as _;
    GenericImage::new(IMAGE.0, IMAGE.1)
        .with_exposed_port(5672.tcp())
        .with_wait_for(WaitFor::message_on_stdout("Server startup complete"))
        .with_label("checkout-worker.test", "1")
        .start()
        .await
        .map_err(|error| format!("no container: {error}"))
}

/// Asks the administrator's tool of a private broker.
pub(crate) async fn ctl(broker: &Private, arguments: &[&str]) {
    let mut command = Command::new(BROKER.script());
    command.arg("ctl").arg(&broker.directory).args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
