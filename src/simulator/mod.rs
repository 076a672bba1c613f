//! A local Creem: its checkout API as its documentation and its SDK describe it, with faults on
//! demand, and a log of every call that a test can read.
//!
//! It imports nothing of the worker's: a mirror would agree with every mistake. It never
//! deduplicates on `request_id`, because nothing says that Creem does.

pub mod log;
pub mod rules;
pub mod script;

use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, Request, Response, StatusCode, header};
use axum::routing::get;
use futures::StreamExt as _;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tower::ServiceExt as _;

use log::{Log, Session};
use script::{Fault, Kind, Script};

/// The status of a session that a GET does not find any more.
const GONE: &str = "gone";

/// How a simulator is set up.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The only key that is accepted; without it any `creem_…` key of the simulator's mode.
    pub api_key: Option<String>,
    /// Whether it plays the live host, which refuses test keys, instead of the test host.
    pub live: bool,
    /// The faults and the latency.
    pub script: Script,
    /// How many POSTs and sessions are remembered at least; all without it.
    pub keep: Option<usize>,
    /// A file that gets a line of every session before it is answered.
    pub sessions_file: Option<PathBuf>,
}

/// What the simulator knows; shared with tests in the same process.
#[derive(Debug)]
pub struct Simulator {
    address: SocketAddr,
    live: bool,
    api_key: Mutex<Option<String>>,
    script: Mutex<Script>,
    log: Mutex<Log>,
    /// The POSTs of the last second that were taken.
    taken: Mutex<VecDeque<Instant>>,
    /// How many POSTs have arrived; lets a test wait for one instead of guessing.
    arrived: watch::Sender<usize>,
}

/// Marks a response that must never be sent: the connection is closed instead.
#[derive(Debug, Clone, Copy)]
struct Cut;

impl Simulator {
    /// Binds a listener and serves until the task is dropped or aborted.
    ///
    /// # Errors
    /// If the address cannot be bound, or the file not be opened.
    pub async fn start(
        listen: SocketAddr,
        options: Options,
    ) -> std::io::Result<(Arc<Self>, impl Future<Output = ()> + Send + 'static)> {
        let listener = TcpListener::bind(listen).await?;
        let file = options.sessions_file.as_deref().map(log::open_file).transpose()?;
        let simulator = Arc::new(Self {
            address: listener.local_addr()?,
            script: Mutex::new(options.script.clone()),
            log: Mutex::new(Log::new(options.keep, file)),
            taken: Mutex::default(),
            arrived: watch::Sender::new(0),
            live: options.live,
            api_key: Mutex::new(options.api_key),
        });
        let serve = serve(listener, router(simulator.clone()));
        Ok((simulator, serve))
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its base URL, which its links begin with.
    #[must_use]
    pub fn url(&self) -> String {
        let mut address = self.address;
        // Every address is none to go to. In a container the port is published on loopback, and
        // only there may a link be plain http.
        if address.ip().is_unspecified() {
            address.set_ip(match address {
                SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        format!("http://{address}")
    }

    /// Replaces the faults.
    pub fn set_script(&self, script: Script) {
        *locked(&self.script) = script;
    }

    /// From now on, accepts this key and no other.
    pub fn accept_only(&self, key: &str) {
        *locked(&self.api_key) = Some(key.to_owned());
    }

    /// The log, for reading.
    pub fn log(&self) -> MutexGuard<'_, Log> {
        locked(&self.log)
    }

    /// Waits until that many POSTs have arrived in all.
    pub async fn posts_arrived(&self, count: usize) {
        // The sender is a part of `self`, so the wait cannot fail.
        drop(self.arrived.subscribe().wait_for(|arrived| *arrived >= count).await);
    }

    fn mode(&self) -> &'static str {
        if self.live { "prod" } else { "test" }
    }

    /// Key rules as its documentation has them: a missing key is 401, a wrong one 403.
    fn refuse_key(&self, headers: &HeaderMap) -> Option<Response<Body>> {
        let key =
            headers.get("x-api-key").and_then(|value| value.to_str().ok()).unwrap_or_default();
        if key.is_empty() {
            return Some(rules::error(StatusCode::UNAUTHORIZED, Some(&["API Key is missing"])));
        }
        let expected = match &*locked(&self.api_key) {
            Some(expected) => key == expected,
            None => key.starts_with("creem_") && key.starts_with("creem_test_") != self.live,
        };
        (!expected).then(|| rules::error(StatusCode::FORBIDDEN, None))
    }

    fn make(&self, request: &Value) -> Session {
        let text =
            |name: &str| request.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let mut log = self.log();
        let id = log.next_id();
        let product = text("product_id");
        let url = format!("{}/checkout/{product}/{id}", self.url());
        log.add_session(Session {
            id,
            request_id: text("request_id"),
            url,
            request: request.clone(),
            status: "pending".to_owned(),
        })
    }

    fn entity(&self, session: &Session) -> Value {
        let mut entity = json!({
            "id": session.id,
            "object": "checkout",
            "mode": self.mode(),
            "status": session.status,
            "product": session.request["product_id"],
            "units": session.request.get("units").cloned().unwrap_or_else(|| json!(1)),
            "checkout_url": session.url,
        });
        for name in ["request_id", "custom_price", "success_url", "metadata"] {
            if let Some(value) = session.request.get(name) {
                entity[name] = value.clone();
            }
        }
        if let Some(Value::Array(fields)) = session.request.get("custom_fields") {
            entity["custom_fields"] = fields.iter().map(rules::echo_custom_field).collect();
        }
        entity
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn router(simulator: Arc<Simulator>) -> Router {
    Router::new()
        .route("/", get(|| async { "creem-simulator\n" }))
        .route("/v1/checkouts", get(retrieve).post(create))
        .route("/v1/products/search", get(search))
        .route("/checkout/{product}/{id}", get(page))
        .route("/_simulator/posts", get(posts))
        .route("/_simulator/sessions", get(sessions))
        .route("/_simulator/sessions/{id}/{status}", axum::routing::put(set_status))
        .route("/_simulator/counters", get(counters))
        .route("/_simulator/faults", axum::routing::put(faults))
        .with_state(simulator)
}

/// Serves connections by hand, because a framework always answers, and Creem may not.
async fn serve(listener: TcpListener, router: Router) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else { continue };
        // Answers are small and must not wait for one another.
        drop(stream.set_nodelay(true));
        let router = router.clone();
        connections.spawn(async move {
            let service =
                hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                    let router = router.clone();
                    async move {
                        let response = match router.oneshot(request).await {
                            Ok(response) => response,
                            Err(never) => match never {},
                        };
                        match response.extensions().get::<Cut>() {
                            Some(_) => Err(std::io::Error::other("cut on purpose")),
                            None => Ok(response),
                        }
                    }
                });
            // How a connection ends is the client's business here.
            drop(
                hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await,
            );
        });
    }
}

