//! What `deploy/` says is what the program does: the broker's definitions and the least rights are tried
//! on a real broker, and the rendered manifests are held against the program's defaults.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Connection, ConnectionProperties, Consumer};
use serde_json::Value;

use crate::support::broker::ctl;
use crate::support::postgres::{database, shared};
use crate::support::private::{BROKER, Private, root};
use crate::support::{World, body, next, persistent, soon};

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// Queues, exchanges and bindings as lines that can be compared, whoever wrote them down.
fn from_definitions(definitions: &Value, vhost: &str) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    let of = |kind: &str| {
        let all = definitions[kind].as_array().unwrap().clone();
        all.into_iter().filter(|one| one["vhost"] == vhost)
    };
    for queue in of("queues") {
        let (name, durable) = (text(&queue, "/name"), &queue["durable"]);
        lines.insert(format!("queue {name} durable={durable} {}", queue["arguments"]));
    }
    for exchange in of("exchanges") {
        let (name, kind) = (text(&exchange, "/name"), text(&exchange, "/type"));
        lines.insert(format!("exchange {name} {kind} durable={}", exchange["durable"]));
    }
    for binding in of("bindings") {
        let (source, key) = (text(&binding, "/source"), text(&binding, "/routing_key"));
        lines.insert(format!("binding {source} {key} {}", text(&binding, "/destination")));
    }
    lines
}

/// The same of the topology operator's objects.
fn from_objects(objects: &Value) -> BTreeSet<String> {
    let line = |object: &Value| {
        let spec = &object["spec"];
        let name = text(spec, "/name");
        match object["kind"].as_str()? {
            "Queue" => {
                let mut arguments = spec["arguments"].clone();
                if let Some(all) = arguments.as_object_mut() {
                    all.insert("x-queue-type".into(), spec["type"].clone());
                }
                Some(format!("queue {name} durable={} {arguments}", spec["durable"]))
            }
            "Exchange" => {
                let kind = text(spec, "/type");
                Some(format!("exchange {name} {kind} durable={}", spec["durable"]))
            }
            "Binding" => {
                let (source, key) = (text(spec, "/source"), text(spec, "/routingKey"));
                Some(format!("binding {source} {key} {}", text(spec, "/destination")))
            }
            _ => None,
        }
    };
    objects.as_array().unwrap().iter().filter_map(line).collect()
}

/// What scripts/deploy-check has rendered; `None`, and the reason aloud, if it was not run.
fn rendered(test: &str, name: &str) -> Option<Value> {
    let path = root().join("target/deploy").join(name);
    if !path.exists() {
        assert!(std::env::var("CI").is_err(), "{test} needs {}", path.display());
        eprintln!("skipped: {test} needs what scripts/deploy-check renders");
        return None;
    }
    Some(read_json(&path))
}

#[tokio::test]
async fn the_definitions_and_the_operators_objects_are_what_a_worker_declares() {
    let Some(broker) = BROKER.start("definitions").await else { return };
    let mut world = World::on(broker.url.clone(), "definitions").await;
    "checkout".clone_into(&mut world.prefix);
    world.set("replies.exchange", "checkout.reply");
    let mut worker = world.worker().await;
    worker.signal("TERM");
    worker.ended().await;
    let exported = world.directory.path().join("exported.json");
    ctl(&broker, &["export_definitions", exported.to_str().unwrap()]).await;
    let mut declared = from_definitions(&read_json(&exported), "/");
    assert!(declared.len() > 20, "{declared:?}");
    // For producers; the worker knows nothing of it.
    declared.insert("exchange checkout.intake direct durable=true".into());
    for queue in ["checkout.jobs", "checkout.jobs.bulk"] {
        declared.insert(format!("binding checkout.intake {queue} {queue}"));
    }
    let definitions = read_json(&root().join("deploy/rabbitmq/definitions.json"));
    assert_eq!(from_definitions(&definitions, "checkout"), declared);
    let all = "production+keda+prometheus-operator+rabbitmq-topology-operator.json";
    let Some(objects) = rendered("the operator's objects", all) else { return };
    assert_eq!(from_objects(&objects), declared);
    // The policies are the same in both, and bound nothing but sizes.
    let policy = |name: String, pattern: String, definition: &Value| {
        format!("{name} {pattern} {definition}")
    };
    let of_definitions: BTreeSet<String> = definitions["policies"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| policy(text(one, "/name"), text(one, "/pattern"), &one["definition"]))
        .collect();
    let of_objects: BTreeSet<String> = objects
        .as_array()
        .unwrap()
        .iter()
        .filter(|object| object["kind"] == "Policy")
        .map(|object| &object["spec"])
        .map(|spec| policy(text(spec, "/name"), text(spec, "/pattern"), &spec["definition"]))
        .collect();
    assert_eq!(of_objects, of_definitions);
}

