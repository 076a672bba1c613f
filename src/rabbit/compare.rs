//! What is on the broker, compared with what should be; no job is touched, and what is made to try a right goes
//! at once.

use std::collections::BTreeSet;
use std::time::Duration;

use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Confirmation, Connection, ExchangeKind};

use super::link::{LinkError, refusal, short};
use super::topology::{Topology, differs, durable, exclusive};
use crate::job::Lane;

/// How long the broker may take over a message that is only to show that one may be published.
const PROBE: Duration = Duration::from_secs(10);

/// How a broker differs from a [`Topology`].
#[derive(Debug, Clone, Default)]
pub struct Differences {
    /// What is not there.
    pub missing: Vec<String>,
    /// What is there and not as it should be, or may not be looked at; a sentence each.
    pub wrong: Vec<String>,
}

impl Differences {
    /// Sorts a broker's "no" to a question after something.
    fn note(&mut self, what: String, error: lapin::Error) -> Result<(), LinkError> {
        match refusal(&error) {
            None => return Err(error.into()),
            Some(AMQPSoftError::NOTFOUND) => self.missing.push(what),
            // It may be there.
            Some(_) => self.wrong.push(format!("{what}: {error}")),
        }
        Ok(())
    }
}

impl Topology {
    /// Compares what is on the broker with what should be, without making anything: queues and
    /// exchanges are compared with their arguments and kinds if `declare` says that the worker may.
    /// With `publish` it is tried whether this user may publish, with a message to each exchange that no
    /// queue should take. Bindings cannot be asked for in AMQP.
    ///
    /// # Errors
    /// If the broker cannot be asked.
    pub async fn compare(
        &self,
        connection: &Connection,
        declare: bool,
        publish: bool,
    ) -> Result<Differences, LinkError> {
        let mut found = Differences::default();
        for queue in self.queues() {
            // A failed passive declare closes its channel, so each has its own.
            let channel = connection.create_channel().await?;
            let options = QueueDeclareOptions { passive: true, ..durable() };
            match channel.queue_declare(short(&queue.name)?, options, FieldTable::default()).await {
                Ok(_) if declare => {
                    // Of a queue that is there this changes nothing, and the broker compares.
                    let name = queue.name;
                    let declared = channel.queue_declare(short(&name)?, durable(), queue.arguments);
                    match declared.await {
                        Ok(_) => try_binding(connection, self, &name, &mut found).await?,
                        Err(error) => found.wrong.push(differs(&name, &error).to_string()),
                    }
                }
                Ok(_) => {}
                Err(error) => found.note(format!("queue {}", queue.name), error)?,
            }
        }
        for lane in Lane::ALL {
            try_reading(connection, &self.jobs(lane), &mut found).await?;
        }
        for exchange in self.exchanges() {
            let channel = connection.create_channel().await?;
            let asked = ExchangeDeclareOptions {
                passive: true,
                durable: true,
                auto_delete: false,
                internal: false,
                nowait: false,
            };
            let name = short(&exchange)?;
            let direct = |options| {
                let kind = ExchangeKind::Direct;
                channel.exchange_declare(name.clone(), kind, options, FieldTable::default())
            };
            match direct(asked).await {
                Ok(()) => {}
                Err(error) => {
                    found.note(format!("exchange {exchange}"), error)?;
                    continue;
                }
            }
            // Of an exchange that is there this changes nothing, and the broker compares the kind.
            if declare
                && let Err(error) = direct(ExchangeDeclareOptions { passive: false, ..asked }).await
            {
                found.wrong.push(differs(&exchange, &error).to_string());
            } else if publish {
                try_publishing(connection, &exchange, &mut found).await?;
            }
        }
        if declare && !found.missing.is_empty() {
            self.try_declaring(connection, &mut found).await?;
        }
        if publish && self.replies_exchange.is_empty() {
            try_publishing(connection, "", &mut found).await?;
        }
        Ok(found)
    }