/// Like a real server, goes on with a call whose caller has gone away: the session is made all the
/// same, and nobody hears of it.
async fn create(
    State(simulator): State<Arc<Simulator>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    #[expect(clippy::disallowed_methods, reason = "it must outlive its connection")]
    let answering = tokio::spawn(create_to_the_end(simulator, headers, body));
    answering.await.unwrap_or_else(|_| cut())
}

async fn create_to_the_end(
    simulator: Arc<Simulator>,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let parsed = rules::parse(&body);
    let request_id =
        parsed.as_ref().and_then(|request| request.get("request_id")).and_then(Value::as_str);
    let (latency, fault) = locked(&simulator.script).draw(request_id.unwrap_or_default());
    let fault = if simulator.is_over_its_limit() { Some(Script::throttle()) } else { fault };
    let number = simulator.log().add_post(request_id.unwrap_or_default(), fault.as_ref(), &body);
    simulator.arrived.send_modify(|arrived| *arrived += 1);
    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    let (response, session) = match simulator.refuse_key(&headers) {
        Some(refusal) => (refusal, None),
        None => simulator.answer(parsed, fault).await,
    };
    let status =
        response.extensions().get::<Cut>().map_or_else(|| response.status().as_u16(), |_| 0);
    simulator.log().finish_post(number, status, session.as_deref());
    response
}

impl Simulator {
    /// Whether one more POST is too many for this second; counts it if it is not.
    fn is_over_its_limit(&self) -> bool {
        let Some(limit) = locked(&self.script).limit_per_second else { return false };
        let now = Instant::now();
        let mut taken = locked(&self.taken);
        while taken.front().is_some_and(|at| now.duration_since(*at) >= Duration::from_secs(1)) {
            taken.pop_front();
        }
        let over = taken.len() >= limit;
        if !over {
            taken.push_back(now);
        }
        over
    }