/// Consumes with automatic acks.
async fn consume(connection: &Connection, queue: &str) -> Consumer {
    let channel = connection.create_channel().await.unwrap();
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await.unwrap()
}

/// Publishes a job through the exchange for producers.
async fn intake(connection: &Connection, queue: &str, id: &str, properties: BasicProperties) {
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    let sent = channel
        .basic_publish(
            "checkout.intake".into(),
            queue.into(),
            options,
            body(id).as_bytes(),
            properties,
        )
        .await
        .unwrap();
    let confirmed = soon("a confirm", sent).await.unwrap();
    assert!(confirmed.is_ack() && confirmed.take_message().is_none());
}

/// Whether `check --publish` found nothing wrong, and what it said.
async fn check(world: &World) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_checkout-worker"));
    command.args(["check", "--publish"]).env_clear().envs(world.environment());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn a_worker_that_declares_needs_more(world: &mut World, broker: &Private) {
    let user = ["set_permissions", "-p", "checkout"];
    world.set("topology.declare", "true");
    ctl(broker, &[&user[..], &["checkout-worker", ".*", "^$", ".*"]].concat()).await;
    let (ready, said) = check(world).await;
    assert!(!ready && said.contains("binding checkout.dead to checkout.dlx"), "{said}");
    world.set("topology.prefix", "fresh");
    ctl(broker, &[&user[..], &["checkout-worker", "^$", ".*", ".*"]].concat()).await;
    let (ready, said) = check(world).await;
    assert!(!ready && said.contains("may declare nothing under its name"), "{said}");
    ctl(broker, &[&user[..], &["checkout-worker", "^(fresh|checkout.reply)", ".*", ".*"]].concat())
        .await;
    let (ready, said) = check(world).await;
    assert!(ready && said.contains("`run` declares what is missing"), "{said}");
}

