//! One connection to one of the broker's hosts, made with a deadline on every step.

use std::time::Duration;

use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use lapin::types::ShortString;
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// For the TCP connection and the first byte of a broker.
const PROBE: Duration = Duration::from_secs(5);
/// For the whole AMQP handshake.
const HANDSHAKE: Duration = Duration::from_secs(15);

/// RabbitMQ's own default, in bytes.
const FRAME_MAX: u32 = 131_072;

/// How to reach the broker.
#[derive(Debug, Clone)]
pub struct Options {
    /// `amqp(s)://user:password@host[:port][,host[:port]…]/vhost[?heartbeat=…]`
    pub url: SecretString,
    /// The AMQP heartbeat: a frame is sent every half of it, and a peer that is silent for twice of
    /// it is given up. A `?heartbeat=` wins.
    pub heartbeat: Duration,
    /// For `amqps`.
    pub tls: Tls,
}

/// What TLS needs beyond the system's root certificates.
#[derive(Debug, Clone, Default)]
pub struct Tls {
    /// Further root certificates, PEM.
    pub ca_pem: Option<String>,
    /// The worker's own certificate and its key, PEM, for a broker that asks for one.
    pub identity: Option<(Vec<u8>, SecretString)>,
}

impl Tls {
    fn config(&self) -> OwnedTLSConfig {
        let identity = self.identity.as_ref().map(|(pem, key)| OwnedIdentity::PKCS8 {
            pem: pem.clone(),
            key: key.expose_secret().as_bytes().to_vec(),
        });
        OwnedTLSConfig { identity, cert_chain: self.ca_pem.clone() }
    }
}

/// Why there is no connection.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LinkError {
    /// The URL is not one.
    #[error("amqp.url is not usable: {0}")]
    Url(String),
    /// Nobody answers like a broker.
    #[error("no broker at {host}: {reason}")]
    Unreachable {
        /// Host and port.
        host: String,
        /// What happened.
        reason: String,
    },
    /// The broker says no, or stopped talking.
    #[error("the broker at {host} did not let us in: {reason}")]
    Refused {
        /// Host and port.
        host: String,
        /// What happened.
        reason: String,
    },
    /// The broker refuses one operation: something is not there, is of another kind, or is not
    /// allowed for this user.
    #[error("the broker refuses: {0}")]
    Denied(String),
    /// The connection or a channel broke.
    #[error("{0}")]
    Broken(String),
    /// The broker met an error of its own over what it was asked (541), and closed the connection.
    #[error("the broker met an internal error (541): {0}")]
    InternalError(String),
    /// The broker sent what lapin cannot read, for instance a message whose properties are not
    /// UTF-8; it will be sent again.
    #[error(
        "a frame from the broker cannot be read ({0}): as a rule a message with a property that is not UTF-8, which goes to the dead queue after {limit} deliveries",
        limit = super::topology::DELIVERY_LIMIT
    )]
    Garbled(String),
}

/// Why the broker closed a channel, where it did.
pub(super) fn refusal(error: &lapin::Error) -> Option<AMQPSoftError> {
    let lapin::ErrorKind::ProtocolError(error) = error.kind() else { return None };
    match error.kind() {
        AMQPErrorKind::Soft(soft) => Some(soft.clone()),
        AMQPErrorKind::Hard(_) => None,
    }
}

fn internal_error(error: &lapin::Error) -> bool {
    let lapin::ErrorKind::ProtocolError(error) = error.kind() else { return false };
    matches!(error.kind(), AMQPErrorKind::Hard(AMQPHardError::INTERNALERROR))
}

impl From<lapin::Error> for LinkError {
    fn from(error: lapin::Error) -> Self {
        if matches!(error.kind(), lapin::ErrorKind::ParsingError(_)) {
            Self::Garbled(error.to_string())
        } else if refusal(&error).is_some() {
            Self::Denied(error.to_string())
        } else if internal_error(&error) {
            Self::InternalError(error.to_string())
        } else {
            Self::Broken(error.to_string())
        }
    }
}

/// The hosts of a URL, each as a URL of its own; passwords are in them, so they stay in here.
///
/// # Errors
/// [`LinkError::Url`], without the password.
pub fn uris(options: &Options) -> Result<Vec<AMQPUri>, LinkError> {
    let text = options.url.expose_secret();
    let wrong = |reason: &str| LinkError::Url(reason.to_owned());
    let (scheme, rest) =
        text.split_once("://").ok_or_else(|| wrong("it must begin with amqp:// or amqps://"))?;
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at(end);
    let (user, hosts) = match authority.rsplit_once('@') {
        Some((user, hosts)) => (format!("{user}@"), hosts),
        None => (String::new(), authority),
    };
    if tail.contains('@') {
        return Err(wrong(
            "there is an @ after the host: write / # ? @ in a password as %2F %23 %3F %40",
        ));
    }
    if hosts.split(',').any(str::is_empty) {
        return Err(wrong("a host is missing"));
    }
    check_query(tail).map_err(|reason| wrong(&reason))?;
    hosts
        .split(',')
        .map(|host| {
            let mut uri: AMQPUri = format!("{scheme}://{user}{host}{tail}")
                .parse()
                .map_err(|reason: String| wrong(&reason.replace(&user, "")))?;
            // The parser knows no IPv6 literals and would silently take localhost.
            if let Some(literal) = host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
                literal.0.clone_into(&mut uri.authority.host);
            }
            // Bounds the headers of a message, and with them the depth of their nesting.
            uri.query.frame_max.get_or_insert(FRAME_MAX);
            if uri.query.heartbeat.is_none() {
                uri.query.heartbeat =
                    Some(u16::try_from(options.heartbeat.as_secs()).unwrap_or(u16::MAX));
            }
            Ok(uri)
        })
        .collect()
}