    /// Answers a create: faults that come before the session, the session, faults after it.
    async fn answer(
        &self,
        request: Option<Value>,
        fault: Option<Fault>,
    ) -> (Response<Body>, Option<String>) {
        let kind = fault.map(|fault| fault.kind);
        if let Some(response) = before(kind.as_ref()).await {
            return (response, None);
        }
        let request = match request.map(rules::validate) {
            Some(Ok(request)) => request,
            Some(Err(messages)) => {
                let texts: Vec<&str> = messages.iter().map(String::as_str).collect();
                return (rules::error(StatusCode::BAD_REQUEST, Some(&texts)), None);
            }
            None => {
                return (
                    rules::error(
                        StatusCode::BAD_REQUEST,
                        Some(&["Malformed JSON in request body"]),
                    ),
                    None,
                );
            }
        };
        if request["product_id"].as_str().is_some_and(|id| id.starts_with("prod_missing")) {
            return (rules::error(StatusCode::NOT_FOUND, Some(&["Product not found"])), None);
        }
        let session = self.make(&request);
        let response = self.after(kind, &session).await;
        (response, Some(session.id))
    }

    /// How the answer to a session that was made goes wrong, or right.
    async fn after(&self, kind: Option<Kind>, session: &Session) -> Response<Body> {
        let mut entity = self.entity(session);
        let whole = |entity: &Value| rules::json(StatusCode::OK, entity);
        match kind {
            Some(Kind::StatusAfter { status }) => {
                rules::error(StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY), None)
            }
            Some(Kind::HangAfter) => hang().await,
            Some(Kind::CutAfter) => cut(),
            Some(Kind::CutBody) => streamed(&entity, usize::MAX, Duration::ZERO, true),
            Some(Kind::Drip { milliseconds }) => {
                streamed(&entity, 1, Duration::from_millis(milliseconds), false)
            }
            Some(Kind::Garbage) => raw("application/json", "\u{1}\u{2}not json at all"),
            Some(Kind::Html) => raw("text/html", "<html><body>Bad gateway</body></html>"),
            Some(Kind::Huge) => {
                raw("application/json", &format!("{{\"id\":\"{}\"}}", "x".repeat(2 * 1024 * 1024)))
            }
            Some(Kind::WrongId) => {
                entity["request_id"] = json!("somebody-elses-job");
                whole(&entity)
            }
            Some(Kind::WrongMode) => {
                entity["mode"] = json!(if self.live { "test" } else { "prod" });
                whole(&entity)
            }
            Some(Kind::PlainUrl) => {
                entity["checkout_url"] = json!("http://pay.example/x");
                whole(&entity)
            }
            Some(Kind::NoUrl { throttled_gets }) => {
                if let Some(id) = entity["id"].as_str() {
                    self.log().throttle_gets(id, throttled_gets);
                }
                entity.as_object_mut().map(|members| members.remove("checkout_url"));
                whole(&entity)
            }
            _ => whole(&entity),
        }
    }
}

/// Says when to ask again.
fn and_later(mut response: Response<Body>, retry_after: Option<&str>) -> Response<Body> {
    if let Some(value) = retry_after.and_then(|text| text.parse().ok()) {
        response.headers_mut().insert(header::RETRY_AFTER, value);
    }
    response
}

/// Faults that come before any session is made.
async fn before(kind: Option<&Kind>) -> Option<Response<Body>> {
    match kind? {
        Kind::Throttle { retry_after } => {
            let refused = rules::error(StatusCode::TOO_MANY_REQUESTS, Some(&["Too Many Requests"]));
            Some(and_later(refused, retry_after.as_deref()))
        }
        Kind::Status { status, retry_after } => {
            let status = StatusCode::from_u16(*status).unwrap_or(StatusCode::BAD_GATEWAY);
            let failed = rules::error(status, Some(&["scripted"]));
            Some(and_later(failed, retry_after.as_deref()))
        }
        Kind::Duplicate => Some(rules::error(
            StatusCode::BAD_REQUEST,
            Some(&["A resource with this identifier already exists"]),
        )),
        Kind::Hang => Some(hang().await),
        Kind::Cut => Some(cut()),
        Kind::StatusAfter { .. }
        | Kind::HangAfter
        | Kind::CutAfter
        | Kind::CutBody
        | Kind::Drip { .. }
        | Kind::Garbage
        | Kind::Html
        | Kind::Huge
        | Kind::WrongId
        | Kind::WrongMode
        | Kind::PlainUrl
        | Kind::NoUrl { .. } => None,
    }
}

async fn hang<T>() -> T {
    std::future::pending().await
}

fn cut() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    response.extensions_mut().insert(Cut);
    response
}

