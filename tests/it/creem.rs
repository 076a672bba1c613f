//! The client against a Creem over real HTTP: what is sent, and what each answer is taken for.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::support::tls::{self, Authority};
use creem_checkout_worker::creem::{Answer, Client, KeyCheck, Options};
use creem_checkout_worker::job::{CheckoutRequest, Mode, RequestId, Rules};
use creem_checkout_worker::simulator::script::Script;
use creem_checkout_worker::simulator::{self, Simulator};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

async fn simulator() -> Arc<Simulator> {
    let any: SocketAddr = ([127, 0, 0, 1], 0).into();
    let (simulator, serve) = Simulator::start(any, simulator::Options::default()).await.unwrap();
    tokio::spawn(serve);
    simulator
}

fn options(base: &str) -> Options {
    Options {
        base_url: base.parse().unwrap(),
        api_key: "creem_test_canary".to_owned().into(),
        mode: Mode::Test,
        request_timeout: Duration::from_millis(1_500),
        proxy: None,
        ca_pem: None,
        concurrency: 8,
        checkout_hosts: Vec::new(),
    }
}

fn client(base: &str) -> Client {
    Client::new(&options(base)).unwrap()
}

async fn ask(client: &Client, id: &str) -> Answer {
    let body = format!(r#"{{"request_id":"{id}","product_id":"prod_1"}}"#);
    let id = RequestId::parse(id).unwrap();
    client.create_checkout(&id, body.into_bytes(), Duration::from_secs(60)).await
}

#[tokio::test]
async fn each_fault_of_the_simulator_has_its_class() {
    let simulator = simulator().await;
    let client = client(&simulator.url());
    for (fault, label, sessions) in [
        (r#""kind":"throttle""#, "throttled", 0),
        (r#""kind":"throttle","retry_after":"7""#, "throttled", 0),
        (r#""kind":"status","status":400"#, "refused", 0),
        (r#""kind":"status","status":401"#, "key_refused", 0),
        (r#""kind":"status","status":403"#, "key_refused", 0),
        (r#""kind":"status","status":404"#, "refused", 0),
        (r#""kind":"status","status":500"#, "unknown", 0),
        (r#""kind":"status","status":302"#, "unknown", 0),
        (r#""kind":"hang""#, "unknown", 0),
        (r#""kind":"cut""#, "unknown", 0),
        (r#""kind":"status_after","status":502"#, "unknown", 1),
        (r#""kind":"hang_after""#, "unknown", 1),
        (r#""kind":"cut_after""#, "unknown", 1),
        (r#""kind":"cut_body""#, "unknown", 1),
        (r#""kind":"drip","milliseconds":50"#, "unknown", 1),
        (r#""kind":"drip","milliseconds":1"#, "made", 1),
        (r#""kind":"garbage""#, "unknown", 1),
        (r#""kind":"html""#, "unknown", 1),
        (r#""kind":"huge""#, "unknown", 1),
        (r#""kind":"wrong_id""#, "mismatch", 1),
        (r#""kind":"wrong_mode""#, "mismatch", 1),
        (r#""kind":"plain_url""#, "mismatch", 1),
        (r#""kind":"no_url""#, "linkless", 1),
    ] {
        let before = simulator.log().sessions().len();
        simulator.set_script(
            Script::parse(format!(r#"{{"faults":[{{"request_id":"a",{fault}}}]}}"#).as_bytes())
                .unwrap(),
        );
        let posts = simulator.log().posts().len();
        let answer = ask(&client, "a").await;
        assert_eq!(answer.label(), label, "{fault}: {answer:?}");
        assert_eq!(simulator.log().sessions().len() - before, sessions, "{fault}");
        assert_eq!(simulator.log().posts().len() - posts, 1, "{fault}: no hidden retry");
    }
}

#[tokio::test]
async fn retry_after_is_read() {
    let simulator = simulator().await;
    simulator.set_script(
        Script::parse(br#"{"faults":[{"request_id":"a","kind":"throttle","retry_after":"7"}]}"#)
            .unwrap(),
    );
    let answer = ask(&client(&simulator.url()), "a").await;
    assert_eq!(answer, Answer::Throttled { retry_after: Some(Duration::from_secs(7)) });
}

#[tokio::test]
async fn nobody_there_is_certainly_not_made() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let answer = ask(&client(&format!("http://{closed}")), "a").await;
    assert_eq!(answer.label(), "not_made", "{answer:?}");
    let answer = ask(&client("http://name.that.does.not.exist.invalid"), "a").await;
    assert_eq!(answer.label(), "not_made", "{answer:?}");
}

#[tokio::test]
async fn the_key_check_tells_accepted_refused_and_unknown_apart() {
    let simulator = simulator().await;
    let client = client(&simulator.url());
    assert_eq!(client.check_key().await, KeyCheck::Accepted);
    simulator.accept_only("creem_test_other");
    assert_eq!(client.check_key().await, KeyCheck::Refused(403));
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let client = self::client(&format!("http://{closed}"));
    assert!(matches!(client.check_key().await, KeyCheck::Unknown(_)));
}

/// Answers one connection with fixed bytes and returns what was asked.
async fn one_answer(answer: &'static str) -> (String, tokio::task::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        while !seen.windows(2).any(|end| end == b"\"}") {
            let count = stream.read(&mut buffer).await.unwrap();
            if count == 0 {
                break;
            }
            seen.extend_from_slice(&buffer[..count]);
        }
        stream.write_all(answer.as_bytes()).await.unwrap();
        String::from_utf8_lossy(&seen).into_owned()
    });
    (url, asked)
}

#[tokio::test]
async fn a_redirect_is_never_followed_with_the_key_and_the_body() {
    let other = simulator().await;
    let location: &'static str = Box::leak(
        format!("HTTP/1.1 307 Temporary Redirect\r\nlocation: {}/v1/checkouts\r\ncontent-length: 0\r\n\r\n", other.url())
            .into_boxed_str(),
    );
    let (url, asked) = one_answer(location).await;
    assert_eq!(ask(&client(&url), "a").await.label(), "unknown");
    asked.await.unwrap();
    assert_eq!(other.log().posts().len(), 0);
}

#[tokio::test]
async fn the_request_carries_what_the_contract_names() {
    let (url, asked) = one_answer("HTTP/1.1 500 x\r\ncontent-length: 0\r\n\r\n").await;
    ask(&client(&url), "job-42").await;
    let request = asked.await.unwrap();
    let head: BTreeMap<String, String> = request
        .lines()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    assert!(request.starts_with("POST /v1/checkouts HTTP/1.1"));
    assert_eq!(head["x-api-key"], "creem_test_canary");
    assert_eq!(head["idempotency-key"], "job-42");
    assert_eq!(head["content-type"], "application/json");
    assert!(head["user-agent"].starts_with("creem-checkout-worker/"));
    assert!(!head.contains_key("accept-encoding"), "answers are not decompressed: {request}");
}

#[tokio::test]
async fn a_configured_proxy_is_used() {
    let (url, asked) = one_answer("HTTP/1.1 500 x\r\ncontent-length: 0\r\n\r\n").await;
    let proxied = Options { proxy: Some(url.parse().unwrap()), ..options("http://creem.invalid") };
    ask(&Client::new(&proxied).unwrap(), "a").await;
    let request = asked.await.unwrap();
    assert!(request.starts_with("POST http://creem.invalid/v1/checkouts"), "{request}");
}

#[tokio::test]
async fn a_flood_of_interim_answers_ends_at_the_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let flood = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        while stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.is_ok() {}
    });
    assert_eq!(ask(&client(&url), "a").await.label(), "unknown");
    flood.abort();
}

/// The bodies that Creem's own SDK (npm `creem` 1.13.0) sent for the same requests; written by
/// tests/sdk/capture.mjs.
const SDK: &str = include_str!("../fixtures/creem-sdk-bodies.ndjson");

#[test]
fn for_every_field_the_body_equals_the_sdks() {
    let rules = Rules { allow_custom_price: true, allow_affiliate_code: true, ..Rules::default() };
    // Here the worker refuses on purpose what the SDK would send.
    let ours_is_stricter = ["success_url_unicode", "request_id_punctuation", "request_id_unicode"];
    let mut compared = 0;
    for line in SDK.split('\n').filter(|line| !line.is_empty()) {
        let (name, job, expected) = parts(line);
        if ours_is_stricter.contains(&name.as_str()) {
            continue;
        }
        let request = CheckoutRequest::parse(job.as_bytes(), &rules)
            .unwrap_or_else(|why| panic!("{name}: {why}"));
        assert_eq!(String::from_utf8(request.wire).unwrap(), expected, "{name}");
        compared += 1;
    }
    assert!(compared >= 50, "{compared}");
}

/// Name, job text and body text of a line; the job's text is kept as it is written.
fn parts(line: &str) -> (String, String, String) {
    #[derive(serde::Deserialize)]
    struct Line<'a> {
        name: String,
        #[serde(borrow)]
        job: &'a serde_json::value::RawValue,
        body: String,
    }
    let line: Line<'_> = serde_json::from_str(line).unwrap();
    (line.name, line.job.get().to_owned(), line.body)
}

#[tokio::test]
async fn a_private_authority_is_trusted_only_where_it_is_configured() {
    let simulator = simulator().await;
    let to: SocketAddr = simulator.url().trim_start_matches("http://").parse().unwrap();
    let (authority, stranger) = (Authority::new(), Authority::new());
    let good = tls::relay(&authority.issue("127.0.0.1"), to).await;
    let elsewhere = tls::relay(&authority.issue("creem.example"), to).await;
    let with = |address: SocketAddr, ca: Option<&Authority>| {
        let ca_pem = ca.map(|ca| ca.pem().into_bytes());
        let options = Options { ca_pem, ..options(&format!("https://{address}")) };
        Client::new(&options).unwrap()
    };
    assert_eq!(ask(&with(good, Some(&authority)), "a").await.label(), "made");
    for (client, what) in [
        (with(good, None), "no authority"),
        (with(good, Some(&stranger)), "another authority"),
        (with(elsewhere, Some(&authority)), "another host's certificate"),
    ] {
        // The handshake comes before the first byte of a request: certainly nothing was made.
        let answer = ask(&client, "b").await;
        let Answer::NotMade { reason } = answer else { panic!("{what}: {answer:?}") };
        assert!(reason.contains("certificate"), "{what}: {reason}");
    }
    assert_eq!(simulator.log().posts().len(), 1);
    let nothing = Options { ca_pem: Some(b"no certificate".to_vec()), ..options("https://[::1]") };
    assert!(Client::new(&nothing).unwrap_err().to_string().contains("creem.ca_file"));
}

#[tokio::test]
async fn a_host_that_does_not_know_creems_paths_accepts_no_key() {
    let simulator = simulator().await;
    let elsewhere = client(&format!("{}/somewhere", simulator.url()));
    let KeyCheck::Unknown(reason) = elsewhere.check_key().await else { panic!("it is not Creem") };
    assert!(reason.contains("creem.base_url"), "{reason}");
    assert_eq!(client(&simulator.url()).check_key().await, KeyCheck::Accepted);
}