    /// Makes a queue of a random name under the prefix, which goes with the connection: what is missing can
    /// only be declared by a user who may do that.
    async fn try_declaring(
        &self,
        connection: &Connection,
        found: &mut Differences,
    ) -> Result<(), LinkError> {
        let name = format!("{}.check.{:016x}", self.jobs(Lane::Interactive), random());
        let channel = connection.create_channel().await?;
        match channel.queue_declare(short(&name)?, exclusive(), FieldTable::default()).await {
            Ok(_) => {}
            Err(error) if refusal(&error).is_some() => found.wrong.push(format!(
                "{} is not there, and this user may declare nothing under its name ({error}); give it configure, or import the definitions and set topology.declare = false",
                found.missing.join(", ")
            )),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// How many messages wait in a queue, or `None` if it is not there.
    ///
    /// # Errors
    /// If the broker cannot be asked.
    pub async fn depth(connection: &Connection, queue: &str) -> Result<Option<u32>, LinkError> {
        let channel = connection.create_channel().await?;
        let options = QueueDeclareOptions { passive: true, ..durable() };
        match channel.queue_declare(short(queue)?, options, FieldTable::default()).await {
            Ok(state) => Ok(Some(state.message_count())),
            Err(error) if refusal(&error).is_some() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Takes away bindings that nobody has made, which changes nothing: it needs the rights that making them
/// does, write on the queue and read on the exchange.
async fn try_binding(
    connection: &Connection,
    topology: &Topology,
    queue: &str,
    found: &mut Differences,
) -> Result<(), LinkError> {
    let bindings = topology.bindings().into_iter().filter(|(bound, ..)| bound == queue);
    let exchanges: BTreeSet<String> = bindings.map(|(_, exchange, _)| exchange).collect();
    for exchange in exchanges {
        let channel = connection.create_channel().await?;
        let key = short(&format!("checkout-worker.check.{:016x}", random()))?;
        let (name, from) = (short(queue)?, short(&exchange)?);
        let unbound = channel.queue_unbind(name, from, key, FieldTable::default()).await;
        match unbound {
            Err(error) if refusal(&error) == Some(AMQPSoftError::ACCESSREFUSED) => {
                found.wrong.push(format!(
                    "binding {queue} to {exchange}: {error}; give this user write on the queue and read on the exchange, or set topology.declare = false"
                ));
            }
            // An exchange that is missing is noted as such.
            Ok(()) => {}
            Err(error) if refusal(&error).is_some() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Declares the queue by which a worker with an embedded ledger keeps others out, if nobody else has it, and
/// deletes it again: a worker that starts in that moment waits. Says what is wrong, if this user may not.
///
/// # Errors
/// If the broker cannot be asked.
pub async fn try_keeping_out(
    connection: &Connection,
    topology: &Topology,
) -> Result<Option<String>, LinkError> {
    let guard = topology.guard();
    let channel = connection.create_channel().await?;
    let judge = |error: lapin::Error| match refusal(&error) {
        None => Err(error.into()),
        Some(AMQPSoftError::ACCESSREFUSED) => {
            Ok(Some(format!("{error}; {}", may_keep_out(&guard))))
        }
        // Workers have it.
        Some(_) => Ok(None),
    };
    let declared = channel.queue_declare(short(&guard)?, exclusive(), FieldTable::default()).await;
    if let Err(error) = declared {
        return judge(error);
    }
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let arguments = FieldTable::default();
    if let Err(error) = channel.basic_consume(short(&guard)?, "".into(), options, arguments).await {
        return judge(error);
    }
    channel.queue_delete(short(&guard)?, QueueDeleteOptions::default()).await?;
    Ok(None)
}

/// What to do where the broker forbids it.
pub(super) fn may_keep_out(guard: &str) -> String {
    let guard = guard.replace('.', "\\.");
    format!(
        "a worker with an embedded ledger keeps others out by a queue of its own: give this user configure and read on ^{guard}$, or give it a postgres:// ledger"
    )
}

fn random() -> u64 {
    // Only a name that nobody else has; without randomness any other is as good.
    getrandom::u64().unwrap_or(0)
}

/// Asks for messages with an argument that no broker takes: whether this user may read is judged before
/// that, so the answer tells, and no message is touched.
async fn try_reading(
    connection: &Connection,
    queue: &str,
    found: &mut Differences,
) -> Result<(), LinkError> {
    let channel = connection.create_channel().await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-priority".into(), AMQPValue::LongString("none".into()));
    let options = BasicConsumeOptions::default();
    match channel.basic_consume(short(queue)?, "".into(), options, arguments).await {
        // A broker that does not look at that argument; nothing of what it sends is taken.
        Ok(_) => {}
        Err(error) => match refusal(&error) {
            None => return Err(error.into()),
            Some(AMQPSoftError::ACCESSREFUSED) => {
                found.wrong.push(format!("queue {queue}: {error}; give this user read on it"));
            }
            // For the argument, or for want of the queue, which has been noted.
            Some(_) => {}
        },
    }
    Ok(())
}

/// Publishes a message that no queue should take, and that none keeps: the broker returns it, or says
/// that this user may not.
async fn try_publishing(
    connection: &Connection,
    exchange: &str,
    found: &mut Differences,
) -> Result<(), LinkError> {
    let name = if exchange.is_empty() { "the default exchange" } else { exchange };
    let key = short(&format!("checkout-worker.check.{:016x}", random()))?;
    let exchange = short(exchange)?;
    let sent = async {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions { nowait: false }).await?;
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let properties = lapin::BasicProperties::default()
            .with_expiration("0".into())
            .with_type("checkout-worker check".into());
        channel.basic_publish(exchange, key, options, b"?", properties).await?.await
    };
    match tokio::time::timeout(PROBE, sent).await {
        Ok(Ok(Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_)))) => {}
        Ok(Ok(_)) => found.wrong.push(format!(
            "{name} routes what no queue was bound for: give a direct exchange without an alternate one"
        )),
        Ok(Err(error)) if refusal(&error).is_some() => {
            found.wrong.push(format!("publishing to {name}: {error}; give this user write on it"));
        }
        Ok(Err(error)) => return Err(error.into()),
        Err(_) => {
            return Err(LinkError::Broken(
                "the broker confirms nothing: is there a memory or disk alarm?".to_owned(),
            ));
        }
    }
    Ok(())
}
