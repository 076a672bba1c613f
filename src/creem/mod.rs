//! Creem: one call that makes a checkout session, and what its answers mean.
//!
//! Everything that an HTTP library does out of kindness is off: redirects would carry the key
//! and the buyer's address to another host, the environment's proxy would see both, hidden
//! retries would make sessions that nobody counts, and decompression would let a small answer
//! become a large one.

pub mod answer;
pub mod redact;

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::{Method, StatusCode, Url};
use secrecy::{ExposeSecret as _, SecretString};

use crate::job::{Mode, RequestId};
pub use answer::{Answer, Checkout, Expected, Fetched, Pressure, Seen};

/// Largest answer that is read, in bytes. A checkout is about 1 KiB.
pub const MAX_ANSWER: usize = 256 * 1024;
/// How long a TCP and TLS connection may take; until it stands nothing was sent.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long an idle connection is kept: Node servers close theirs after 5 s, and a request that
/// meets the closing is one whose outcome nobody knows.
const IDLE: Duration = Duration::from_secs(4);

/// How to reach Creem.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where, e.g. `https://test-api.creem.io`; a path prefix is kept.
    pub base_url: Url,
    /// The API key.
    pub api_key: SecretString,
    /// Which of Creem's worlds the key belongs to.
    pub mode: Mode,
    /// One deadline for a whole exchange, from connecting to the last byte.
    pub request_timeout: Duration,
    /// A proxy, if configured.
    pub proxy: Option<Url>,
    /// Further root certificates, PEM.
    pub ca_pem: Option<Vec<u8>>,
    /// Most calls in flight; as many idle connections are kept, for a smaller pool would open
    /// and close one per call.
    pub concurrency: usize,
    /// If not empty, the only hosts a `checkout_url` may have.
    pub checkout_hosts: Vec<String>,
}

/// Why no client could be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The key cannot be sent in a header.
    #[error("the Creem API key holds characters that no HTTP header can carry")]
    Key,
    /// The certificates cannot be read.
    #[error("creem.ca_file holds no usable PEM certificates: {0}")]
    Certificates(String),
    /// The proxy cannot be used.
    #[error("creem.proxy cannot be used: {0}")]
    Proxy(String),
    /// The library says no.
    #[error("the HTTP client cannot be set up: {0}")]
    Client(String),
}

/// What a harmless question about the key was answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyCheck {
    /// The key is good.
    Accepted,
    /// Creem refuses the key; the HTTP status.
    Refused(u16),
    /// No usable answer: nothing is known.
    Unknown(String),
}

/// A client for one key and one host.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    checkouts: Url,
    products: Url,
    timeout: Duration,
    expected: ExpectedAlways,
}

#[derive(Debug, Clone)]
struct ExpectedAlways {
    mode: Mode,
    checkout_hosts: Vec<String>,
    loopback: bool,
}

