//! A file of jobs into a file of links, with nothing but the program and a Creem.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use creem_checkout_worker::ledger::sqlite::inspect::Inspector;
use creem_checkout_worker::simulator::script::Script;
use creem_checkout_worker::simulator::{Options, Simulator};
use tempfile::TempDir;

use crate::cli::command;
use crate::support::{Process, eventually, soon};

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

#[tokio::test]
async fn a_table_becomes_a_table_of_links_in_its_own_order() {
    let desk = Desk::new().await;
    let input = desk.write(
        "in.csv",
        "\u{feff}product_id;customer.email;Notes;metadata.source\r\nprod_1;a@b.example;=1+1;fair\r\nprod_missing;;\"two\nlines\";\r\n;nobody;x;\r\n",
    );
    let flags = ["--request-id-prefix", "fair-", "--product", "prod_2", "--metadata", "year=2026"];
    let (code, said) = desk.bulk(&input, &flags).await;
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("3 rows, 1 with a link, 1 invalid, 1 rejected"), "{said}");
    assert!(said.contains("carried through, and no part of the jobs: Notes"), "{said}");
    let text = desk.read("links.csv");
    let expected = [
        "\u{feff}product_id;customer.email;Notes;metadata.source;status;checkout_id;checkout_url;error_code;error_message;request_id",
        "prod_1;a@b.example;'=1+1;fair;succeeded;ch_",
        "prod_missing;;\"two\nlines\";;rejected;;;creem_rejected;Creem refused the request: Product not found;fair-2",
        ";nobody;x;;invalid;;;email;column customer.email: ",
    ];
    let lines: Vec<&str> = text.split("\r\n").collect();
    assert_eq!(lines.len(), expected.len() + 1, "the last line ends, too: {text}");
    for (line, expected) in lines.iter().zip(expected) {
        assert!(line.starts_with(expected), "{line}");
    }
    let posts: Vec<String> =
        desk.simulator.log().posts().iter().map(|post| post.body.clone()).collect();
    let first = r#"{"request_id":"fair-1","product_id":"prod_1","customer":{"email":"a@b.example"},"metadata":{"source":"fair","year":"2026"}}"#;
    assert!(posts.contains(&first.to_owned()), "{posts:?}");

    // Again: the link stays, and the others are tried again.
    let (_, said) = desk.bulk(&input, &flags).await;
    assert!(said.contains("3 rows, 1 with a link"), "{said}");
    assert_eq!(desk.read("links.csv"), text);
    assert_eq!((desk.sessions(), desk.simulator.log().posts().len()), (1, 3));

    // Corrected: they get theirs.
    let text = std::fs::read_to_string(&input).unwrap().replace("prod_missing", "prod_3");
    let input = desk.write("in.csv", &text.replace(";nobody", ";c@d.example"));
    let (code, said) = desk.bulk(&input, &flags).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(desk.sessions(), 3);
}

#[tokio::test]
async fn lines_of_json_become_a_table_of_links() {
    let desk = Desk::new().await;
    let input = desk.write(
        "in.ndjson",
        "{\"request_id\":\"a\",\"product_id\":\"prod_1\"}\nnonsense\n{\"request_id\":\"a\",\"product_id\":\"prod_2\"}\n",
    );
    let (code, said) = desk.bulk(&input, &[]).await;
    assert_eq!(code, 1, "{said}");
    let rows = cells(&desk.read("links.csv"));
    let words: Vec<(&str, &str, &str)> =
        rows.iter().map(|row| (&*row[0], &*row[1], &*row[4])).collect();
    assert_eq!(
        words,
        [
            ("a", "succeeded", ""),
            ("", "invalid", "not_json"),
            ("a", "conflict", "request_id_reused")
        ]
    );
}

