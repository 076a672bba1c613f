//! The worker as a process, and its log as a signal.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use super::soon;

pub(crate) struct Process {
    child: Child,
    pub(crate) pid: i32,
    lines: Arc<Mutex<Vec<String>>>,
    count: watch::Receiver<usize>,
}

impl Process {
    pub(crate) fn start(arguments: &[&str], environment: &BTreeMap<String, String>) -> Self {
        Self::start_reading(arguments, environment, Stdio::null())
    }

    pub(crate) fn start_reading(
        arguments: &[&str],
        environment: &BTreeMap<String, String>,
        stdin: Stdio,
    ) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_checkout-worker"))
            .args(arguments)
            .env_clear()
            .envs(environment)
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id().unwrap()).unwrap();
        let stderr = child.stderr.take().unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (seen, count) = watch::channel(0);
        let kept = lines.clone();
        tokio::spawn(async move {
            let mut reader = BufReader::new(stderr).lines();
            while let Ok(Some(line)) = reader.next_line().await {
                kept.lock().unwrap().push(line);
                seen.send_modify(|seen| *seen += 1);
            }
        });
        Self { child, pid, lines, count }
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    fn find(&self, fits: &impl Fn(&Value) -> bool) -> Option<Value> {
        self.log()
            .iter()
            .filter_map(|line| serde_json::from_str(line).ok())
            .find(|event| fits(event))
    }

    /// Waits for a log event.
    pub(crate) async fn event(&self, fits: impl Fn(&Value) -> bool) -> Value {
        let mut count = self.count.clone();
        loop {
            if let Some(event) = self.find(&fits) {
                return event;
            }
            if count.changed().await.is_err() {
                // The process has ended; what it said last has been read.
                return self.find(&fits).unwrap_or_else(|| {
                    panic!(
                        "the worker ended without that event; it said:\n{}",
                        self.log().join("\n")
                    )
                });
            }
        }
    }

    /// Waits for an event whose message contains a text.
    pub(crate) async fn logged(&self, text: &str) -> Value {
        self.event(|event| event["message"].as_str().is_some_and(|message| message.contains(text)))
            .await
    }

    pub(crate) async fn http(&self) -> String {
        let event = soon("the address", self.logged("starting")).await;
        event["http"].as_str().unwrap().to_owned()
    }

    /// GETs a path of the worker's own HTTP server.
    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        let url = format!("http://{}{path}", self.http().await);
        let response = reqwest::get(url).await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    pub(crate) fn signal(&self, name: &str) {
        let status = std::process::Command::new("kill")
            .args([format!("-{name}"), self.pid.to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// Kills it without a warning.
    pub(crate) async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }

    /// Waits for its end and its last words; the exit code.
    pub(crate) async fn ended(&mut self) -> i32 {
        let status = soon("the worker ends", self.child.wait()).await.unwrap();
        soon("its log ends", async { while self.count.changed().await.is_ok() {} }).await;
        status.code().unwrap_or(-1)
    }
}
