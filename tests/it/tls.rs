//! The broker and the database over TLS, with good and bad certificates.

use std::net::SocketAddr;
use std::path::PathBuf;

use lapin::uri::AMQPUri;

use crate::support::postgres::{administrator, with_tls};
use crate::support::tls::{self, Authority};
use crate::support::{World, eventually, next, soon};

fn file(world: &World, name: &str, text: &str) -> String {
    let path: PathBuf = world.directory.path().join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

async fn address(host: &str, port: u16) -> SocketAddr {
    tokio::net::lookup_host((host, port)).await.unwrap().next().unwrap()
}

async fn broker(world: &World) -> (SocketAddr, String) {
    let uri: AMQPUri = world.environment()["AMQP_URL"].parse().unwrap();
    let user = format!("{}:{}", uri.authority.userinfo.username, uri.authority.userinfo.password);
    (address(&uri.authority.host, uri.authority.port).await, user)
}

fn encrypted(world: &mut World, user: &str, address: SocketAddr) {
    world.settings.insert("AMQP_URL".into(), format!("amqps://{user}@{address}/%2f"));
}

/// A worker that must not get in, for a reason that is said, and that leaves nothing behind with
/// each try.
async fn is_kept_out(world: &World, what: &str) {
    let worker = world.worker_unready(&[]);
    for _ in 0..3 {
        soon(what, worker.logged("the publishing connection is down")).await;
    }
    let said = worker.logged("the publishing connection is down").await;
    let error = said["error"].as_str().unwrap().to_lowercase();
    assert!(error.contains("certificate") || error.contains("alert"), "{what}: {error}");
    assert_eq!(worker.get("/readyz").await.0, 503, "{what}");
    let threads = || std::fs::read_dir(format!("/proc/{}/task", worker.pid)).unwrap().count();
    assert!(threads() < 30, "{what}: {} threads", threads());
}

#[tokio::test]
async fn the_broker_is_trusted_by_a_configured_authority_only() {
    let Some(mut world) = World::new("amqps").await else { return };
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (to, user) = broker(&world).await;
    let good = tls::relay(&authority.issue("127.0.0.1"), to).await;
    let elsewhere = tls::relay(&authority.issue("rabbit.example"), to).await;
    encrypted(&mut world, &user, good);
    is_kept_out(&world, "no authority").await;
    let path = file(&world, "stranger.pem", &stranger.pem());
    world.set("amqp.ca_file", &path);
    is_kept_out(&world, "another authority").await;
    let path = file(&world, "ca.pem", &authority.pem());
    world.set("amqp.ca_file", &path);
    encrypted(&mut world, &user, elsewhere);
    is_kept_out(&world, "another host's certificate").await;
    encrypted(&mut world, &user, good);
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    world.job("a").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
}

#[tokio::test]
async fn a_broker_that_asks_for_a_certificate_gets_the_workers() {
    let Some(mut world) = World::new("amqps_mutual").await else { return };
    let (authority, clients, stranger) = (Authority::new(), Authority::new(), Authority::new());
    let (to, user) = broker(&world).await;
    let relay = tls::mutual_relay(&authority.issue("127.0.0.1"), &clients, to).await;
    let path = file(&world, "ca.pem", &authority.pem());
    world.set("amqp.ca_file", &path);
    encrypted(&mut world, &user, relay);
    for (issuer, welcome) in [(None, false), (Some(&stranger), false), (Some(&clients), true)] {
        if let Some(issuer) = issuer {
            let own = issuer.issue("checkout-worker");
            let certificate = file(&world, "own.pem", &own.certificate);
            let key = file(&world, "own.key", &own.key);
            world.set("amqp.client_cert_file", &certificate).set("amqp.client_key_file", &key);
        }
        if welcome {
            let _worker = world.worker().await;
        } else {
            let worker = world.worker_unready(&[]);
            soon("it is kept out", worker.logged("the publishing connection is down")).await;
            assert_eq!(worker.get("/readyz").await.0, 503);
        }
    }
}

/// PostgreSQL's TLS begins within its own protocol, so the server itself must speak it.
#[tokio::test]
async fn the_database_is_trusted_by_a_configured_authority_only() {
    let authority = Authority::new();
    let own = authority.issue("127.0.0.1");
    let Some(database) = with_tls("tls", &own.certificate, &own.key).await else {
        return;
    };
    let Some(mut world) = World::new("pg_tls").await else { return };
    let url = format!("{}?sslmode=require", database.url);
    world.settings.insert("LEDGER_URL".into(), url);
    let stranger = file(&world, "stranger.pem", &Authority::new().pem());
    for ca in [None, Some(stranger)] {
        if let Some(ca) = ca {
            world.set("ledger.ca_file", &ca);
        }
        let worker = world.worker_unready(&[]);
        let said = soon("it waits", worker.logged("the ledger is not there")).await;
        assert!(said["error"].as_str().unwrap().contains("certificate"), "{said}");
        eventually("it is not ready", || async { worker.get("/readyz").await.0 == 503 }).await;
    }
    let path = file(&world, "ca.pem", &authority.pem());
    world.set("ledger.ca_file", &path);
    let _worker = world.worker().await;
    let mut replies = world.replies().await;
    world.job("a").await;
    assert_eq!(next(&mut replies).await.status(), "succeeded");
    // It asks for nothing less than TLS.
    let client = administrator(&database).await;
    let row = client
        .query_one(
            "SELECT bool_and(s.ssl) FROM pg_stat_ssl AS s JOIN pg_stat_activity AS a USING (pid)
             WHERE a.application_name = 'checkout-worker'",
            &[],
        )
        .await
        .unwrap();
    assert!(row.get::<_, bool>(0));
}

#[tokio::test]
async fn a_broker_that_speaks_no_tls_is_told_apart_from_one_that_refuses() {
    let Some(mut world) = World::new("no_tls").await else { return };
    let url = world.environment()["AMQP_URL"].replace("amqp://", "amqps://");
    world.settings.insert("AMQP_URL".into(), url);
    let worker = world.worker_unready(&[]);
    let said = |event: &serde_json::Value| {
        event["error"].as_str().is_some_and(|text| text.contains("it speaks no TLS"))
    };
    soon("it says so", worker.event(said)).await;
}