#[tokio::test]
async fn a_dry_run_names_line_column_and_fix_and_asks_nobody() {
    let desk = Desk::new().await;
    let input = desk.write(
        "in.csv",
        "request_id,product_id,units\na,prod_1,1\nb,prod_1,many\n\na,prod_1,2\nc,prod 1,1\n",
    );
    let run =
        async |input: String| command(&["bulk", &input, "--dry-run"], BTreeMap::new(), "").await;
    let (code, output, said) = run(input).await;
    assert_eq!(code, 1, "{output}{said}");
    let lines: Vec<&str> = output.lines().collect();
    assert!(lines[0].starts_with("line 3, column units: units must be an integer"), "{output}");
    assert!(lines[1].starts_with("line 5, column request_id: line 2 has the same one"), "{output}");
    assert!(lines[2].starts_with("line 6, column product_id: "), "{output}");
    assert!(said.contains("3 of 4 rows wrong"), "{said}");
    let (code, _, said) = run(desk.write("good.csv", &table(3))).await;
    assert_eq!(code, 0, "{said}");
    let (code, _, said) =
        run(desk.write("typo.csv", "request_id,product_id,dicsount_code\n")).await;
    assert!(code == 1 && said.contains("nearly `discount_code`"), "{said}");
    assert_eq!(desk.simulator.log().posts().len(), 0);
}

#[tokio::test]
async fn killed_and_started_again_it_makes_no_link_twice_but_what_the_ledger_counts() {
    const ROWS: usize = 1_500;
    let desk = Desk::new().await;
    desk.script(
        r#"{"latency_ms":5,"seed":3,"faults":[{"weight":0.02,"kind":"cut_after"},{"weight":0.02,"kind":"status","status":500}]}"#,
    );
    let input = desk.write("in.csv", &table(ROWS));
    for until in [100, 500, 900] {
        let process = desk.start(&input);
        soon("some calls", desk.simulator.posts_arrived(until)).await;
        process.kill().await;
    }
    let (code, said) = desk.bulk(&input, &[]).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("going on with"), "{said}");
    let rows = cells(&desk.read("links.csv"));
    let ids: Vec<&str> = rows.iter().map(|row| row[0].as_str()).collect();
    let expected: Vec<String> = (0..ROWS).map(|row| format!("r-{row}")).collect();
    assert_eq!(ids, expected, "every row once, in order");
    let links: HashSet<&str> = rows.iter().map(|row| row[5].as_str()).collect();
    assert_eq!(links.len(), ROWS);
    let made: HashMap<String, String> = desk
        .simulator
        .log()
        .sessions()
        .iter()
        .map(|session| (session.url.clone(), session.request_id.clone()))
        .collect();
    for row in &rows {
        assert_eq!(made.get(&row[5]), Some(&row[0]), "the link is this row's");
    }
    let extra = u64::try_from(desk.sessions() - ROWS).unwrap();
    let counted = Inspector::open(&desk.path("ledger.db")).unwrap().report().ambiguous_attempts;
    assert!(extra > 0, "some answers were cut off on purpose");
    assert!(extra <= counted, "{extra} sessions that nobody was given, {counted} counted");
}

#[tokio::test]
async fn an_interrupt_finishes_what_was_sent_and_the_same_command_goes_on() {
    let desk = Desk::new().await;
    desk.script(r#"{"latency_ms":50}"#);
    let input = desk.write("in.csv", &table(400));
    let mut process = desk.start(&input);
    soon("some calls", desk.simulator.posts_arrived(20)).await;
    process.signal("INT");
    assert_eq!(process.ended().await, 1);
    let said = process.log().join("\n");
    assert!(said.contains("the same command goes on"), "{said}");
    let before = desk.sessions();
    assert!(before < 400, "it did not stop");
    assert_eq!(cells(&desk.read("links.csv.part")).len(), before, "what was sent is written");
    let (code, said) = desk.bulk(&input, &["--discount-code", "AUTUMN"]).await;
    assert!(code == 1 && said.contains("was begun by another command"), "{said}");
    let (code, said) = desk.bulk(&input, &[]).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(desk.sessions(), 400);
    assert_eq!(cells(&desk.read("links.csv")).len(), 400);
    assert!(!desk.path("links.csv.part").exists());
}

#[tokio::test]
async fn a_sandbox_needs_no_key_and_touches_no_ledger_of_yours() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", &table(20));
    let log = desk.path("sessions.ndjson").display().to_string();
    let flags = ["--sandbox", "--sandbox-log", &log];
    let arguments = desk.arguments(&input, &flags);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    for settings in [BTreeMap::new(), desk.settings.clone()] {
        let (code, _, said) = command(&arguments, settings, "").await;
        assert_eq!(code, 0, "{said}");
        assert!(said.contains("20 rows, 20 with a link") && said.contains("a sandbox"), "{said}");
    }
    assert_eq!(desk.read("sessions.ndjson").lines().count(), 20, "the second run kept the links");
    assert_eq!(desk.simulator.log().posts().len(), 0);
    assert!(!desk.path("ledger.db").exists());
    // Its links are none for buyers: the same command without it makes them.
    let (code, said) = desk.bulk(&input, &[]).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(desk.sessions(), 20);
    let text = desk.read("links.csv");
    assert!(cells(&text).iter().all(|row| row[5].starts_with(&desk.simulator.url())), "{text}");
}

