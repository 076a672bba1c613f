//! The worker's own HTTP server: `/livez`, `/readyz`, `/metrics`, `/status`. It answers GET only,
//! knows no secret and no job.

use std::net::SocketAddr;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::json;
use tokio::net::TcpListener;

use super::health::Health;
use crate::job::Lane;

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
            ended = axum::serve(listener, router) => {
                if let Err(error) = ended {
                    tracing::error!(%error, "the HTTP server for probes and metrics has ended");
                }
            }
            () = folding => {}
        }
    };
    Ok((address, serve))
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
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "ready": reasons.is_empty(),
        "not_ready_because": reasons,
        "in_flight": in_flight,
        "oldest_unsettled_seconds": sources.health.oldest().as_secs_f64(),
    }))
}

async fn scrape(State(sources): State<Sources>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], sources.metrics.render())
}