#[tokio::test]
async fn a_user_with_the_least_rights_is_enough_for_the_worker() {
    let Some(server) = shared("least_rights").await else { return };
    let Some(broker) = BROKER.start("least_rights").await else { return };
    let mut world = World::on(broker.url.clone(), "least_rights").await;
    "checkout".clone_into(&mut world.prefix);
    let file = world.directory.path().join("definitions.json");
    let made = Command::new(root().join("scripts/broker-definitions"))
        .args(["--producer", "shop"])
        .env("WORKER_PASSWORD", "of the worker/1")
        .env("PRODUCER_PASSWORD", "of-the-shop")
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    std::fs::write(&file, made.stdout).unwrap();
    ctl(&broker, &["import_definitions", file.to_str().unwrap()]).await;
    ctl(&broker, &["set_permissions", "-p", "checkout", "guest", "", "", ".*"]).await;

    let (_, host) = broker.url.rsplit_once('@').unwrap();
    let (host, _) = host.split_once('/').unwrap();
    let database = database(&server).await;
    let url = format!("amqp://checkout-worker:of%20the%20worker%2F1@{host}/checkout");
    world.settings.insert("AMQP_URL".into(), url);
    world.settings.insert("LEDGER_URL".into(), database);
    world.set("topology.declare", "false").set("replies.exchange", "checkout.reply");
    // A retry that goes through a delay queue, as does one that Creem asked for.
    world.script(
        r#"{"faults":[{"request_id":"told","times":1,"kind":"throttle","retry_after":"3"}]}"#,
    );
    let worker = world.worker().await;

    let shop = format!("amqp://shop:of-the-shop@{host}/checkout");
    let shop = Connection::connect(&shop, ConnectionProperties::default());
    let shop = soon("the shop's connection", shop).await.unwrap();
    let mut answers = consume(&shop, "checkout.replies").await;
    let nowhere = persistent().with_reply_to("nobody.there".into());
    intake(&shop, "checkout.jobs", "good", persistent()).await;
    intake(&shop, "checkout.jobs.bulk", "told", persistent()).await;
    intake(&shop, "checkout.jobs", "unanswerable", nowhere).await;
    let mut answered = BTreeSet::new();
    for _ in 0..2 {
        let reply = next(&mut answers).await;
        assert_eq!(reply.status(), "succeeded");
        answered.insert(reply.text("/request_id"));
    }
    assert_eq!(answered, ["good", "told"].map(str::to_owned).into());
    let owner = broker.url.replace("/%2f", "/checkout");
    let owner = Connection::connect(&owner, ConnectionProperties::default()).await.unwrap();
    let mut dead = consume(&owner, "checkout.dead").await;
    assert_eq!(next(&mut dead).await.text("/request_id"), "unanswerable");

    let (ready, said) = check(&world).await;
    assert!(ready && said.contains("ok       publishing"), "{said}");
    let log = std::fs::read_to_string(broker.directory.join("rabbit.log")).unwrap();
    assert!(!log.contains("refused for user 'checkout-worker'"), "{log}");
    drop(worker);

    // An embedded ledger's worker keeps others out, for which it needs more.
    let shared = world.settings.insert("LEDGER_URL".into(), "sqlite:none.db".into()).unwrap();
    let (ready, said) = check(&world).await;
    assert!(!ready && said.contains(r"configure and read on ^checkout\.run$"), "{said}");
    world.settings.insert("LEDGER_URL".into(), shared);

    // Less is not enough, and `check` says so.
    for exchange in ["dlx", "reply", "retry"] {
        let others = ["dlx", "reply", "retry"].into_iter().filter(|other| *other != exchange);
        let write = format!("^checkout\\.({})$", others.collect::<Vec<_>>().join("|"));
        let user = ["set_permissions", "-p", "checkout", "checkout-worker"];
        ctl(&broker, &[&user[..], &["^$", &write, ".*"]].concat()).await;
        let (ready, said) = check(&world).await;
        assert!(!ready && said.contains(&format!("publishing to checkout.{exchange}")), "{said}");
    }
    let user = ["set_permissions", "-p", "checkout", "checkout-worker", "^$", ".*"];
    ctl(&broker, &[&user[..], &["^checkout\\.jobs$"]].concat()).await;
    let (ready, said) = check(&world).await;
    assert!(!ready && said.contains("queue checkout.jobs.bulk: "), "{said}");
    assert!(!said.contains("queue checkout.jobs: "), "{said}");

    a_worker_that_declares_needs_more(&mut world, &broker).await;
}

/// An object of a kind, of the rendered ones.
fn find<'a>(objects: &'a Value, kind: &str) -> &'a Value {
    let of_kind = |object: &&Value| object["kind"] == kind;
    objects.as_array().unwrap().iter().find(of_kind).expect("it is rendered")
}

/// A number in a setting of the program's defaults.
fn default_seconds(defaults: &toml::Table, section: &str, key: &str) -> u64 {
    let text = defaults[section][key].as_str().unwrap();
    humantime::parse_duration(text).unwrap().as_secs()
}

/// Bytes of a quantity such as 256Mi.
fn mebibytes(quantity: &Value) -> u64 {
    quantity.as_str().unwrap().strip_suffix("Mi").unwrap().parse().unwrap()
}