#[tokio::test]
async fn a_paused_lane_holds_it_and_a_second_one_on_the_ledger_is_refused() {
    let desk = Desk::new().await;
    desk.script(r#"{"latency_ms":20}"#);
    let input = desk.write("in.csv", &table(500));
    let mut process = desk.start(&input);
    soon("some calls", desk.simulator.posts_arrived(20)).await;
    let pause = command(&["pause", "--lane", "bulk"], desk.settings.clone(), "").await;
    assert_eq!(pause.0, 0, "{pause:?}");
    soon("it notices", process.logged("paused lanes")).await;
    let other = desk.write("other.csv", &table(1));
    let out = desk.path("other.out.csv").display().to_string();
    let second = command(&["bulk", &other, "--out", &out], desk.settings.clone(), "").await;
    assert!(second.0 == 1 && second.2.contains("another worker"), "{second:?}");
    let posts = || desk.simulator.log().posts().len();
    // Rows are left, and nothing is on its way: only the pause can be why.
    eventually("what was sent is answered", || async { desk.sessions() == posts() }).await;
    assert!(posts() < 500, "it did not hold");
    let resume = command(&["resume", "--lane", "bulk"], desk.settings.clone(), "").await;
    assert_eq!(resume.0, 0, "{resume:?}");
    assert_eq!(process.ended().await, 0);
    assert_eq!(desk.sessions(), 500);
}

#[tokio::test]
async fn what_is_in_the_way_is_left_alone() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", &table(2));
    desk.write("links.csv", "my,precious\n1,2\n");
    let (code, said) = desk.bulk(&input, &[]).await;
    assert!(code == 1 && said.contains("is no output for this input"), "{said}");
    assert_eq!(desk.read("links.csv"), "my,precious\n1,2\n");
    let (code, _, said) =
        command(&["bulk", &input, "--out", &input], desk.settings.clone(), "").await;
    assert!(code == 2 && said.contains("give each a file of its own"), "{said}");
    let nowhere = desk.path("nowhere/links.csv").display().to_string();
    let (code, _, said) =
        command(&["bulk", &input, "--out", &nowhere], desk.settings.clone(), "").await;
    assert!(code == 2 && said.contains("there is no directory"), "{said}");
    // Nor does it write over what it reads, keeps or logs, by whichever name.
    let grows = desk.write("y.csv.part.run", &table(1));
    let out = desk.path("y.csv").display().to_string();
    let (code, _, said) =
        command(&["bulk", &grows, "--out", &out], desk.settings.clone(), "").await;
    assert!(code == 2 && desk.read("y.csv.part.run") == table(1), "{said}");
    let ledger = desk.path("ledger.db").display().to_string();
    let onto = ["bulk", &input, "--out", &ledger];
    let (code, _, said) = command(&onto, desk.settings.clone(), "").await;
    assert!(code == 2 && said.contains("the ledger"), "{said}");
    let logged = ["bulk", &input, "--out", &out, "--sandbox", "--sandbox-log", &input];
    let (code, _, said) = command(&logged, desk.settings.clone(), "").await;
    assert!(code == 2 && said.contains("--sandbox-log"), "{said}");
    // Nor into something that is no file.
    for (no_file, why) in [
        ("/dev/full", "is no regular file"),
        ("-", "takes the name of a file"),
        (&*desk.path("").display().to_string(), "is no regular file"),
    ] {
        let onto = ["bulk", &input, "--out", no_file];
        let (code, _, said) = command(&onto, desk.settings.clone(), "").await;
        assert!(code != 0 && said.contains(why), "{no_file}: {said}");
    }
    assert_eq!(desk.simulator.log().posts().len(), 0);
}

