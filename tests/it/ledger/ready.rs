//! What `check` asks of a database, before a worker would stumble over it.

use creem_checkout_worker::ledger::postgres::ready::{Ready, ready};
use creem_checkout_worker::ledger::postgres::{OpenError, Options, PostgresLedger, Time};

use crate::support::eventually;
use crate::support::postgres::{administrator, connect, database, shared};
use crate::support::private::POSTGRES;

fn options(url: &str) -> Options {
    Options { url: url.to_owned().into(), ca_pem: None }
}

async fn refusal(url: &str) -> String {
    match ready(&options(url)).await {
        Err(OpenError::Refused(text)) => text,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn each_right_that_is_missing_is_named_before_a_worker_starts() {
    let Some(server) = shared("ready").await else { return };
    let url = database(&server).await;
    let (place, name) = url.rsplit_once('/').unwrap();
    let (_, host) = place.rsplit_once('@').unwrap();
    let role = format!("role_of_{name}");
    let theirs = format!("postgres://{role}:of-the-test@{host}/{name}");
    let owner = connect(&url).await;
    let tell = async |sql: &str| {
        let sql = sql.replace("ROLE", &role).replace("DATABASE", &format!("DATABASE {name}"));
        owner.batch_execute(&sql).await.unwrap();
    };
    owner.batch_execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'of-the-test'")).await.unwrap();

    // Nothing there yet: whoever may make it will.
    assert_eq!(ready(&options(&url)).await.unwrap(), Ready::ToBeMade);
    assert!(refusal(&theirs).await.contains("may not create the schema"));
    tell("GRANT CREATE ON DATABASE TO ROLE").await;
    assert_eq!(ready(&options(&theirs)).await.unwrap(), Ready::ToBeMade);
    let nothing = "SELECT 1 FROM pg_namespace WHERE nspname = 'checkout_worker'";
    assert!(owner.query_opt(nothing, &[]).await.unwrap().is_none(), "asking changes nothing");

    // A schema that was made for it is enough.
    tell("REVOKE CREATE ON DATABASE FROM ROLE; CREATE SCHEMA checkout_worker").await;
    tell("GRANT USAGE, CREATE ON SCHEMA checkout_worker TO ROLE").await;
    assert_eq!(ready(&options(&theirs)).await.unwrap(), Ready::ToBeMade);
    PostgresLedger::open(&options(&theirs), Time::Database, |_| {}).await.unwrap();
    tell("DROP SCHEMA checkout_worker CASCADE").await;

    // Somebody else has made it.
    drop(PostgresLedger::open(&options(&url), Time::Database, |_| {}).await.unwrap());
    assert_eq!(ready(&options(&url)).await.unwrap(), Ready::Ledger);
    assert!(refusal(&theirs).await.contains("may not use the schema"));
    tell("GRANT USAGE ON SCHEMA checkout_worker TO ROLE").await;
    let text = refusal(&theirs).await;
    assert!(text.contains("SELECT on job") && text.contains("UPDATE on budget"), "{text}");
    tell("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA checkout_worker TO ROLE")
        .await;
    assert_eq!(ready(&options(&theirs)).await.unwrap(), Ready::Ledger);
    PostgresLedger::open(&options(&theirs), Time::Database, |_| {}).await.unwrap();

    tell("REVOKE DELETE ON checkout_worker.pause FROM ROLE").await;
    assert!(refusal(&theirs).await.ends_with("lacks DELETE on pause"));
    tell("GRANT DELETE ON checkout_worker.pause TO ROLE; REVOKE UPDATE ON checkout_worker.rate FROM ROLE").await;
    assert!(refusal(&theirs).await.ends_with("lacks UPDATE on rate"));
    tell("GRANT UPDATE ON checkout_worker.rate TO ROLE").await;
    tell("INSERT INTO checkout_worker.schema_step VALUES (1000, 1000, now())").await;
    let newer = ready(&options(&theirs)).await;
    assert!(matches!(newer, Err(OpenError::Newer { found: 1000, .. })), "{newer:?}");
    owner.batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await.unwrap();
}

#[tokio::test]
async fn a_database_that_could_forget_what_it_committed_is_refused() {
    let Some(server) = POSTGRES.start("forgetful").await else { return };
    let client = administrator(&server).await;
    let set = async |value: &str| {
        client
            .batch_execute(&format!("ALTER SYSTEM SET full_page_writes = {value}"))
            .await
            .unwrap();
        client.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        eventually("the setting is taken", || async {
            let row = administrator(&server).await.query_one("SHOW full_page_writes", &[]).await;
            row.unwrap().get::<_, &str>(0) == value
        })
        .await;
    };
    let url = options(&format!("{}?sslmode=disable", server.url));
    set("off").await;
    let refused = ready(&url).await;
    assert!(matches!(refused, Err(OpenError::NotDurable("full_page_writes"))), "{refused:?}");
    let refused = PostgresLedger::open(&url, Time::Database, |_| {}).await;
    assert!(matches!(refused, Err(OpenError::NotDurable(_))), "{refused:?}");
    set("on").await;
    assert_eq!(ready(&url).await.unwrap(), Ready::ToBeMade);
}
