//! `make bench-bulk`: a campaign of a million rows on one machine, killed three times and gone on with.
//!
//! `bulk --sandbox` makes a file of links of them; `kill -9` at a tenth, two tenths and three tenths of it.
//! Printed: rows a second, the memory of the first process at 10,000 rows and of the last one at its end,
//! whether every row has one link, and how many sessions were made that nobody was given.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a benchmark program"
)]

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use creem_checkout_worker::ledger::sqlite::inspect::Inspector;

/// How often a file is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

struct Run {
    directory: PathBuf,
    rows: usize,
}

fn main() {
    // `cargo test` runs this too, without `--bench`: then a few rows show that it works.
    let real = std::env::args().any(|argument| argument == "--bench");
    let asked = std::env::var("ROWS").ok().and_then(|rows| rows.parse().ok());
    let rows = if real { asked.unwrap_or(1_000_000) } else { 4_000 };
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench-bulk");
    drop(std::fs::remove_dir_all(&directory));
    std::fs::create_dir_all(&directory).unwrap();
    let run = Run { directory, rows };
    run.write_input();
    let early = if real { 10_000 } else { 500 };
    let mut at_early = 0.0;
    for (number, tenths) in [1, 2, 3].into_iter().enumerate() {
        let mut child = run.start();
        if number == 0 {
            run.wait_for_sessions(&mut child, early);
            at_early = resident_mib(child.id());
        }
        run.wait_for_sessions(&mut child, rows * tenths / 10);
        // SIGKILL.
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let (began, done) = (Instant::now(), run.sessions());
    let mut child = run.start();
    let mut at_end = 0.0;
    let ended = loop {
        if let Some(ended) = child.try_wait().unwrap() {
            break ended;
        }
        // Of a process that has ended nothing is left to be seen.
        at_end = Some(resident_mib(child.id())).filter(|mib| *mib > 0.0).unwrap_or(at_end);
        std::thread::sleep(LOOK_EVERY);
    };
    assert!(ended.success(), "bulk failed: see {}", run.directory.display());
    #[expect(clippy::cast_precision_loss, reason = "for the eye")]
    let rate = (run.sessions() - done) as f64 / began.elapsed().as_secs_f64();
    println!(
        "{rows} rows, killed 3 times: the last process made {} links in {:.0} s, {rate:.0} a second",
        run.sessions() - done,
        began.elapsed().as_secs_f64()
    );
    println!("memory at {early} rows {at_early:.1} MiB, at the end {at_end:.1} MiB");
    run.judge();
    std::fs::remove_dir_all(&run.directory).unwrap();
    println!("bench: 1 passed, 0 failed");
}

impl Run {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn write_input(&self) {
        let mut file = BufWriter::new(std::fs::File::create(self.path("in.csv")).unwrap());
        writeln!(file, "request_id,product_id,customer.email,Name").unwrap();
        for row in 0..self.rows {
            writeln!(file, "fair-{row},prod_1,buyer{row}@example.com,Somebody {row}").unwrap();
        }
        file.flush().unwrap();
    }

    fn start(&self) -> Child {
        let said =
            std::fs::File::options().create(true).append(true).open(self.path("said.log")).unwrap();
        Command::new(env!("CARGO_BIN_EXE_checkout-worker"))
            .args(["bulk", "in.csv", "--out", "links.csv", "--sandbox"])
            .args(["--sandbox-log", "sessions.ndjson"])
            .current_dir(&self.directory)
            .env_clear()
            .stdin(Stdio::null())
            .stderr(said)
            .spawn()
            .unwrap()
    }

    /// How many sessions have been made, by the lines of the sandbox's file.
    fn sessions(&self) -> usize {
        let Ok(file) = std::fs::File::open(self.path("sessions.ndjson")) else { return 0 };
        BufReader::new(file).lines().count()
    }

    fn wait_for_sessions(&self, child: &mut Child, count: usize) {
        // As long as its bytes are too few for so many lines, they need not be counted.
        let bytes = |path: PathBuf| std::fs::metadata(path).map_or(0, |about| about.len());
        while bytes(self.path("sessions.ndjson")) < 40 * count as u64 || self.sessions() < count {
            assert!(child.try_wait().unwrap().is_none(), "it ended before {count} sessions");
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Every row has one link, its own, and every session beyond those is counted.
    fn judge(&self) {
        let mut made: HashMap<String, String> = HashMap::new();
        for line in
            BufReader::new(std::fs::File::open(self.path("sessions.ndjson")).unwrap()).lines()
        {
            let line: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
            let text = |name: &str| line[name].as_str().unwrap().to_owned();
            made.insert(text("id"), text("request_id"));
        }
        let sessions = made.len();
        let lines = BufReader::new(std::fs::File::open(self.path("links.csv")).unwrap()).lines();
        let mut linked = 0;
        for (row, line) in lines.skip(1).enumerate() {
            let line = line.unwrap();
            let cells: Vec<&str> = line.split(',').collect();
            assert_eq!((cells[0], cells[4]), (&*format!("fair-{row}"), "succeeded"), "{line}");
            // Taken out, so that no other row can have it.
            assert_eq!(made.remove(cells[5]).as_deref(), Some(cells[0]), "{line}");
            linked += 1;
        }
        assert_eq!(linked, self.rows);
        let ledger = self.path("links.csv.sandbox-ledger.db");
        let counted = Inspector::open(&ledger).unwrap().report().ambiguous_attempts;
        println!(
            "{linked} rows, {linked} links, each its row's; sessions {sessions}, of which nobody was given {}, counted in the ledger {counted}",
            made.len()
        );
        assert!(u64::try_from(made.len()).unwrap() <= counted);
    }
}

fn resident_mib(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|kib| kib.parse().ok());
    kib.unwrap_or(0.0) / 1024.0
}