#[tokio::test]
async fn links_that_this_ledger_has_not_made_are_not_made_again_over_them() {
    let mut desk = Desk::new().await;
    let input = desk.write("in.csv", &table(3));
    assert_eq!(desk.bulk(&input, &[]).await.0, 0);
    let made = desk.read("links.csv");
    // From another directory, with another ledger.
    let elsewhere = format!("sqlite:{}", desk.path("other.db").display());
    let own = desk.settings.insert("LEDGER_URL".into(), elsewhere).unwrap();
    let (code, said) = desk.bulk(&input, &[]).await;
    assert!(code == 1 && said.contains("would be made a second time"), "{said}");
    let (code, said) = desk.bulk(&input, &["--sandbox"]).await;
    assert!(code == 1 && said.contains("would be made a second time"), "{said}");
    assert_eq!((desk.read("links.csv"), desk.sessions()), (made.clone(), 3));
    desk.settings.insert("LEDGER_URL".into(), own);
    assert_eq!(desk.bulk(&input, &[]).await.0, 0);
    assert_eq!((desk.read("links.csv"), desk.sessions()), (made, 3));
}

/// Makes a ledger forget a job, as one that was restored from a backup has.
pub(crate) fn forget(ledger: &Path, id: &str) {
    let connection = rusqlite::Connection::open(ledger).unwrap();
    assert_eq!(connection.execute("DELETE FROM job WHERE request_id = ?1", [id]).unwrap(), 1);
}

#[tokio::test]
async fn a_link_that_this_ledger_has_forgotten_is_not_made_again_over_it() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", &table(3));
    assert_eq!(desk.bulk(&input, &[]).await.0, 0);
    let made = desk.read("links.csv");
    forget(&desk.path("ledger.db"), "r-2");
    let (code, said) = desk.bulk(&input, &[]).await;
    assert!(code == 1 && said.contains("has a link for r-2"), "{said}");
    assert_eq!((desk.read("links.csv"), desk.sessions()), (made, 3));
}

#[tokio::test]
async fn links_in_lines_that_a_changed_input_cuts_off_are_not_made_again() {
    let desk = Desk::new().await;
    let (process, _writing) = desk.start_piped();
    let written = || async {
        desk.path("links.csv.part").exists() && desk.read("links.csv.part").lines().count() == 4
    };
    eventually("all are written", written).await;
    process.kill().await;
    let part = desk.read("links.csv.part");
    let input = desk.write("in.csv", &table(3).replace("somebody 0", "somebody else"));
    let rename = |from: &str, to: &str| {
        let ledger = rusqlite::Connection::open(desk.path("ledger.db")).unwrap();
        let rename = "UPDATE job SET request_id = ?2 WHERE request_id = ?1";
        assert_eq!(ledger.execute(rename, [from, to]).unwrap(), 1);
    };
    rename("r-1", "hidden");
    let (code, said) = desk.bulk(&input, &[]).await;
    assert!(code == 1 && said.contains("links.csv.part has a link for r-1"), "{said}");
    assert_eq!((desk.read("links.csv.part"), desk.sessions()), (part, 3));
    rename("hidden", "r-1");
    let (code, said) = desk.bulk(&input, &[]).await;
    assert_eq!((code, desk.sessions()), (0, 3), "{said}");
}

#[tokio::test]
async fn ids_with_spaces_around_them_are_guarded_as_well() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", "product_id, request_id \nprod_1, a\nprod_1,b \n");
    for _ in 0..2 {
        let (code, said) = desk.bulk(&input, &[]).await;
        assert_eq!((code, desk.sessions()), (0, 2), "{said}");
    }
    forget(&desk.path("ledger.db"), "b");
    let (code, said) = desk.bulk(&input, &[]).await;
    assert!(code == 1 && said.contains("has a link for b "), "{said}");
    assert_eq!(desk.sessions(), 2);
}

#[tokio::test]
async fn a_ledger_is_told_how_long_a_run_keeps_its_links() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", &table(1));
    assert_eq!(desk.bulk(&input, &[]).await.0, 0);
    let connection = rusqlite::Connection::open(desk.path("ledger.db")).unwrap();
    let said = "SELECT count(*) FROM meta WHERE name = 'retention.test.604800000'";
    assert_eq!(connection.query_row(said, [], |row| row.get::<_, i64>(0)).unwrap(), 1);
}

