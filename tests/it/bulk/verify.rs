//! Links that are looked at again, and renewed.

use super::{Desk, cells, forget, table};
use crate::cli::command;
use crate::support::eventually;

#[tokio::test]
async fn a_look_at_links_loses_none_in_the_file_that_it_is_written_over() {
    let (desk, _input) = Desk::with_links(2).await;
    let links = desk.path("links.csv").display().to_string();
    let other = desk.read("links.csv").replace("r-0,", "x-0,").replace("ch_", "ch_precious_");
    let onto = desk.write("other.csv", &other);
    let verify = ["bulk", &links, "--out", &onto, "--verify"];
    let (code, _, said) = command(&verify, desk.settings.clone(), "").await;
    assert!(code == 1 && said.contains("it would be lost"), "{said}");
    assert_eq!(desk.read("other.csv"), other);
    // Nor where its part is a file that has another name as well.
    let text = desk.read("links.csv");
    std::fs::hard_link(desk.path("links.csv"), desk.path("fresh.csv.part")).unwrap();
    let (code, said) = desk.verify("links.csv", "fresh.csv", &[]).await;
    assert!(code == 1 && said.contains("another name as well"), "{said}");
    assert_eq!(desk.read("links.csv"), text);
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
async fn dead_links_are_found_and_renewed_under_an_id_that_follows_from_theirs() {
    let (desk, _input) = Desk::with_links(4).await;
    let links = desk.path("links.csv").display().to_string();
    let rows = cells(&desk.read("links.csv"));
    {
        let mut log = desk.simulator.log();
        for (row, status) in [(0, "expired"), (1, "completed"), (3, "gone")] {
            assert!(log.set_status(&rows[row][4], status));
        }
    }
    // Somebody has edited it since.
    let edited = desk.read("links.csv").replace("somebody 2", "=1+1");
    desk.write("links.csv", &edited);
    let checked = desk.path("checked.csv").display().to_string();
    let verify = ["bulk", &links, "--out", &checked, "--verify"];
    let (code, _, said) = command(&verify, desk.settings.clone(), "").await;
    assert_eq!(code, 1, "{said}");
    assert!(desk.read("checked.csv").contains(",'=1+1,"), "no formula");
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
    let (mut desk, _input) = Desk::with_links(3).await;
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
    let (desk, _input) = Desk::with_links(1).await;
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
async fn nothing_is_made_beside_a_later_link_that_the_ledger_has_forgotten() {
    let (desk, _input) = Desk::with_links(1).await;
    let refresh = ["--refresh"];
    let rows = |name: &str| cells(&desk.read(name));
    desk.set_status(&rows("links.csv")[0], "expired");
    assert_eq!(desk.verify("links.csv", "renewed.csv", &refresh).await.0, 0);
    desk.set_status(&rows("renewed.csv")[0], "expired");
    assert_eq!(desk.verify("links.csv", "renewed.csv", &refresh).await.0, 0);
    let (renewed, made) = (desk.read("renewed.csv"), desk.sessions());
    assert_eq!(rows("renewed.csv")[0][0], "r-0.r2");
    // A ledger from before it was renewed knows neither.
    for id in ["r-0.r1", "r-0.r2"] {
        forget(&desk.path("ledger.db"), id);
    }
    let (code, said) = desk.verify("links.csv", "renewed.csv", &refresh).await;
    assert!(code == 1 && said.contains("r-0.r2: no new link: the output has one"), "{said}");
    assert_eq!((desk.read("renewed.csv"), desk.sessions()), (renewed, made));
}

#[tokio::test]
async fn rows_of_one_job_are_renewed_together() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", "request_id,product_id,Name\nr-0,prod_1,a\nr-0,prod_1,b\n");
    // That an id came twice is told.
    assert_eq!(desk.bulk(&input, &[]).await.0, 1);
    desk.set_status(&cells(&desk.read("links.csv"))[0], "expired");
    let (code, said) = desk.verify("links.csv", "renewed.csv", &["--refresh"]).await;
    assert!(code == 0 && said.contains("2 rows: 2 renewed"), "{said}");
    assert_eq!(desk.sessions(), 2);
    let renewed = cells(&desk.read("renewed.csv"));
    assert_eq!((renewed[0][0].as_str(), &renewed[0][4]), ("r-0.r1", &renewed[1][4]));
}

#[tokio::test]
async fn a_link_that_creem_does_not_show_yet_is_not_renewed_by_another_row_of_its_job() {
    let desk = Desk::new().await;
    let rows = "r-0,prod_1,a\n".repeat(400);
    let input = desk.write("in.csv", &format!("request_id,product_id,Name\n{rows}"));
    assert_eq!(desk.bulk(&input, &[]).await.0, 1);
    desk.set_status(&cells(&desk.read("links.csv"))[0], "expired");
    let hides = async {
        let second = eventually("a second session", || async { desk.sessions() == 2 });
        second.await;
        let new = desk.simulator.log().sessions()[1].id.clone();
        assert!(desk.simulator.log().set_status(&new, "gone"));
        std::future::pending::<()>().await;
    };
    let (code, said) = tokio::select! {
        ended = desk.verify("links.csv", "renewed.csv", &["--refresh"]) => ended,
        () = hides => unreachable!("it never ends"),
    };
    assert!(code == 0 && said.contains("400 rows: 400 renewed"), "{said}");
    assert_eq!(desk.sessions(), 2);
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
async fn links_that_an_interrupted_look_has_made_are_not_made_again() {
    let (desk, _input) = Desk::with_links(2).await;
    for row in cells(&desk.read("links.csv")) {
        desk.set_status(&row, "expired");
    }
    let refresh = ["--refresh"];
    assert_eq!(desk.verify("links.csv", "checked.csv", &refresh).await.0, 0);
    assert_eq!(desk.sessions(), 4);
    // As one leaves it that was interrupted in its last line; then the ledger is an older one.
    let text = desk.read("checked.csv");
    let torn = &text[..text.len() - 3];
    std::fs::remove_file(desk.path("checked.csv")).unwrap();
    desk.write("checked.csv.part", torn);
    forget(&desk.path("ledger.db"), "r-0.r1");
    for _ in 0..2 {
        let (code, said) = desk.verify("links.csv", "checked.csv", &refresh).await;
        assert!(code == 1 && said.contains("r-0.r1: no new link"), "{said}");
        assert_eq!(desk.sessions(), 4, "{said}");
    }
    assert!(desk.path("checked.csv.part.before").exists() && !desk.path("checked.csv").exists());
}

#[tokio::test]
async fn a_link_in_another_lines_cells_is_not_renewed() {
    let (desk, _input) = Desk::with_links(2).await;
    let text = desk.read("links.csv");
    let rows = cells(&text);
    desk.set_status(&rows[1], "expired");
    // As if one column had been sorted alone.
    let moved = text.replace(&rows[0][4], "a").replace(&rows[1][4], &rows[0][4]);
    desk.write("links.csv", &moved.replace(",a,", &format!(",{},", rows[1][4])));
    let (code, said) = desk.verify("links.csv", "checked.csv", &["--refresh"]).await;
    assert!(code == 1 && said.contains("another link for r-0"), "{said}");
    assert_eq!(desk.sessions(), 2);
}

#[tokio::test]
async fn no_line_is_given_the_link_of_one_whose_id_looks_like_a_renewal() {
    let desk = Desk::new().await;
    let text = "request_id,product_id,Name\nfair.r1,prod_1,Ann\nfair.r2,prod_1,Bob\n";
    let input = desk.write("in.csv", text);
    assert_eq!(desk.bulk(&input, &[]).await.0, 0);
    let session = cells(&desk.read("links.csv"))[0][4].clone();
    assert!(desk.simulator.log().set_status(&session, "expired"));
    let (code, said) = desk.verify("links.csv", "checked.csv", &["--refresh"]).await;
    assert!(code == 1 && said.contains("more than one line is called fair or fair.rN"), "{said}");
    assert_eq!(desk.sessions(), 2);
}

#[tokio::test]
async fn a_row_without_an_id_of_its_own_is_renewed_as_well() {
    let desk = Desk::new().await;
    let input = desk.write("in.csv", "Name,product_id\nAda,prod_1\nBob,prod_1\nBob,prod_1\n");
    let flags = ["--request-id-prefix", "autumn-", "--product", "prod_1"];
    assert_eq!(desk.bulk(&input, &flags).await.0, 0);
    let before = cells(&desk.read("links.csv"));
    for row in [&before[0], &before[2]] {
        assert!(desk.simulator.log().set_status(&row[3], "expired"));
    }
    let (code, said) =
        desk.verify("links.csv", "checked.csv", &["--refresh", flags[2], flags[3]]).await;
    assert_eq!((code, desk.sessions()), (0, 5), "{said}");
    let after = cells(&desk.read("checked.csv"));
    for (row, renewed) in [(0, true), (1, false), (2, true)] {
        let (was, now) = (&before[row], &after[row]);
        assert_eq!(now[3] != was[3], renewed, "{row}: {now:?}");
        let id = if renewed { format!("{}.r1", was[7]) } else { was[7].clone() };
        assert_eq!((&now[0], &now[7]), (&was[0], &id), "{row}");
    }
    // The table itself is as it was: it knows nothing of the new ones, and makes none again.
    assert_eq!((desk.bulk(&input, &flags).await.0, desk.sessions()), (0, 5));
}

#[tokio::test]
async fn links_are_looked_at_no_faster_than_calls_are_made() {
    let (mut desk, _input) = Desk::with_links(5).await;
    desk.settings.insert("CHECKOUT_WORKER__RATE_LIMIT__PER_SECOND".into(), "2".into());
    let began = tokio::time::Instant::now();
    let (code, said) = desk.verify("links.csv", "checked.csv", &[]).await;
    assert_eq!(code, 0, "{said}");
    assert!(began.elapsed() >= std::time::Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_mere_look_is_not_written_over_links_that_another_one_has_renewed() {
    let (desk, _input) = Desk::with_links(1).await;
    desk.set_status(&cells(&desk.read("links.csv"))[0], "expired");
    assert_eq!(desk.verify("links.csv", "checked.csv", &["--refresh"]).await.0, 0);
    let text = desk.read("checked.csv");
    let (code, said) = desk.verify("links.csv", "checked.csv", &[]).await;
    assert!(code == 1 && said.contains("has a link for r-0.r1"), "{said}");
    assert_eq!(desk.read("checked.csv"), text);
    // Nor is a refresh that does not find it again: its flags are other ones.
    let forgotten = ["--refresh", "--discount-code", "AUTUMN"];
    let (code, said) = desk.verify("links.csv", "checked.csv", &forgotten).await;
    assert!(code == 1 && said.contains("give the flags of the run that made it"), "{said}");
    assert_eq!(desk.read("checked.csv"), text);
    // Where it is renewed again, it may: the same link is found.
    assert_eq!(desk.verify("links.csv", "checked.csv", &["--refresh"]).await.0, 0);
    assert_eq!(desk.read("checked.csv").lines().count(), 2);
}

#[tokio::test]
async fn a_quote_that_is_left_open_in_a_file_of_links_is_told() {
    let (desk, _input) = Desk::with_links(3).await;
    desk.write("links.csv", &desk.read("links.csv").replace("somebody 1", "\"somebody 1"));
    let (code, said) = desk.verify("links.csv", "checked.csv", &[]).await;
    assert!(code == 1 && said.contains("line 3"), "{said}");
}
