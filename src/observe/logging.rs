//! The log: one event a line, JSON where nobody looks on.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// How lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// What may never be louder than this, whatever the level: at WARN lapin logs whole returned
/// messages, payload included, and HTTP libraries log headers at TRACE.
const QUIET: [&str; 8] = [
    "lapin=off",
    "amq_protocol=off",
    "async_rs=off",
    "hyper=info",
    "hyper_util=info",
    "reqwest=info",
    "rustls=warn",
    "h2=info",
];

/// Installs the subscriber of this process; it writes to standard error.
///
/// # Errors
/// If the level is not one, or a subscriber is installed already.
pub fn install(format: Format, level: &str) -> Result<(), String> {
    let mut filter =
        EnvFilter::try_new(level).map_err(|error| format!("log.level is not a filter: {error}"))?;
    for directive in QUIET {
        filter = filter
            .add_directive(directive.parse().map_err(|error| format!("{directive}: {error}"))?);
    }
    let json = match format {
        Format::Json => true,
        Format::Text => false,
        Format::Auto => !std::io::stderr().is_terminal(),
    };
    let registry = tracing_subscriber::registry().with(filter);
    let installed = if json {
        let layer = tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .with_writer(std::io::stderr);
        registry.with(layer.with_current_span(false).with_span_list(false)).try_init()
    } else {
        let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        registry
            .with(layer.with_ansi(std::io::stderr().is_terminal()).with_target(false))
            .try_init()
    };
    log_panics();
    installed.map_err(|error| error.to_string())
}

/// A panic is an event like any other: one line, and without the panic's text, which may quote
/// what it stumbled over.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(place, "a bug: the code panicked; one job is affected, not the others");
    }));
}