#[tokio::test]
async fn a_look_at_links_loses_none_in_the_file_that_it_is_written_over() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", &table(2));
    assert_eq!(desk.bulk(&input, &[]).await.0, 0);
    let links = desk.path("links.csv").display().to_string();
    let other = desk.read("links.csv").replace("r-0,", "x-0,").replace("ch_", "ch_precious_");
    let onto = desk.write("other.csv", &other);
    let verify = ["bulk", &links, "--out", &onto, "--verify"];
    let (code, _, said) = command(&verify, desk.settings.clone(), "").await;
    assert!(code == 1 && said.contains("it would be lost"), "{said}");
    assert_eq!(desk.read("other.csv"), other);
    // Its own earlier look it may be written over.
    let own = desk.path("checked.csv").display().to_string();
    for _ in 0..2 {
        let verify = ["bulk", &links, "--out", &own, "--verify"];
        let (code, _, said) = command(&verify, desk.settings.clone(), "").await;
        assert_eq!(code, 0, "{said}");
    }
    // Nor is a new link made that the file has already, of a ledger that has forgotten it.
    let session = cells(&desk.read("links.csv"))[0][4].clone();
    assert!(desk.simulator.log().set_status(&session, "expired"));
    let refresh = ["bulk", &links, "--out", &own, "--verify", "--refresh"];
    assert_eq!(command(&refresh, desk.settings.clone(), "").await.0, 0);
    forget(&desk.path("ledger.db"), "r-0.r1");
    let before = desk.read("checked.csv");
    let (code, _, said) = command(&refresh, desk.settings.clone(), "").await;
    assert!(code == 1 && said.contains("r-0.r1: no new link"), "{said}");
    assert_eq!((desk.read("checked.csv"), desk.sessions()), (before, 3));
}

#[tokio::test]
async fn rows_of_a_pipe_that_falls_silent_are_made_and_a_stop_is_heard() {
    let desk = Desk::new().await;
    let (mut process, _writing) = desk.start_piped();
    soon("what came is made", desk.simulator.posts_arrived(3)).await;
    eventually("and written", || async { cells(&desk.read("links.csv.part")).len() == 3 }).await;
    process.signal("INT");
    assert_eq!(process.ended().await, 1);
    assert!(process.log().iter().any(|line| line.contains("interrupted after 3 rows")));
}

#[tokio::test]
async fn the_same_rows_under_other_ids_are_not_made_a_second_time() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", "product_id,Name\nprod_1,Ada\nprod_1,Bob\n");
    assert_eq!(desk.bulk(&input, &["--request-id-prefix", "autumn-"]).await.0, 0);
    let made = desk.read("links.csv");
    let (code, said) = desk.bulk(&input, &["--request-id-prefix", "autum-"]).await;
    assert!(code == 1 && said.contains("its first row is autumn-1"), "{said}");
    assert_eq!((desk.read("links.csv"), desk.sessions()), (made, 2));
    // With another product, they are other jobs.
    let flags = ["--request-id-prefix", "autumn-", "--metadata", "a=b"];
    let (code, said) = desk.bulk(&input, &flags).await;
    assert!(code == 1 && said.contains("A conflict:"), "{said}");
    assert_eq!(desk.sessions(), 2);
}

