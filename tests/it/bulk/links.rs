//! What a run makes of a file.

use std::collections::BTreeMap;

use super::{Desk, cells, table};
use crate::cli::command;
use crate::support::{eventually, soon};

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
        "prod_missing;;\"two\nlines\";;rejected;;;creem_rejected;Creem refused the request: Product not found;fair-ab3db3b4b9f284db",
        ";nobody;x;;invalid;;;email;column customer.email: ",
    ];
    let lines: Vec<&str> = text.split("\r\n").collect();
    assert_eq!(lines.len(), expected.len() + 1, "the last line ends, too: {text}");
    for (line, expected) in lines.iter().zip(expected) {
        assert!(line.starts_with(expected), "{line}");
    }
    let posts: Vec<String> =
        desk.simulator.log().posts().iter().map(|post| post.body.clone()).collect();
    let first = r#"{"request_id":"fair-eecf300da5cddd1b","product_id":"prod_1","customer":{"email":"a@b.example"},"metadata":{"source":"fair","year":"2026"}}"#;
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
    let refresh = ["bulk", "x.csv", "--dry-run", "--refresh"];
    assert_eq!(command(&refresh, BTreeMap::new(), "").await.0, 2, "it would check something else");
    assert_eq!(desk.simulator.log().posts().len(), 0);
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
    // Nor are real links written down in the sandbox's ledger.
    let mut settings = desk.settings.clone();
    let its_own = format!("{}.sandbox-ledger.db", desk.path("links.csv").display());
    settings.insert("LEDGER_URL".to_owned(), format!("sqlite:{its_own}"));
    let real = desk.arguments(&input, &[]);
    let real: Vec<&str> = real.iter().map(String::as_str).collect();
    for arguments in [&real[..], &["run"]] {
        let (code, _, said) = command(arguments, settings.clone(), "").await;
        assert!(code == 78 && said.contains("is the ledger of a sandbox"), "{said}");
    }
    assert_eq!(desk.simulator.log().posts().len(), 0);
    // Its links are none for buyers: the same command without it makes them.
    let (code, said) = desk.bulk(&input, &[]).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(desk.sessions(), 20);
    let text = desk.read("links.csv");
    assert!(cells(&text).iter().all(|row| row[5].starts_with(&desk.simulator.url())), "{text}");
}

#[tokio::test]
async fn a_link_that_is_no_sandboxs_is_guarded_though_others_of_the_output_are() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", &table(3));
    assert_eq!(desk.bulk(&input, &["--sandbox"]).await.0, 0);
    // Somebody has put a link into it that was made elsewhere.
    let text = desk.read("links.csv");
    let session = cells(&text)[2][4].clone();
    let mixed = text.replace(&session, "ch_of_elsewhere");
    desk.write("links.csv", &mixed);
    let (code, said) = desk.bulk(&input, &[]).await;
    assert!(code == 1 && said.contains("would be made a second time"), "{said}");
    assert_eq!((desk.read("links.csv"), desk.sessions()), (mixed, 0));
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
