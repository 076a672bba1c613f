//! A server of Debian's as a private process, through one of the project's scripts.

use std::path::{Path, PathBuf};
use std::process::Command;

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A kind of server.
#[derive(Clone, Copy)]
pub(crate) struct Service {
    pub(crate) script: &'static str,
    pub(crate) name: &'static str,
}

pub(crate) const BROKER: Service = Service { script: "broker", name: "a broker" };
pub(crate) const POSTGRES: Service = Service { script: "postgres", name: "PostgreSQL" };

impl Service {
    pub(crate) fn script(self) -> PathBuf {
        root().join("scripts").join(self.script)
    }

    /// Where a server of that name keeps its files.
    pub(crate) fn directory(self, name: &str) -> PathBuf {
        root().join("target").join(format!("test-{}-{name}", self.script))
    }

    /// Runs a verb of the script.
    pub(crate) fn run(self, verb: &str, directory: &Path) -> Result<String, String> {
        self.run_with(verb, directory, &[])
    }

    fn run_with(self, verb: &str, directory: &Path, more: &[String]) -> Result<String, String> {
        let output = Command::new(self.script())
            .arg(verb)
            .arg(directory)
            .args(more)
            .output()
            .map_err(|error| format!("scripts/{} cannot be run: {error}", self.script))?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
        }
    }

    /// The URL, or nothing and the reason aloud; with `CI` set, the server must be had.
    pub(crate) fn skipped(self, test: &str, url: Result<String, String>) -> Option<String> {
        let name = self.name;
        match url {
            Ok(url) => Some(url),
            Err(why) => {
                assert!(std::env::var("CI").is_err(), "{test} needs {name}: {why}");
                eprintln!("skipped: {test} needs {name} ({why}); `make test` sets one up");
                None
            }
        }
    }

    /// A server of a test's own, which it may stop, kill and start again.
    pub(crate) async fn start(self, test: &str) -> Option<Private> {
        let directory = self.directory(test);
        let at = directory.clone();
        // What a test that was killed left behind is no beginning.
        let start = move || self.run("clean", &at).and_then(|_| self.run("start", &at));
        let url = tokio::task::spawn_blocking(start).await.unwrap();
        self.skipped(test, url).map(|url| Private { service: self, directory, url })
    }
}

/// See [`Service::start`]; it is gone when this is dropped.
pub(crate) struct Private {
    service: Service,
    pub(crate) directory: PathBuf,
    pub(crate) url: String,
}

impl Private {
    /// Does what a verb of the script says: `stop`, `start`, `kill`; of a broker also `restart`.
    pub(crate) async fn act(&self, verb: &'static str) {
        self.ask(verb, &[]).await.unwrap();
    }

    /// Does what a verb says that takes more than the directory; what it printed, or why it failed.
    pub(crate) async fn ask(&self, verb: &'static str, more: &[&str]) -> Result<String, String> {
        let (service, at) = (self.service, self.directory.clone());
        let more: Vec<String> = more.iter().map(|&word| word.to_owned()).collect();
        let run = move || service.run_with(verb, &at, &more);
        tokio::task::spawn_blocking(run).await.unwrap()
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        drop(self.service.run("clean", &self.directory));
    }
}
