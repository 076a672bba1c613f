//! The broker: its address, TLS, and the names on it.

use std::path::Path;

use super::sections;
use super::{Problem, Settings, pem};
use crate::job::success_url::is_loopback_name;
use crate::rabbit::link::Tls;
use crate::rabbit::{self, Topology};

pub(super) fn check_amqp(settings: &Settings, problems: &mut Vec<Problem>) -> rabbit::Options {
    let options = rabbit::Options {
        url: settings.amqp.url.clone(),
        heartbeat: settings.amqp.heartbeat.0,
        tls: amqp_tls(&settings.amqp, problems),
    };
    if !(1..=300).contains(&options.heartbeat.as_secs()) {
        problems.push(Problem::new(
            format!("`amqp.heartbeat` is {}", humantime::format_duration(options.heartbeat)),
            "give 1s to 300s; 10s to 15s are usual",
        ));
    }
    match rabbit::link::uris(&options) {
        Err(error) => problems
            .push(Problem::new(error.to_string(), "give amqp://user:password@host:port/vhost")),
        Ok(uris) => {
            for uri in uris {
                let loopback = is_loopback_name(&uri.authority.host);
                let user = &uri.authority.userinfo;
                if uri.vhost.is_empty() {
                    problems.push(Problem::new(
                        "`amqp.url` names a virtual host without a name".to_owned(),
                        "end it with /%2f for the default one, which is called /",
                    ));
                }
                if !loopback && user.username == "guest" && user.password == "guest" {
                    problems.push(Problem::new(
                        format!("`amqp.url` uses guest:guest for {}", uri.authority.host),
                        "everybody knows that login, and RabbitMQ lets it in from loopback only unless told otherwise: make a user of the worker's own",
                    ));
                }
            }
        }
    }
    options
}

pub(super) fn amqp_tls(amqp: &sections::Amqp, problems: &mut Vec<Problem>) -> Tls {
    let mut read = |key: &str, path: Option<&Path>| -> Option<String> {
        let bytes = pem(key, path?, problems)?;
        let text = String::from_utf8(bytes).ok().filter(|text| text.contains("-----BEGIN "));
        if text.is_none() {
            let what = format!("`{key}` holds no PEM");
            problems.push(Problem::new(what, "give a file that begins with -----BEGIN"));
        }
        text
    };
    let ca_pem = read("amqp.ca_file", amqp.ca_file.as_deref());
    let certificate = read("amqp.client_cert_file", amqp.client_cert_file.as_deref());
    let key = read("amqp.client_key_file", amqp.client_key_file.as_deref());
    if amqp.client_cert_file.is_some() != amqp.client_key_file.is_some() {
        problems.push(Problem::new(
            "`amqp.client_cert_file` and `amqp.client_key_file` belong together",
            "give both or none",
        ));
    }
    let given = ca_pem.is_some() || certificate.is_some() || key.is_some();
    if given && secrecy::ExposeSecret::expose_secret(&amqp.url).starts_with("amqp://") {
        problems.push(Problem::new(
            "`amqp.ca_file` and the client's certificate are for TLS, and `amqp.url` begins with amqp://",
            "begin it with amqps://, or leave them out",
        ));
    }
    let identity = certificate.zip(key).map(|(pem, key)| (pem.into_bytes(), key.into()));
    Tls { ca_pem, identity }
}

pub(super) fn check_topology(settings: &Settings, problems: &mut Vec<Problem>) -> Topology {
    let prefix = &settings.topology.prefix;
    let name = |text: &str, most: usize| {
        (1..=most).contains(&text.len())
            && text.bytes().all(|byte| {
                byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b':')
            })
    };
    if !name(prefix, 64) || prefix.starts_with("amq.") {
        problems.push(Problem::new(
            format!("`topology.prefix` is {prefix:?}"),
            "give 1-64 letters, digits, dots, dashes or underscores, not beginning with amq.",
        ));
    }
    let topology =
        Topology::new(prefix, settings.replies.queue.as_deref(), &settings.replies.exchange);
    if !name(&topology.replies_queue, 255)
        || topology.replies_queue.starts_with("amq.")
        || topology.denies_replies_to(&topology.replies_queue)
    {
        problems.push(Problem::new(
            format!("`replies.queue` is {:?}", topology.replies_queue),
            "give a queue name that is none of the worker's own",
        ));
    }
    let exchange = &topology.replies_exchange;
    let own = [topology.dead_exchange(), topology.retry_exchange()].contains(exchange);
    let usable = name(exchange, 255) && !exchange.starts_with("amq.");
    if own || (!exchange.is_empty() && !usable) {
        problems.push(Problem::new(
            format!("`replies.exchange` is {exchange:?}"),
            "give an exchange name, or leave it empty for the default exchange",
        ));
    }
    topology
}

/// A pattern that no reply address can match would park every job that names one.
pub(super) fn check_allowed(settings: &Settings, topology: &Topology, problems: &mut Vec<Problem>) {
    for pattern in &settings.replies.allow {
        let name =
            pattern.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-:*/+=".contains(&byte));
        if pattern.is_empty() || !name || topology.denies_replies_to(pattern) {
            problems.push(Problem::new(
                format!("`replies.allow` names {pattern:?}, which no reply may go to"),
                "give queue names, with * for any text, that are none of the worker's own",
            ));
        }
    }
}
