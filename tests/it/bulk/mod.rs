//! A file of jobs into a file of links, with nothing but the program and a Creem.

mod guard;
mod links;
mod verify;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use creem_checkout_worker::simulator::script::Script;
use creem_checkout_worker::simulator::{Options, Simulator};
use tempfile::TempDir;

use crate::cli::command;
use crate::support::Process;

struct Desk {
    directory: TempDir,
    simulator: Arc<Simulator>,
    serving: tokio::task::JoinHandle<()>,
    settings: BTreeMap<String, String>,
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Desk {
    async fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let (simulator, serve) = Simulator::start(anywhere, Options::default()).await.unwrap();
        let ledger = directory.path().join("ledger.db");
        let settings = [
            ("CREEM_API_KEY", "creem_test_canary".to_owned()),
            ("CREEM_BASE_URL", simulator.url()),
            ("LEDGER_URL", format!("sqlite:{}", ledger.display())),
            // Nobody is there: no broker is needed.
            ("AMQP_URL", "amqp://guest:guest@127.0.0.1:1/%2f".to_owned()),
            ("CHECKOUT_WORKER__RETRY__FIRST", "10ms".to_owned()),
        ];
        let settings = settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Self { directory, simulator, serving: tokio::spawn(serve), settings }
    }

    /// One on which a table of so many rows was made into `links.csv`; and the table.
    async fn with_links(rows: usize) -> (Self, String) {
        let desk = Self::new().await;
        let input = desk.write("in.csv", &table(rows));
        assert_eq!(desk.bulk(&input, &[]).await.0, 0);
        (desk, input)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name).display().to_string()
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    fn script(&self, text: &str) {
        self.simulator.set_script(Script::parse(text.as_bytes()).unwrap());
    }

    /// The arguments that make the rows of a file into `links.csv`.
    fn arguments(&self, input: &str, more: &[&str]) -> Vec<String> {
        let out = self.path("links.csv").display().to_string();
        let arguments = ["bulk", input, "--out", &out].into_iter().chain(more.iter().copied());
        arguments.map(str::to_owned).collect()
    }

    async fn bulk(&self, input: &str, more: &[&str]) -> (i32, String) {
        let arguments = self.arguments(input, more);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (code, _, said) = command(&arguments, self.settings.clone(), "").await;
        (code, said)
    }

    /// Looks at the links of `FILE` again, and writes them to `OUT`.
    async fn verify(&self, file: &str, out: &str, more: &[&str]) -> (i32, String) {
        let (file, out) = (self.path(file), self.path(out));
        let mut arguments = vec!["bulk", file.to_str().unwrap(), "--verify"];
        arguments.extend(["--out", out.to_str().unwrap()]);
        arguments.extend(more);
        let (code, _, said) = command(&arguments, self.settings.clone(), "").await;
        (code, said)
    }

    /// Sets the status that Creem tells of a line's session.
    fn set_status(&self, row: &[String], status: &str) {
        assert!(self.simulator.log().set_status(&row[4], status));
    }

    fn start(&self, input: &str) -> Process {
        let arguments = self.arguments(input, &[]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Process::start(&arguments, &self.settings)
    }

    /// Begins to make rows that come through a pipe, and writes a table of three into it.
    fn start_piped(&self) -> (Process, std::io::PipeWriter) {
        let (reading, mut writing) = std::io::pipe().unwrap();
        let arguments = self.arguments("-", &[]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let process = Process::start_reading(&arguments, &self.settings, reading.into());
        writing.write_all(table(3).as_bytes()).unwrap();
        (process, writing)
    }

    fn sessions(&self) -> usize {
        self.simulator.log().sessions().len()
    }
}

/// A table of so many rows.
fn table(rows: usize) -> String {
    let lines = (0..rows).map(|row| format!("r-{row},prod_1,somebody {row}\n"));
    format!("request_id,product_id,Name\n{}", lines.collect::<String>())
}

/// The cells of a simple table, without its header.
fn cells(text: &str) -> Vec<Vec<String>> {
    text.lines().skip(1).map(|line| line.split(',').map(str::to_owned).collect()).collect()
}

/// Makes a ledger forget a job, as one that was restored from a backup has.
pub(crate) fn forget(ledger: &Path, id: &str) {
    let connection = rusqlite::Connection::open(ledger).unwrap();
    assert_eq!(connection.execute("DELETE FROM job WHERE request_id = ?1", [id]).unwrap(), 1);
}
