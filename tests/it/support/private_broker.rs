//! Debian's broker as a private process, through scripts/broker.

use std::path::{Path, PathBuf};
use std::process::Command;

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn script() -> PathBuf {
    root().join("scripts/broker")
}

/// The URL, or nothing and the reason aloud; with `CI` set, a broker must be had.
pub(crate) fn skipped(test: &str, url: Result<String, String>) -> Option<String> {
    match url {
        Ok(url) => Some(url),
        Err(why) => {
            assert!(std::env::var("CI").is_err(), "{test} needs a broker: {why}");
            eprintln!("skipped: {test} needs a broker ({why}); `make test` sets one up");
            None
        }
    }
}

/// A private broker that a test may stop, kill and restart.
pub(crate) struct Private {
    pub(crate) directory: PathBuf,
    pub(crate) url: String,
}

impl Private {
    pub(crate) async fn start(test: &str) -> Option<Self> {
        let directory = root().join("target").join(format!("test-broker-{test}"));
        let at = directory.clone();
        let url = tokio::task::spawn_blocking(move || run("start", &at)).await.unwrap();
        skipped(test, url).map(|url| Self { directory, url })
    }

    /// `stop`, `start`, `kill`, `restart`.
    pub(crate) async fn act(&self, verb: &'static str) {
        let at = self.directory.clone();
        tokio::task::spawn_blocking(move || run(verb, &at)).await.unwrap().unwrap();
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        drop(run("clean", &self.directory));
    }
}

/// Runs a verb of the script.
pub(crate) fn run(verb: &str, directory: &Path) -> Result<String, String> {
    let output = Command::new(script())
        .arg(verb)
        .arg(directory)
        .output()
        .map_err(|error| format!("scripts/broker cannot be run: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}
