//! `[creem]`: the key decides between Creem's two worlds, and everything else must agree with it.

use secrecy::{ExposeSecret as _, SecretString};
use url::Url;

use super::{Problem, Settings};
use crate::creem::{Client, Options};
use crate::job::Mode;
use crate::job::success_url::is_loopback;

/// What a run needs that is to make real links.
pub const NO_KEY: &str = "there is no Creem API key";

pub(super) fn check(settings: &Settings, problems: &mut Vec<Problem>) -> Option<Options> {
    let key = settings.creem.api_key.as_ref().filter(|key| !key.expose_secret().is_empty());
    if key.is_none() {
        problems.push(Problem::new(
            NO_KEY,
            "set CREEM_API_KEY, or CREEM_API_KEY_FILE to a file that holds it",
        ));
    }
    let mode = key.and_then(|key| mode_of(key, problems));
    let base_url = base_url(settings, mode, problems);
    let proxy = proxy(settings, problems);
    let ca_pem = settings.creem.ca_file.as_deref();
    let ca_pem = ca_pem.and_then(|path| super::pem("creem.ca_file", path, problems));
    let (key, mode, base_url) = (key?, mode?, base_url?);
    let sum =
        settings.lanes.interactive.concurrency.saturating_add(settings.lanes.bulk.concurrency);
    let options = Options {
        base_url,
        api_key: key.clone(),
        mode,
        request_timeout: settings.creem.request_timeout.0,
        proxy,
        ca_pem,
        concurrency: usize::try_from(sum).unwrap_or(1),
        checkout_hosts: settings.creem.checkout_hosts.clone(),
    };
    if let Err(error) = Client::new(&options) {
        problems.push(Problem::new(error.to_string(), "correct the setting that it names"));
    }
    Some(options)
}

fn proxy(settings: &Settings, problems: &mut Vec<Problem>) -> Option<Url> {
    let text = settings.creem.proxy.as_deref()?;
    let url = Url::parse(text).ok().filter(|url| ["http", "https"].contains(&url.scheme()));
    if url.is_none() {
        problems.push(Problem::new(
            "`creem.proxy` is not the URL of an HTTP proxy",
            "give http://host:port or https://host:port",
        ));
    }
    url
}

fn mode_of(key: &SecretString, problems: &mut Vec<Problem>) -> Option<Mode> {
    let key = key.expose_secret();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    if !key.bytes().all(plain) || key.len() > 512 {
        problems.push(Problem::new(
            "the Creem API key has white space or other characters in it that no key has",
            "give the key alone, as Creem's dashboard shows it",
        ));
        None
    } else if key.starts_with("creem_test_") {
        Some(Mode::Test)
    } else if key.starts_with("creem_") {
        Some(Mode::Live)
    } else {
        problems.push(Problem::new(
            "the Creem API key does not begin with creem_",
            "copy it again from Creem's dashboard",
        ));
        None
    }
}

/// Where Creem is; without a usable key only the URL itself can be judged.
fn base_url(settings: &Settings, mode: Option<Mode>, problems: &mut Vec<Problem>) -> Option<Url> {
    let own = match mode {
        None | Some(Mode::Test) => "https://test-api.creem.io",
        Some(Mode::Live) => "https://api.creem.io",
    };
    let text = settings.creem.base_url.as_deref().unwrap_or(own);
    let mut wrong = |what: String, fix: &str| {
        problems.push(Problem::new(what, fix));
        None
    };
    let Ok(url) = Url::parse(text) else {
        return wrong(
            "`creem.base_url` is not a URL".to_owned(),
            "give https://host, or leave it out",
        );
    };
    let Some(host) = url.host() else {
        return wrong(
            "`creem.base_url` names no host".to_owned(),
            "give https://host, or leave it out",
        );
    };
    if !url.username().is_empty()
        || url.password().is_some()
        || url.query().is_some()
        || url.fragment().is_some()
    {
        return wrong(
            "`creem.base_url` holds more than a host and a path".to_owned(),
            "give https://host, or leave it out",
        );
    }
    if url.path().trim_end_matches('/').ends_with("/v1") {
        return wrong(
            "`creem.base_url` ends in /v1, which is part of each call's path already".to_owned(),
            "leave /v1 out",
        );
    }
    match url.scheme() {
        "https" => {}
        "http" if is_loopback(&host) => {}
        _ => {
            return wrong(
                "`creem.base_url` is not https".to_owned(),
                "plain http is for loopback only: key and buyers' addresses would travel in the clear",
            );
        }
    }
    let other = match mode? {
        Mode::Test => "api.creem.io",
        Mode::Live => "test-api.creem.io",
    };
    // A name may end in a dot, and means the same.
    if url.host_str().map(|host| host.trim_end_matches('.')) == Some(other)
        && let Some(mode) = mode
    {
        let what = format!("the API key is of mode {mode}, but `creem.base_url` is {other}");
        return wrong(what, "take the key of that world, or leave creem.base_url out");
    }
    Some(url)
}
