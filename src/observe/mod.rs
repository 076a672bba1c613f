//! What this process tells the outside, and where: metrics, logs, health.

pub mod admin;
pub mod health;
pub mod logging;
pub mod metrics;
