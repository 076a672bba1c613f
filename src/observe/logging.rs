//! The log: one event a line, JSON where nobody looks on.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
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

/// Crates that are never logged, whatever the level: lapin logs whole messages and what it sends
/// at login, bytes and all.
const NEVER: [&str; 3] = ["lapin", "amq_protocol", "async_rs"];
/// Crates that are logged down to INFO only: below it they log headers.
const QUIET: [&str; 6] = ["hyper", "hyper_util", "reqwest", "rustls", "h2", "tokio_rustls"];

/// Whether an event may be written. Apart from the filter, because a filter's more specific
/// directive would win over any that is added to it.
fn may_show(metadata: &tracing::Metadata<'_>) -> bool {
    let of = |crates: &[&str]| {
        let name = metadata.target().split("::").next().unwrap_or_default();
        crates.contains(&name)
    };
    !of(&NEVER) && (*metadata.level() <= tracing::Level::INFO || !of(&QUIET))
}

/// Checks a filter: a level, or directives such as `info,creem_checkout_worker::worker=debug`.
///
/// # Errors
/// What is wrong with it. A word that is no level would otherwise silence everything.
pub fn check(level: &str) -> Result<(), String> {
    if level.trim().is_empty() {
        return Err("it is empty".to_owned());
    }
    for directive in level.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let word = directive.to_ascii_lowercase();
        let is_level = ["off", "error", "warn", "info", "debug", "trace"].contains(&word.as_str());
        if !is_level && !directive.contains(['=', '[']) && !directive.starts_with("creem_") {
            return Err(format!("`{}` is no level", crate::job::printable(directive, 40)));
        }
    }
    EnvFilter::try_new(level).map(|_| ()).map_err(|_| "it is not a filter".to_owned())
}

/// Installs the subscriber of this process; it writes to standard error.
///
/// # Errors
/// If the level is not one, or a subscriber is installed already.
pub fn install(format: Format, level: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(level).map_err(|error| error.to_string())?;
    let json = match format {
        Format::Json => true,
        Format::Text => false,
        Format::Auto => !std::io::stderr().is_terminal(),
    };
    let registry = tracing_subscriber::registry().with(filter).with(filter_fn(may_show));
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
        tracing::error!(place, "a bug: the code panicked here; please report it");
    }));
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn a_word_that_is_no_level_is_refused_rather_than_silencing_everything() {
        for good in
            ["info", "DEBUG", "info,creem_checkout_worker::worker=debug", "off", "warn,hyper=trace"]
        {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in ["warning", "nonsense", "a=b=c", "info,loud"] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }
}
