//! The worker's own HTTP server: `/livez`, `/readyz`, `/metrics`, `/status`. It answers GET only,
//! knows no secret and no job.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tower::ServiceExt as _;

use super::health::Health;
use crate::job::Lane;

/// Most connections at once.
const CONNECTIONS: usize = 32;
/// How long a request's headers may take.
const SLOWEST: Duration = Duration::from_secs(5);
/// How long a connection is kept.
const LONGEST: Duration = Duration::from_mins(2);
/// What `/livez` answers.
pub const LIVEZ: &str = "alive\n";
/// How often histograms are folded; without it they grow.
const UPKEEP: Duration = Duration::from_secs(5);

#[derive(Clone)]
struct Sources {
    health: Health,
    metrics: PrometheusHandle,
}

/// Binds the server and returns its address and the task that serves.
///
/// # Errors
/// If the address cannot be bound.
pub async fn bind(
    listen: SocketAddr,
    health: Health,
    metrics: PrometheusHandle,
) -> std::io::Result<(SocketAddr, impl Future<Output = ()> + Send + 'static)> {
    let listener = TcpListener::bind(listen).await?;
    let address = listener.local_addr()?;
    let upkeep = metrics.clone();
    let router = Router::new()
        .route("/livez", get(|| async { LIVEZ }))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .route("/metrics", get(scrape))
        .with_state(Sources { health, metrics });
    let serve = async move {
        let folding = async {
            loop {
                tokio::time::sleep(UPKEEP).await;
                upkeep.run_upkeep();
            }
        };
        tokio::select! {
            () = accept(listener, router) => {}
            () = folding => {}
        }
    };
    Ok((address, serve))
}

/// Serves so many connections at once, each for so long, and drops the rest: probes come one by one,
/// and whoever opens hundreds must not take the descriptors that jobs need.
async fn accept(listener: TcpListener, router: Router) {
    let free = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection for probes and metrics was not accepted");
                tokio::time::sleep(UPKEEP).await;
                continue;
            }
        };
        let Ok(place) = free.clone().try_acquire_owned() else { continue };
        let router = router.clone();
        connections.spawn(async move {
            let _place = place;
            let service =
                hyper::service::service_fn(move |request| router.clone().oneshot(request));
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                // A place is held for one question: idle connections must not shut probes out.
                .keep_alive(false)
                .header_read_timeout(SLOWEST)
                .serve_connection(TokioIo::new(stream), service);
            // How a connection ends is its client's business.
            drop(tokio::time::timeout(LONGEST, served).await);
        });
    }
}

async fn readyz(State(sources): State<Sources>) -> impl IntoResponse {
    let reasons = sources.health.not_ready();
    if reasons.is_empty() {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("not ready\n{}\n", reasons.join("\n")))
    }
}

async fn status(State(sources): State<Sources>) -> impl IntoResponse {
    let reasons = sources.health.not_ready();
    let in_flight: serde_json::Map<String, serde_json::Value> = Lane::ALL
        .into_iter()
        .map(|lane| (lane.as_str().to_owned(), json!(sources.health.in_flight(lane))))
        .collect();
    let (rate, circuit) = sources.health.calls();
    let paused: Vec<&str> = sources.health.paused_lanes().into_iter().map(Lane::as_str).collect();
    let because = match circuit {
        Some(_) => "the circuit is open: no call is made but one now and then".to_owned(),
        None => rate.because,
    };
    let circuit = circuit.map_or_else(
        || "closed".to_owned(),
        |open| {
            let who = if open.by_others {
                "another worker of this ledger finds that "
            } else {
                ""
            };
            let seconds = open.time.as_secs();
            format!("open for {seconds} s: {who}at least half of the last calls to Creem failed; one now and then shows whether it is back")
        },
    );
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "ready": reasons.is_empty(),
        "not_ready_because": reasons,
        "in_flight": in_flight,
        "rate_limit": {"per_second": rate.per_second, "because": because},
        "circuit": circuit,
        "paused_lanes": paused,
        "oldest_unsettled_seconds": sources.health.oldest().as_secs_f64(),
    }))
}

async fn scrape(State(sources): State<Sources>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], sources.metrics.render())
}