fn raw(content_type: &'static str, body: &str) -> Response<Body> {
    let mut response = Response::new(Body::from(body.to_owned()));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}

/// A body that comes in pieces, slowly, or breaks off in its middle.
fn streamed(entity: &Value, piece: usize, gap: Duration, broken: bool) -> Response<Body> {
    let text = entity.to_string();
    let length = text.len();
    let sent = if broken { length / 2 } else { length };
    let bytes = text.into_bytes()[..sent].to_vec();
    let pieces: Vec<Vec<u8>> = bytes.chunks(piece.min(length)).map(<[u8]>::to_vec).collect();
    let body = futures::stream::iter(pieces).then(move |piece| async move {
        if !gap.is_zero() {
            tokio::time::sleep(gap).await;
        }
        Ok::<_, std::io::Error>(Bytes::from(piece))
    });
    let end = futures::stream::iter(broken.then(|| Err(std::io::Error::other("cut on purpose"))));
    let mut response = Response::new(Body::from_stream(body.chain(end)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    headers.insert(header::CONTENT_LENGTH, header::HeaderValue::from(length));
    response
}

#[derive(Debug, Deserialize)]
struct Retrieve {
    checkout_id: Option<String>,
}

async fn retrieve(
    State(simulator): State<Arc<Simulator>>,
    headers: HeaderMap,
    Query(query): Query<Retrieve>,
) -> Response<Body> {
    simulator.log().gets += 1;
    if let Some(refusal) = simulator.refuse_key(&headers) {
        return refusal;
    }
    let Some(id) = query.checkout_id else {
        return rules::error(StatusCode::BAD_REQUEST, Some(&["checkout_id must be a string"]));
    };
    if simulator.log().throttles_get(&id) {
        return rules::error(StatusCode::TOO_MANY_REQUESTS, None);
    }
    let session = simulator.log().session(&id).filter(|session| session.status != GONE).cloned();
    match session {
        Some(session) => rules::json(StatusCode::OK, &simulator.entity(&session)),
        None => rules::error(StatusCode::NOT_FOUND, Some(&["Checkout not found"])),
    }
}

async fn search(State(simulator): State<Arc<Simulator>>, headers: HeaderMap) -> Response<Body> {
    simulator.log().gets += 1;
    if let Some(refusal) = simulator.refuse_key(&headers) {
        return refusal;
    }
    let page = json!({"items": [], "pagination": {
        "total_records": 0, "total_pages": 0, "current_page": 1, "next_page": null, "prev_page": null}});
    rules::json(StatusCode::OK, &page)
}

async fn page(
    State(simulator): State<Arc<Simulator>>,
    Path((_, id)): Path<(String, String)>,
) -> Response<Body> {
    if simulator.log().session(&id).is_none() {
        return rules::error(StatusCode::NOT_FOUND, Some(&["Checkout not found"]));
    }
    raw(
        "text/html; charset=utf-8",
        "<!doctype html><title>Simulated checkout</title><h1>Simulated checkout</h1><p>Nobody pays here: this link was made by creem-simulator.</p>",
    )
}

async fn posts(State(simulator): State<Arc<Simulator>>) -> Response<Body> {
    let lines = simulator.log().post_lines();
    raw("application/x-ndjson", &lines)
}

async fn sessions(State(simulator): State<Arc<Simulator>>) -> Response<Body> {
    let lines = simulator.log().session_lines();
    raw("application/x-ndjson", &lines)
}

/// Has a session be `expired`, `completed` or whatever else; Creem forgets one that is `gone`.
async fn set_status(
    State(simulator): State<Arc<Simulator>>,
    Path((id, status)): Path<(String, String)>,
) -> Response<Body> {
    if simulator.log().set_status(&id, &status) {
        return rules::json(StatusCode::OK, &json!({"accepted": true}));
    }
    rules::error(StatusCode::NOT_FOUND, Some(&["no such session"]))
}

async fn counters(State(simulator): State<Arc<Simulator>>) -> Response<Body> {
    let counters = simulator.log().counters();
    rules::json(StatusCode::OK, &counters)
}

async fn faults(State(simulator): State<Arc<Simulator>>, body: Bytes) -> Response<Body> {
    match Script::parse(&body) {
        Ok(script) => {
            simulator.set_script(script);
            rules::json(StatusCode::OK, &json!({"accepted": true}))
        }
        Err(error) => rules::error(StatusCode::BAD_REQUEST, Some(&[&error])),
    }
}