impl Client {
    /// Sets a client up; nothing is sent.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn new(options: &Options) -> Result<Self, BuildError> {
        let mut key =
            HeaderValue::from_str(options.api_key.expose_secret()).map_err(|_| BuildError::Key)?;
        key.set_sensitive(true);
        let mut headers = HeaderMap::new();
        headers.insert(HeaderName::from_static("x-api-key"), key);
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        #[expect(clippy::disallowed_methods, reason = "the one place that makes an HTTP client")]
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("creem-checkout-worker/", env!("CARGO_PKG_VERSION")))
            .default_headers(headers)
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .no_proxy()
            .http1_only()
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(options.concurrency.max(1))
            .tcp_nodelay(true);
        if let Some(proxy) = &options.proxy {
            let proxy = reqwest::Proxy::all(proxy.as_str())
                .map_err(|error| BuildError::Proxy(error.to_string()))?;
            builder = builder.proxy(proxy);
        }
        if let Some(pem) = &options.ca_pem {
            let certificates = reqwest::Certificate::from_pem_bundle(pem)
                .map_err(|error| BuildError::Certificates(error.to_string()))?;
            if certificates.is_empty() {
                return Err(BuildError::Certificates("there is none in it".to_owned()));
            }
            builder = builder.tls_certs_merge(certificates);
        }
        let http = builder.build().map_err(|error| BuildError::Client(chain(&error)))?;
        let base = options.base_url.as_str().trim_end_matches('/');
        let url = |path: &str| {
            Url::parse(&format!("{base}{path}"))
                .map_err(|error| BuildError::Client(error.to_string()))
        };
        Ok(Self {
            http,
            checkouts: url("/v1/checkouts")?,
            products: url("/v1/products/search?page_number=1&page_size=1")?,
            timeout: options.request_timeout,
            expected: ExpectedAlways {
                mode: options.mode,
                checkout_hosts: options.checkout_hosts.clone(),
                loopback: options
                    .base_url
                    .host()
                    .is_some_and(|host| crate::job::success_url::is_loopback(&host)),
            },
        })
    }

    /// Asks Creem to make a checkout: one POST, within the timeout; `at_most` clips it further.
    pub async fn create_checkout(
        &self,
        request_id: &RequestId,
        body: Vec<u8>,
        at_most: Duration,
    ) -> Answer {
        let timeout = self.timeout.min(at_most);
        let deadline = tokio::time::Instant::now() + timeout;
        let expected = self.expect(request_id);
        let request = self
            .http
            .request(Method::POST, self.checkouts.clone())
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
            .header("Idempotency-Key", request_id.as_str())
            .body(body);
        match exchange(request, deadline).await {
            Ok(response) => answer::of_create(&response, &expected),
            Err(failure) => failure.into_answer(timeout),
        }
    }

    /// Asks for the link of a session that exists: one GET, which changes nothing.
    pub async fn fetch_link(
        &self,
        request_id: &RequestId,
        checkout_id: &str,
        deadline: tokio::time::Instant,
    ) -> Fetched {
        let mut url = self.checkouts.clone();
        url.query_pairs_mut().append_pair("checkout_id", checkout_id);
        match exchange(self.http.request(Method::GET, url), deadline).await {
            Ok(response) => answer::of_fetch(&response, &self.expect(request_id), checkout_id),
            Err(_) => Fetched::Later { retry_after: None, throttled: false },
        }
    }

    /// Asks what has become of a session: one GET, which changes nothing.
    pub async fn look_up(&self, checkout_id: &str) -> Seen {
        let mut url = self.checkouts.clone();
        url.query_pairs_mut().append_pair("checkout_id", checkout_id);
        let deadline = tokio::time::Instant::now() + self.timeout;
        match exchange(self.http.request(Method::GET, url), deadline).await {
            Ok(response) => answer::of_look_up(&response, checkout_id),
            Err(failure) => Seen::Later { why: failure.text(self.timeout), throttled: None },
        }
    }

    /// Asks something that changes nothing, to learn whether the key is accepted.
    pub async fn check_key(&self) -> KeyCheck {
        let deadline = tokio::time::Instant::now() + self.timeout;
        match exchange(self.http.request(Method::GET, self.products.clone()), deadline).await {
            Ok(response) if matches!(response.status.as_u16(), 401 | 403) => {
                KeyCheck::Refused(response.status.as_u16())
            }
            // Whatever else is wrong with the question, it was put with an accepted key.
            Ok(response)
                if response.status.is_success()
                    || matches!(response.status.as_u16(), 400 | 422) =>
            {
                KeyCheck::Accepted
            }
            Ok(response) if response.status.as_u16() == 404 => KeyCheck::Unknown(
                "HTTP 404 for a path that Creem has: is creem.base_url right?".to_owned(),
            ),
            Ok(response) => KeyCheck::Unknown(format!("HTTP {}", response.status.as_u16())),
            Err(failure) => KeyCheck::Unknown(failure.text(self.timeout)),
        }
    }

    fn expect<'a>(&'a self, request_id: &'a RequestId) -> Expected<'a> {
        Expected {
            request_id,
            mode: self.expected.mode,
            checkout_hosts: &self.expected.checkout_hosts,
            loopback: self.expected.loopback,
        }
    }
}

/// A whole HTTP answer.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status.
    pub status: StatusCode,
    /// The first `Retry-After`, as text.
    pub retry_after: Option<String>,
    /// The body; `None` where it was larger than [`MAX_ANSWER`], or was cut off after a status that
    /// needs none.
    pub body: Option<Bytes>,
}

/// Why there is no whole answer.
enum Failure {
    /// Certainly nothing was sent.
    NotSent(String),
    /// Sent, perhaps; heard nothing or not all.
    Unknown(String),
    /// The deadline passed.
    Late,
}

impl Failure {
    fn text(&self, timeout: Duration) -> String {
        match self {
            Self::NotSent(text) | Self::Unknown(text) => text.clone(),
            Self::Late => format!("no whole answer within {}", humantime::format_duration(timeout)),
        }
    }

    fn into_answer(self, timeout: Duration) -> Answer {
        let reason = self.text(timeout);
        match self {
            Self::NotSent(_) => Answer::NotMade { reason },
            Self::Unknown(_) | Self::Late => {
                Answer::Unknown { reason, retry_after: None, overloaded: false }
            }
        }
    }
}

async fn exchange(
    request: reqwest::RequestBuilder,
    deadline: tokio::time::Instant,
) -> Result<Response, Failure> {
    tokio::time::timeout_at(deadline, read_answer(request)).await.unwrap_or(Err(Failure::Late))
}

async fn read_answer(request: reqwest::RequestBuilder) -> Result<Response, Failure> {
    let mut response = request.send().await.map_err(|error| {
        // Resolving, connecting and the TLS handshake come before the first byte of a request.
        if error.is_connect() || error.is_builder() {
            Failure::NotSent(chain(&error))
        } else {
            Failure::Unknown(chain(&error))
        }
    })?;
    let status = response.status();
    let header = response.headers().get(RETRY_AFTER);
    let retry_after = header.and_then(|value| value.to_str().ok()).map(str::to_owned);
    let without_body = Response { status, retry_after: retry_after.clone(), body: None };
    if response.content_length().is_some_and(|length| length > MAX_ANSWER as u64) {
        return Ok(without_body);
    }
    let mut body = BytesMut::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) if body.len() + chunk.len() > MAX_ANSWER => return Ok(without_body),
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Ok(None) => return Ok(Response { status, retry_after, body: Some(body.freeze()) }),
            // A status that settles the matter by itself settles it without its body, too.
            Err(_) if !status.is_success() => return Ok(without_body),
            Err(error) => return Err(Failure::Unknown(chain(&error))),
        }
    }
}

/// An error with its causes; reqwest's own text holds the URL, which is no secret here, and
/// never a header or a body.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    redact::text(&text, 300)
}
