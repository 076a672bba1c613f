//! What keeps a run from making a link twice, or from losing one.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write as _;

use creem_checkout_worker::ledger::sqlite::inspect::Inspector;

use super::{Desk, cells, forget, table};
use crate::cli::command;
use crate::support::{Process, eventually, soon};

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
    let waits =
        || process.log().iter().any(|line| line.contains("; waiting: the bulk lane of this"));
    eventually("it says what it waits for", || async { waits() }).await;
    let resume = command(&["resume", "--lane", "bulk"], desk.settings.clone(), "").await;
    assert_eq!(resume.0, 0, "{resume:?}");
    assert_eq!(process.ended().await, 0);
    assert_eq!(desk.sessions(), 500);
}

#[tokio::test]
async fn a_campaign_that_is_cancelled_gets_no_further_links() {
    let desk = Desk::new().await;
    desk.script(r#"{"latency_ms":50}"#);
    let input = desk.write("in.csv", &table(1_000));
    let arguments = desk.arguments(&input, &["--campaign", "fair"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut process = Process::start(&arguments, &desk.settings);
    soon("some calls", desk.simulator.posts_arrived(20)).await;
    let cancel = command(&["campaign", "cancel", "fair"], desk.settings.clone(), "").await;
    assert_eq!(cancel.0, 0, "{cancel:?}");
    assert_eq!(process.ended().await, 1);
    let rows = cells(&desk.read("links.csv"));
    let of = |status: &str| rows.iter().filter(|row| row[3] == status).count();
    assert_eq!((of("succeeded"), of("cancelled")), (desk.sessions(), 1_000 - desk.sessions()));
    assert!(of("cancelled") > 0, "it was too late");
    // Who runs it again wants them after all.
    let again = command(&arguments, desk.settings.clone(), "").await;
    assert_eq!((again.0, desk.sessions()), (0, 1_000), "{again:?}");
}

#[tokio::test]
async fn an_output_that_is_a_symbolic_link_is_refused() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", &table(2));
    let target = desk.write("target.csv", "");
    std::os::unix::fs::symlink(&target, desk.path("links.csv")).unwrap();
    let (code, said) = desk.bulk(&input, &[]).await;
    assert!(code == 2 && said.contains("is a symbolic link"), "{said}");
    assert_eq!((desk.sessions(), desk.read("target.csv")), (0, String::new()));
}

#[tokio::test]
async fn the_log_of_a_sandbox_is_written_into_nothing_else() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", table(2).trim_end());
    let text = desk.read("in.csv");
    let notes = desk.write("notes.txt", "precious");
    for log in [&input, &notes] {
        let (code, said) = desk.bulk(&input, &["--sandbox", "--sandbox-log", log]).await;
        assert!(code != 0, "{said}");
    }
    assert_eq!((desk.read("in.csv"), desk.read("notes.txt")), (text, "precious".to_owned()));
}

#[tokio::test]
async fn no_row_of_a_table_is_older_than_its_run() {
    let mut desk = Desk::new().await;
    let settings = [
        ("CHECKOUT_WORKER__LANES__BULK__MAX_AGE", "1s"),
        ("CHECKOUT_WORKER__RATE_LIMIT__PER_SECOND", "4"),
    ];
    for (name, value) in settings {
        desk.settings.insert(name.to_owned(), value.to_owned());
    }
    let input = desk.write("in.csv", &table(12));
    let (code, said) = desk.bulk(&input, &[]).await;
    assert_eq!((code, desk.sessions()), (0, 12), "{said}");
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
    let (mut desk, input) = Desk::with_links(3).await;
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

#[tokio::test]
async fn a_link_that_this_ledger_has_forgotten_is_not_made_again_over_it() {
    let (desk, input) = Desk::with_links(3).await;
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
    let (desk, _input) = Desk::with_links(1).await;
    let connection = rusqlite::Connection::open(desk.path("ledger.db")).unwrap();
    let said = "SELECT count(*) FROM meta WHERE name = 'retention.test.604800000'";
    assert_eq!(connection.query_row(said, [], |row| row.get::<_, i64>(0)).unwrap(), 1);
}

#[tokio::test]
async fn the_same_rows_under_other_ids_are_not_made_a_second_time() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", "product_id,Name\nprod_1,Ada\nprod_1,Bob\n");
    assert_eq!(desk.bulk(&input, &["--request-id-prefix", "autumn-"]).await.0, 0);
    let made = desk.read("links.csv");
    let (code, said) = desk.bulk(&input, &["--request-id-prefix", "autum-"]).await;
    assert!(code == 1 && said.contains("its first row is autumn-"), "{said}");
    assert_eq!((desk.read("links.csv"), desk.sessions()), (made, 2));
    // With other metadata they are other jobs.
    let flags = ["--request-id-prefix", "autumn-", "--metadata", "a=b"];
    let (code, said) = desk.bulk(&input, &flags).await;
    assert!(code == 1 && said.contains("A conflict:"), "{said}");
    assert_eq!(desk.sessions(), 2);
}

#[tokio::test]
async fn a_row_without_an_id_keeps_its_link_wherever_it_is_and_nobody_is_given_anothers() {
    let desk = Desk::new().await;
    let run = async |rows: &[&str], out: &str| {
        let lines: Vec<String> = rows.iter().map(|name| format!("{name},prod_1\n")).collect();
        let input = desk.write("in.csv", &format!("Name,product_id\n{}", lines.concat()));
        let out = desk.path(out).display().to_string();
        let arguments = ["bulk", &input, "--out", &out, "--request-id-prefix", "autumn-"];
        let (code, _, said) = command(&arguments, desk.settings.clone(), "").await;
        (code, said)
    };
    let links = |out: &str| -> BTreeMap<String, String> {
        cells(&desk.read(out)).into_iter().map(|row| (row[0].clone(), row[3].clone())).collect()
    };
    assert_eq!(run(&["Ada", "Bob", "Cy"], "links.csv").await.0, 0);
    let made = links("links.csv");
    // Moved, and somebody put in between.
    let (code, said) = run(&["Cy", "Eve", "Ada", "Bob"], "links.csv").await;
    assert_eq!((code, desk.sessions()), (0, 4), "{said}");
    let with_eve = links("links.csv");
    assert!(made.iter().all(|(name, link)| with_eve[name] == *link), "{with_eve:?}");
    assert!(!made.values().any(|link| *link == with_eve["Eve"]));
    // The same in another file, and somebody in another one's place.
    assert_eq!(run(&["Ada", "Fay", "Cy"], "others.csv").await.0, 0);
    let others = links("others.csv");
    assert_eq!((&others["Ada"], &others["Cy"]), (&made["Ada"], &made["Cy"]));
    assert!(!with_eve.values().any(|link| *link == others["Fay"]));
    // Who is not in the table any more keeps the file as it is.
    let (code, said) = run(&["Ada", "Gus", "Cy"], "links.csv").await;
    assert!(code == 1 && said.contains("links.csv stays as it was"), "{said}");
    assert_eq!(links("links.csv"), with_eve);
    // And as soon as all are back, the file is whole again; what was made for others is told and is in the ledger.
    let (code, said) = run(&["Cy", "Eve", "Ada", "Bob"], "links.csv").await;
    assert!(
        code == 0 && said.contains("1 link for rows that are not in the table any more"),
        "{said}"
    );
    assert_eq!(links("links.csv"), with_eve);
    let sessions = desk.sessions();
    assert_eq!(run(&["Ada", "Gus", "Cy"], "others of Gus.csv").await.0, 0);
    assert_eq!(desk.sessions(), sessions, "Gus has the link that was made for him");
}

#[tokio::test]
async fn two_prefixes_and_ids_never_come_to_the_same() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", &table(2));
    for prefix in ["2026-1", "wave", "-", ""] {
        let (code, said) = desk.bulk(&input, &["--request-id-prefix", prefix]).await;
        assert!(code == 2 && said.contains(" with -"), "{prefix}: {said}");
    }
    assert_eq!(desk.sessions(), 0);
}