#[tokio::test]
async fn rows_that_are_lost_in_a_cell_or_share_an_id_are_told() {
    let desk = Desk::new().await;
    let open =
        "request_id,product_id,note\na,prod_1,x\nb,prod_1,\"5 inch\nc,prod_1,x\nd,prod_1,x\n";
    let input = desk.write("open.csv", open);
    let (code, said) = desk.bulk(&input, &[]).await;
    assert!(code == 1 && said.contains("left open in the row that begins on line 3"), "{said}");
    let within =
        "request_id,product_id,note\na,prod_1,\"open\nb,prod_1,x\nc,prod_1,\"y\"\nd,prod_1,z\n";
    let input = desk.write("within.csv", within);
    let dry = ["bulk", &input, "--dry-run"];
    let (code, said, _) = command(&dry, desk.settings.clone(), "").await;
    assert!(code == 1 && said.contains("over lines that look like rows"), "{said}");
    // As many cells as the header has, in the end.
    let one = "request_id,product_id,note\na,prod_1,\"5 inch\nb,prod_1,\"6 inch\"\nc,prod_1,x\n";
    let input = desk.write("one.csv", one);
    let dry = ["bulk", &input, "--dry-run"];
    let (code, said, _) = command(&dry, desk.settings.clone(), "").await;
    assert!(code == 1 && said.contains("line 2, ") && said.contains("look like rows"), "{said}");
    let desk = Desk::new().await;
    let twice = "request_id,product_id,Name\nz,prod_1,Ada\nz,prod_1,Bob\n";
    let input = desk.write("twice.csv", twice);
    let (code, said) = desk.bulk(&input, &[]).await;
    assert!(code == 1 && said.contains("1 have the request_id of an earlier one"), "{said}");
}

#[tokio::test]
async fn dead_links_are_found_and_renewed_under_an_id_that_follows_from_theirs() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", &table(4));
    assert_eq!(desk.bulk(&input, &[]).await.0, 0);
    let links = desk.path("links.csv").display().to_string();
    let rows = cells(&desk.read("links.csv"));
    {
        let mut log = desk.simulator.log();
        for (row, status) in [(0, "expired"), (1, "completed"), (3, "gone")] {
            assert!(log.set_status(&rows[row][4], status));
        }
    }
    let checked = desk.path("checked.csv").display().to_string();
    let verify = ["bulk", &links, "--out", &checked, "--verify"];
    let (code, _, said) = command(&verify, desk.settings.clone(), "").await;
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("4 rows: 1 expired, 1 gone, 1 open, 1 paid"), "{said}");
    assert!(said.contains("--verify --refresh, with the flags"), "{said}");
    let words = |name: &str| -> Vec<String> {
        cells(&desk.read(name)).iter().map(|row| row[8].clone()).collect()
    };
    assert_eq!(words("checked.csv"), ["expired", "paid", "open", "gone"]);
    assert_eq!(desk.sessions(), 4, "it only asks");

    let renewed = desk.path("renewed.csv").display().to_string();
    let refresh = ["bulk", &checked, "--out", &renewed, "--verify", "--refresh"];
    for _ in 0..2 {
        // Again is the same.
        let (code, _, said) = command(&refresh, desk.settings.clone(), "").await;
        assert_eq!(code, 0, "{said}");
        assert!(said.contains("4 rows: 1 open, 1 paid, 2 renewed"), "{said}");
        assert_eq!(desk.sessions(), 6);
    }
    let new = cells(&desk.read("renewed.csv"));
    let ids: Vec<&str> = new.iter().map(|row| row[0].as_str()).collect();
    assert_eq!(ids, ["r-0.r1", "r-1", "r-2", "r-3.r1"]);
    assert_ne!(new[0][5], rows[0][5]);
    assert_eq!(new[1][5], rows[1][5]);
    assert_eq!(words("renewed.csv"), ["open", "paid", "open", "open"]);
}

#[tokio::test]
async fn a_link_that_only_this_key_does_not_know_is_not_dead() {
    let mut desk = Desk::new().await;
    let input = desk.write("in.csv", &table(3));
    assert_eq!(desk.bulk(&input, &[]).await.0, 0);
    // One id was bent by a spreadsheet.
    let rows = cells(&desk.read("links.csv"));
    let bent = desk.read("links.csv").replace(&rows[2][4], "ch_1E+15");
    std::fs::write(desk.path("links.csv"), bent).unwrap();
    let links = desk.path("links.csv").display().to_string();
    let renewed = desk.path("renewed.csv").display().to_string();
    let refresh = ["bulk", &links, "--out", &renewed, "--verify", "--refresh"];
    let (code, _, said) = command(&refresh, desk.settings.clone(), "").await;
    assert!(code == 1 && said.contains("3 rows: 2 open, 1 unknown"), "{said}");
    assert!(said.contains("r-2: Creem knows no ch_1E+15"), "{said}");
    // The same links by another shop's key and ledger: none is known there, and none is made anew.
    let other = Desk::new().await;
    for name in ["CREEM_BASE_URL", "LEDGER_URL"] {
        desk.settings.insert(name.into(), other.settings[name].clone());
    }
    let (code, _, said) = command(&refresh, desk.settings.clone(), "").await;
    assert!(code == 1 && said.contains("3 rows: 3 unknown"), "{said}");
    assert_eq!((desk.sessions(), other.sessions()), (3, 0));
}