/// What may stand after the `?`.
const PARAMETERS: [&str; 5] =
    ["heartbeat", "channel_max", "frame_max", "connection_timeout", "auth_mechanism"];
/// AMQP's own.
const SMALLEST_FRAME: u32 = 4096;
/// Channels that one connection needs at most.
const CHANNELS: u16 = 16;

fn check_query(tail: &str) -> Result<(), String> {
    let query = tail.split_once('?').map_or("", |(_, query)| query);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if !PARAMETERS.contains(&name) {
            return Err(format!(
                "there is no parameter {name}; there are {}",
                PARAMETERS.join(", ")
            ));
        }
        let number = value.parse::<u32>();
        if name == "heartbeat" && number == Ok(0) {
            return Err("heartbeat=0 would never notice a dead peer; give seconds".to_owned());
        }
        if name == "frame_max"
            && !number.is_ok_and(|bytes| (SMALLEST_FRAME..=FRAME_MAX).contains(&bytes))
        {
            return Err(format!(
                "frame_max={value}: give {SMALLEST_FRAME} to {FRAME_MAX} bytes, or leave it out"
            ));
        }
        if name == "channel_max"
            && value.parse().is_ok_and(|most: u16| (1..CHANNELS).contains(&most))
        {
            return Err(format!("channel_max={value} is too small: give at least {CHANNELS}"));
        }
    }
    Ok(())
}

/// Connects to the first host that answers, beginning at a random one.
///
/// # Errors
/// The last host's error.
pub async fn connect(options: &Options, name: &str) -> Result<Connection, LinkError> {
    let uris = uris(options)?;
    let first = getrandom::u32().map_or(0, |random| random as usize) % uris.len().max(1);
    let mut last = LinkError::Url("it names no host".to_owned());
    for uri in uris.iter().cycle().skip(first).take(uris.len()) {
        match connect_to(uri.clone(), name, &options.tls).await {
            Ok(connection) => return Ok(connection),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn connect_to(uri: AMQPUri, name: &str, tls: &Tls) -> Result<Connection, LinkError> {
    let host = format!("{}:{}", uri.authority.host, uri.authority.port);
    probe(&uri).await.map_err(|reason| LinkError::Unreachable { host: host.clone(), reason })?;
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let refused = |mut reason: String| {
        if reason.contains("InvalidContentType") {
            reason.push_str(": it speaks no TLS; begin the URL with amqp://, or give its TLS port");
        }
        LinkError::Refused { host: host.clone(), reason }
    };
    let runtime = lapin::runtime::default_runtime().map_err(|error| refused(error.to_string()))?;
    let connect = Connection::connect_uri_with_config(uri, properties, tls.config(), runtime);
    match tokio::time::timeout(HANDSHAKE, connect).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => Err(refused(error.to_string())),
        Err(_) => {
            Err(refused(format!("no handshake within {}", humantime::format_duration(HANDSHAKE))))
        }
    }
}

/// Asks for a broker's first byte before lapin does: a connect that lapin gives up on leaves its
/// thread and two descriptors behind, so it should only meet peers that talk.
async fn probe(uri: &AMQPUri) -> Result<(), String> {
    let talk = async {
        let mut stream =
            TcpStream::connect((uri.authority.host.as_str(), uri.authority.port)).await?;
        if matches!(uri.scheme, lapin::uri::AMQPScheme::AMQP) {
            stream.write_all(b"AMQP\x00\x00\x09\x01").await?;
            let first = stream.read_u8().await?;
            // A broker begins with a method frame; whatever it would refuse begins with "AMQP".
            if first != 1 && first != b'A' {
                return Err(std::io::Error::other("it does not speak AMQP"));
            }
        }
        Ok(())
    };
    match tokio::time::timeout(PROBE, talk).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {}", humantime::format_duration(PROBE))),
    }
}

/// A name as AMQP's short string.
///
/// # Errors
/// If it is longer than 255 bytes.
pub fn short(text: &str) -> Result<ShortString, LinkError> {
    ShortString::try_new(text)
        .map_err(|error| LinkError::Broken(format!("a name is too long for AMQP: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<Vec<AMQPUri>, LinkError> {
        uris(&Options {
            url: url.to_owned().into(),
            heartbeat: Duration::from_secs(10),
            tls: Tls::default(),
        })
    }

    #[test]
    fn several_hosts_share_user_and_virtual_host() {
        let uris = parse("amqp://ann:p%40ss@one:5673,two,[::1]:5674/shop?heartbeat=7").unwrap();
        let seen: Vec<_> =
            uris.iter().map(|uri| (uri.authority.host.as_str(), uri.authority.port)).collect();
        assert_eq!(seen, [("one", 5673), ("two", 5672), ("::1", 5674)]);
        for uri in &uris {
            assert_eq!(uri.authority.userinfo.password, "p@ss");
            assert_eq!((uri.vhost.as_str(), uri.query.heartbeat), ("shop", Some(7)));
        }
    }

    #[test]
    fn the_configured_heartbeat_holds_where_the_url_has_none() {
        assert_eq!(parse("amqp://localhost/%2f").unwrap()[0].query.heartbeat, Some(10));
    }

    #[test]
    fn a_wrong_url_is_named_without_its_password() {
        for url in ["localhost", "http://ann:secret@host/", "amqp://ann:secret@host:x/"] {
            let error = parse(url).unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