#[tokio::test]
async fn a_row_that_is_tried_again_and_again_does_not_hold_the_others() {
    const ROWS: usize = 6_000;
    let mut desk = Desk::new().await;
    desk.settings.insert("CHECKOUT_WORKER__RETRY__FIRST".into(), "60s".into());
    desk.settings.insert("CHECKOUT_WORKER__RETRY__LONGEST".into(), "60s".into());
    desk.script(r#"{"faults":[{"request_id":"r-0","kind":"status","status":429}]}"#);
    let input = desk.write("in.csv", &table(ROWS));
    let process = desk.start(&input);
    let all = || async { desk.sessions() == ROWS - 1 };
    eventually("all others have their links", all).await;
    process.kill().await;
}

#[tokio::test]
async fn a_row_with_an_id_of_its_own_keeps_its_link_when_its_other_cells_are_mended() {
    let (desk, _) = Desk::with_links(3).await;
    let made = desk.read("links.csv");
    let input = desk.write("in.csv", &table(3).replace("somebody 1", "somebody else"));
    let (code, said) = desk.bulk(&input, &[]).await;
    assert_eq!((code, desk.sessions()), (0, 3), "{said}");
    assert_eq!(desk.read("links.csv"), made.replace("somebody 1", "somebody else"));
}

#[tokio::test]
async fn an_output_whose_links_a_smaller_table_does_not_have_stays_as_it_is() {
    let (mut desk, input) = Desk::with_links(3).await;
    let made = desk.read("links.csv");
    for rows in [0, 2] {
        desk.write("in.csv", &table(rows));
        let (code, said) = desk.bulk(&input, &[]).await;
        assert!(code == 1 && said.contains("links.csv stays as it was"), "{said}");
        assert_eq!(desk.read("links.csv"), made);
    }
    // Nor is one lost to a conflict.
    desk.write("in.csv", &table(3).replace("r-1,prod_1", "r-1,prod_2"));
    let (code, said) = desk.bulk(&input, &[]).await;
    assert!(
        code == 1 && said.contains("for instance that of r-1") && said.contains("conflict"),
        "{said}"
    );
    assert_eq!(desk.read("links.csv"), made);
    // The guard against another ledger is as it was.
    desk.write("in.csv", &table(3));
    let elsewhere = format!("sqlite:{}", desk.path("other.db").display());
    let own = desk.settings.insert("LEDGER_URL".to_owned(), elsewhere);
    assert_eq!(desk.bulk(&input, &[]).await.0, 1);
    desk.settings.insert("LEDGER_URL".to_owned(), own.unwrap());
    let (code, said) = desk.bulk(&input, &[]).await;
    assert_eq!((code, desk.sessions()), (0, 3), "{said}");
    assert_eq!(desk.read("links.csv"), made);
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

#[tokio::test]
async fn links_are_guarded_in_outputs_that_a_spreadsheet_has_saved_again() {
    // Without the empty cells at the ends of lines; with other line breaks; without the last one.
    let saved: [fn(&str) -> String; 3] = [
        |text| text.replace(",,\r\n", "\r\n"),
        |text| text.replace('\r', ""),
        |text| text.trim_end().to_owned(),
    ];
    for (at, saved) in saved.iter().enumerate() {
        let mut desk = Desk::new().await;
        let input = desk.write("in.csv", &table(3).replace('\n', "\r\n"));
        assert_eq!(desk.bulk(&input, &[]).await.0, 0);
        let text = saved(&desk.read("links.csv"));
        let elsewhere = format!("sqlite:{}", desk.path("other.db").display());
        let own = desk.settings.insert("LEDGER_URL".into(), elsewhere).unwrap();
        for last_alone in [false, true] {
            let text =
                if last_alone { text.replace("succeeded,ch_", "failed,ch_") } else { text.clone() };
            let text =
                text.replacen("r-2,prod_1,somebody 2,failed", "r-2,prod_1,somebody 2,succeeded", 1);
            desk.write("links.csv", &text);
            let (code, said) = desk.bulk(&input, &[]).await;
            assert!(code == 1 && said.contains("would be made a second time"), "{at}: {said}");
            assert_eq!((desk.read("links.csv"), desk.sessions()), (text, 3), "{at}");
        }
        // With the ledger that made them they are no obstacle.
        desk.settings.insert("LEDGER_URL".into(), own);
        assert_eq!((desk.bulk(&input, &[]).await.0, desk.sessions()), (0, 3), "{at}");
    }
}

#[tokio::test]
async fn a_part_with_other_line_breaks_is_asked_for_again_and_no_line_is_torn() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", &table(3).replace('\n', "\r\n"));
    assert_eq!(desk.bulk(&input, &[]).await.0, 0);
    let whole = desk.read("links.csv");
    std::fs::remove_file(desk.path("links.csv")).unwrap();
    // Stopped before its first row, it leaves what it was made with.
    desk.script(r#"{"latency_ms":60000}"#);
    let input_of_all = desk.write("in.csv", &(table(4).replace('\n', "\r\n")));
    assert_eq!(input_of_all, input);
    let process = desk.start(&input);
    soon("its call", desk.simulator.posts_arrived(4)).await;
    process.kill().await;
    desk.script(r#"{"latency_ms":0}"#);
    desk.write("links.csv.part", &whole.replace('\r', ""));
    let (code, said) = desk.bulk(&input, &[]).await;
    assert_eq!(code, 0, "{said}");
    let text = desk.read("links.csv");
    assert!(text.starts_with(&whole), "{text}");
    assert_eq!(cells(&text).len(), 4);
}

#[tokio::test]
async fn what_takes_the_name_of_a_part_is_not_put_in_the_outputs_place() {
    let desk = Desk::new().await;
    let (mut process, mut writing) = desk.start_piped();
    let written = || async {
        desk.path("links.csv.part").exists() && cells(&desk.read("links.csv.part")).len() == 3
    };
    eventually("all are written", written).await;
    // As an editor saves.
    let saved = desk.write("saved", "request_id\nsomething else\n");
    std::fs::rename(&saved, desk.path("links.csv.part")).unwrap();
    writing.write_all(b"r-3,prod_1,x\n").unwrap();
    drop(writing);
    assert_eq!(process.ended().await, 1);
    assert!(!desk.path("links.csv").exists());
}