#[tokio::test]
async fn a_renewed_link_that_has_died_as_well_is_renewed_again() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", &table(1));
    assert_eq!(desk.bulk(&input, &[]).await.0, 0);
    let links = desk.path("links.csv").display().to_string();
    let renewed = desk.path("renewed.csv").display().to_string();
    let refresh = ["bulk", &links, "--out", &renewed, "--verify", "--refresh"];
    for (dead, id) in [("links.csv", "r-0.r1"), ("renewed.csv", "r-0.r2")] {
        let session = cells(&desk.read(dead))[0][4].clone();
        assert!(desk.simulator.log().set_status(&session, "expired"));
        let (code, _, said) = command(&refresh, desk.settings.clone(), "").await;
        assert!(code == 0 && said.contains("1 row: 1 renewed"), "{said}");
        let row = cells(&desk.read("renewed.csv")).remove(0);
        assert_eq!((row[0].as_str(), row[8].as_str()), (id, "open"));
    }
    assert_eq!(desk.sessions(), 3);
}

#[tokio::test]
async fn a_dead_link_is_only_renewed_as_the_job_that_it_was_made_for() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", &table(1));
    let discount = ["--discount-code", "AUTUMN"];
    assert_eq!(desk.bulk(&input, &discount).await.0, 0);
    let session = cells(&desk.read("links.csv"))[0][4].clone();
    assert!(desk.simulator.log().set_status(&session, "expired"));
    let links = desk.path("links.csv").display().to_string();
    let renewed = desk.path("renewed.csv").display().to_string();
    let refresh = ["bulk", &links, "--out", &renewed, "--verify", "--refresh"];
    let (code, _, said) = command(&refresh, desk.settings.clone(), "").await;
    assert!(code == 1 && said.contains("they differ in discount_code"), "{said}");
    assert_eq!(desk.sessions(), 1);
    let (code, _, said) =
        command(&[&refresh[..], &discount[..]].concat(), desk.settings.clone(), "").await;
    assert!(code == 0 && said.contains("1 row: 1 renewed"), "{said}");
    assert!(desk.simulator.log().posts()[1].body.contains("AUTUMN"));
    // Nor is something else written over.
    let people = desk.write("people.csv", &table(1));
    let onto = ["bulk", &links, "--out", &people, "--verify"];
    let (code, _, said) = command(&onto, desk.settings.clone(), "").await;
    assert!(code == 1 && said.contains("is no file of links"), "{said}");
    assert_eq!(desk.read("people.csv"), table(1));
    let pipe = desk.path("pipe").display().to_string();
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let onto = ["bulk", &links, "--out", &pipe, "--verify"];
    let (code, _, said) = command(&onto, desk.settings.clone(), "").await;
    assert!(code == 1 && said.contains("no regular file"), "{said}");
}

#[tokio::test]
async fn the_part_of_another_runs_lines_of_json_is_not_written_over() {
    let mut desk = Desk::new().await;
    let line = |row| format!(r#"{{"request_id":"j-{row}","product_id":"prod_1"}}"#);
    let lines = [line(0), line(1), line(2)].join("\n");
    let input = desk.write("in.ndjson", &lines);
    assert_eq!(desk.bulk(&input, &[]).await.0, 0);
    // As an interrupted run leaves it.
    let part = desk.read("links.csv");
    std::fs::rename(desk.path("links.csv"), desk.path("links.csv.part")).unwrap();
    std::fs::write(desk.path("links.csv.part.run"), "another run\n").unwrap();
    let elsewhere = format!("sqlite:{}", desk.path("other.db").display());
    desk.settings.insert("LEDGER_URL".into(), elsewhere);
    let (code, said) = desk.bulk(&input, &[]).await;
    assert!(code == 1 && said.contains("was begun by another command"), "{said}");
    assert_eq!((desk.read("links.csv.part"), desk.sessions()), (part, 3));
}