#[test]
fn the_manifests_agree_with_the_programs_defaults() {
    let defaults = std::fs::read_to_string(root().join("config/default.toml")).unwrap();
    let defaults: toml::Table = defaults.parse().unwrap();
    let dockerfile = std::fs::read_to_string(root().join("Dockerfile")).unwrap();
    let keda = "production+keda+prometheus-operator+rabbitmq-topology-operator.json";
    for name in ["production.json", "dev.json", keda] {
        let Some(objects) = rendered("the manifests", name) else { return };
        let pod = &find(&objects, "Deployment")["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        let config = find(&objects, "ConfigMap");
        let config: toml::Table = text(config, "/data/config.toml").parse().unwrap();
        let or_default = |section: &str, key: &str| {
            let own =
                config.get(section).and_then(|section| section.get(key)).and_then(|v| v.as_str());
            own.map_or_else(
                || default_seconds(&defaults, section, key),
                |text| humantime::parse_duration(text).unwrap().as_secs(),
            )
        };
        let grace = or_default("shutdown", "grace");
        assert_eq!(pod["terminationGracePeriodSeconds"], grace + 5, "{name}");
        assert!(grace >= or_default("creem", "request_timeout") + 5, "{name}");

        let port = &container["ports"][0];
        let default = defaults["http"]["listen"].as_str().unwrap();
        let (_, number) = default.rsplit_once(':').unwrap();
        assert_eq!(port["containerPort"].to_string(), number, "{name}");
        assert_eq!(
            config["http"]["listen"].as_str(),
            Some(&*format!("0.0.0.0:{number}")),
            "{name}"
        );
        assert!(dockerfile.contains(&format!("EXPOSE {number}")));
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            assert_eq!(container[probe]["httpGet"]["port"], port["name"], "{name}: {probe}");
        }

        // What is held at once fits: every job in the works at its largest, and its reply.
        let jobs: i64 = ["interactive", "bulk"]
            .iter()
            .map(|lane| defaults["lanes"][lane]["concurrency"].as_integer().unwrap())
            .sum();
        let held = jobs * defaults["job"]["max_bytes"].as_integer().unwrap() * 4;
        let limit = mebibytes(&container["resources"]["limits"]["memory"]);
        assert!(
            limit * 1024 * 1024 > held.unsigned_abs() + 64 * 1024 * 1024,
            "{name}: {limit} MiB"
        );
    }
    let Some(objects) = rendered("KEDA", keda) else { return };
    let triggers = find(&objects, "ScaledObject")["spec"]["triggers"].as_array().unwrap();
    let concurrency = |lane: &str| defaults["lanes"][lane]["concurrency"].as_integer().unwrap();
    let value = |at: usize| text(&triggers[at], "/metadata/value").parse::<i64>().unwrap();
    assert_eq!(value(0), concurrency("interactive") * 3 / 4);
    assert_eq!(value(1), concurrency("bulk") * 10);
}

#[tokio::test]
async fn the_overlays_configurations_are_ones_that_the_program_takes() {
    let directory = tempfile::TempDir::new().unwrap();
    for overlay in ["production", "dev"] {
        let path = root().join(format!("deploy/overlays/{overlay}/config.toml"));
        // Nobody listens there: what is wrong must be that, and not the configuration.
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = nobody.local_addr().unwrap().port();
        drop(nobody);
        let mut command = Command::new(env!("CARGO_BIN_EXE_checkout-worker"));
        command
            .args(["check", "--config"])
            .arg(&path)
            .current_dir(&directory)
            .env_clear()
            .env("AMQP_URL", format!("amqp://127.0.0.1:{port}/checkout"))
            .env("LEDGER_URL", format!("postgres://nobody:no@127.0.0.1:{port}/none"))
            .env("CREEM_API_KEY", "creem_test_canary")
            .env("CHECKOUT_WORKER__CREEM__BASE_URL", format!("http://127.0.0.1:{port}"))
            .env("CHECKOUT_WORKER__HTTP__LISTEN", "127.0.0.1:0");
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{overlay}: {said}");
    }
}
