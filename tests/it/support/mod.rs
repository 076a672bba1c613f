//! A world for a test: a real broker, a simulated Creem over real HTTP, and the real worker as a
//! process of its own.

#[expect(dead_code, reason = "chaos and benchmarks use more of it")]
pub(crate) mod amqp;
pub(crate) mod broker;
pub(crate) mod postgres;
pub(crate) mod private;
pub(crate) mod process;
pub(crate) mod raw;
pub(crate) mod relay;
pub(crate) mod tls;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use creem_checkout_worker::simulator::script::Script;
use creem_checkout_worker::simulator::{Options, Simulator};
use futures::StreamExt as _;
use lapin::message::Delivery;
use lapin::options::*;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use serde_json::Value;
use tempfile::TempDir;

pub(crate) use process::Process;

/// How long anything may take before a test calls it missing.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for something that must come.
pub(crate) async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work)
        .await
        .unwrap_or_else(|_| panic!("{what}: nothing within {PATIENCE:?}"))
}

/// Asks again until it is so; for things outside this process that send no signal.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    soon(what, async {
        while !ask().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// Starts a server for all tests of this process, and leaves somebody behind who removes it when the
/// process is gone: a test binary has no last moment of its own.
pub(crate) async fn start_shared(service: private::Service) -> Result<String, String> {
    use std::process::{Command, Stdio};

    let directory = service.directory(&format!("it-{}", std::process::id()));
    let start = move || {
        let url = service.run("start", &directory)?;
        let wait = r#"while kill -0 "$1" 2>/dev/null; do sleep 1; done; "$2" clean "$3""#;
        let spawned = Command::new("setsid")
            .args(["bash", "-c", wait, "clean-up", &std::process::id().to_string()])
            .args([service.script().as_os_str(), directory.as_os_str()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        assert!(spawned.is_ok(), "nobody to clean up after the tests: {spawned:?}");
        Ok(url)
    };
    tokio::task::spawn_blocking(start).await.unwrap()
}

pub(crate) struct World {
    pub(crate) prefix: String,
    pub(crate) simulator: Arc<Simulator>,
    pub(crate) connection: Connection,
    pub(crate) channel: Channel,
    pub(crate) directory: TempDir,
    pub(crate) settings: BTreeMap<String, String>,
    url: String,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// A reply or a parked message, read.
pub(crate) struct Got {
    pub(crate) body: Vec<u8>,
    pub(crate) json: Value,
    pub(crate) properties: BasicProperties,
}

impl Got {
    fn new(delivery: Delivery) -> Self {
        let json = serde_json::from_slice(&delivery.data).unwrap_or(Value::Null);
        Self { body: delivery.data, json, properties: delivery.properties }
    }

    pub(crate) fn text(&self, pointer: &str) -> String {
        self.json.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    pub(crate) fn status(&self) -> String {
        self.text("/status")
    }

    pub(crate) fn correlation_id(&self) -> String {
        self.properties.correlation_id().as_ref().map_or_else(String::new, ToString::to_string)
    }

    pub(crate) fn header(&self, name: &str) -> Option<String> {
        let value = self.properties.headers().as_ref()?.inner().get(name)?;
        let AMQPValue::LongString(text) = value else { return Some(format!("{value:?}")) };
        Some(String::from_utf8_lossy(text.as_bytes()).into_owned())
    }
}

impl World {
    /// A world on the shared broker, under names of its own; `None` where no broker can be had.
    pub(crate) async fn new(test: &str) -> Option<Self> {
        let url = broker::shared(test).await?;
        Some(Self::on(url, test).await)
    }

    pub(crate) async fn on(url: String, test: &str) -> Self {
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        let (simulator, serve) = Simulator::start(any, Options::default()).await.unwrap();
        let properties = ConnectionProperties::default().with_connection_name(test.into());
        let connection = soon("a connection", Connection::connect(&url, properties)).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let mut random = [0_u8; 4];
        getrandom::fill(&mut random).unwrap();
        let prefix = format!("t{:08x}.{test}", u32::from_le_bytes(random));
        let prefix = prefix[..prefix.len().min(60)].to_owned();
        Self {
            prefix,
            simulator,
            connection,
            channel,
            directory: TempDir::new().unwrap(),
            settings: BTreeMap::new(),
            url,
            serving: tokio::spawn(serve),
        }
    }

    /// Changes a setting of the workers to come.
    pub(crate) fn set(&mut self, key: &str, value: &str) -> &mut Self {
        let name = format!("CHECKOUT_WORKER__{}", key.to_uppercase().replace('.', "__"));
        self.settings.insert(name, value.to_owned());
        self
    }

    pub(crate) fn script(&self, text: &str) {
        self.simulator.set_script(Script::parse(text.as_bytes()).unwrap());
    }

    pub(crate) fn ledger(&self) -> PathBuf {
        self.directory.path().join("ledger.db")
    }

    /// The environment of the worker and of commands beside it.
    pub(crate) fn environment(&self) -> BTreeMap<String, String> {
        let mut environment: BTreeMap<String, String> = [
            ("AMQP_URL", self.url.clone()),
            ("CREEM_API_KEY", "creem_test_canary".to_owned()),
            ("CREEM_BASE_URL", self.simulator.url()),
            ("LEDGER_URL", format!("sqlite:{}", self.ledger().display())),
            ("CHECKOUT_WORKER__TOPOLOGY__PREFIX", self.prefix.clone()),
            ("CHECKOUT_WORKER__HTTP__LISTEN", "127.0.0.1:0".to_owned()),
            ("CHECKOUT_WORKER__LOG__FORMAT", "json".to_owned()),
            ("CHECKOUT_WORKER__LOG__LEVEL", "debug".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        environment.extend(self.settings.clone());
        environment
    }

    /// Starts a worker and waits until it consumes.
    pub(crate) async fn worker(&self) -> Process {
        let worker = self.worker_unready(&[]);
        soon("the worker consumes", worker.logged("consuming")).await;
        worker
    }

    /// Starts a worker.
    pub(crate) fn worker_unready(&self, arguments: &[&str]) -> Process {
        let mut all = vec!["run"];
        all.extend(arguments);
        Process::start(&all, &self.environment())
    }

    pub(crate) fn queue(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    pub(crate) async fn publish(&self, body: impl AsRef<[u8]>, properties: BasicProperties) {
        self.publish_to(&self.queue("jobs"), body, properties).await;
    }

    /// Publishes until a queue has it: one that was just declared may not have a leader yet.
    pub(crate) async fn publish_to(
        &self,
        queue: &str,
        body: impl AsRef<[u8]>,
        properties: BasicProperties,
    ) {
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        eventually("a queue takes it", || async {
            let confirm = self
                .channel
                .basic_publish("".into(), queue.into(), options, body.as_ref(), properties.clone())
                .await
                .unwrap();
            let confirmation = soon("a confirm", confirm).await.unwrap();
            confirmation.is_ack() && confirmation.take_message().is_none()
        })
        .await;
    }

    /// New connections of the test's own, after the broker was away.
    pub(crate) async fn reconnect(mut self, url: &str) -> Self {
        self.connection = amqp::connect(url).await;
        self.channel = self.connection.create_channel().await.unwrap();
        self.channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        self
    }

    /// A job with a minimal body.
    pub(crate) async fn job(&self, request_id: &str) {
        self.publish(body(request_id), persistent()).await;
    }

    /// Consumes a queue with automatic acks.
    pub(crate) async fn consume(&self, queue: &str) -> Consumer {
        let channel = self.connection.create_channel().await.unwrap();
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        channel
            .basic_consume(queue.into(), "".into(), options, FieldTable::default())
            .await
            .unwrap()
    }

    pub(crate) async fn replies(&self) -> Consumer {
        self.consume(&self.queue("replies")).await
    }

    pub(crate) async fn dead(&self) -> Consumer {
        self.consume(&self.queue("dead")).await
    }

    /// How many messages wait in a queue.
    pub(crate) async fn depth(&self, name: &str) -> u32 {
        self.look_at(name).await.message_count()
    }

    /// How many consumers a queue has.
    pub(crate) async fn consumers(&self, name: &str) -> u32 {
        self.look_at(name).await.consumer_count()
    }

    async fn look_at(&self, name: &str) -> lapin::Queue {
        let channel = self.connection.create_channel().await.unwrap();
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::durable() };
        let name = self.queue(name);
        channel.queue_declare(name.as_str().into(), options, FieldTable::default()).await.unwrap()
    }

    pub(crate) fn sessions(&self) -> usize {
        self.simulator.log().sessions().len()
    }

    pub(crate) fn posts(&self) -> usize {
        self.simulator.log().posts().len()
    }
}

/// The next message of a consumer.
pub(crate) async fn next(consumer: &mut Consumer) -> Got {
    Got::new(soon("a message", consumer.next()).await.expect("the consumer lives").unwrap())
}

pub(crate) fn body(request_id: &str) -> String {
    format!(r#"{{"request_id":"{request_id}","product_id":"prod_1"}}"#)
}

pub(crate) fn persistent() -> BasicProperties {
    BasicProperties::default().with_delivery_mode(2)
}

pub(crate) fn header(name: &str, value: &str) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert(name.into(), AMQPValue::LongString(value.into()));
    persistent().with_headers(headers)
}
