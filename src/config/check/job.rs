//! The rules for job bodies.

use super::{Problem, Settings};
use crate::job::request::is_extra_field;
use crate::job::{Mode, Rules, success_url};

pub(super) fn check_job(settings: &Settings, mode: Mode, problems: &mut Vec<Problem>) -> Rules {
    let job = &settings.job;
    let mut bounded = |key: &str, value: i64, least: i64, most: i64| {
        if !(least..=most).contains(&value) {
            let fix = format!("give {least} to {most}");
            problems.push(Problem::new(format!("`job.{key}` is {value}"), fix));
        }
        value.clamp(least, most)
    };
    // A job with an address and a short success_url has about as many; a smaller bound is a slip.
    let max_bytes = bounded("max_bytes", job.max_bytes, 256, 1024 * 1024);
    let max_units = bounded("max_units", job.max_units, 1, i64::from(u32::MAX));
    for field in job.extra_fields.iter().filter(|field| !is_extra_field(field)) {
        problems.push(Problem::new(
            format!("`job.extra_fields` names {field:?}"),
            "give names of a-z, 0-9 and _ that are no fields of Creem's request already",
        ));
    }
    let loopback_http = mode == Mode::Test;
    if let Some(url) = &job.success_url
        && let Err(code) = success_url::check(url, loopback_http, &job.success_hosts)
    {
        problems.push(Problem::new(
            format!("`job.success_url` would be refused in a job ({code})"),
            "give an https URL as browsers write it",
        ));
    }
    Rules {
        max_bytes: usize::try_from(max_bytes).unwrap_or(64 * 1024),
        max_units: u32::try_from(max_units).unwrap_or(u32::MAX),
        extra_fields: job.extra_fields.clone(),
        allow_custom_price: job.allow_custom_price,
        allow_affiliate_code: job.allow_affiliate_code,
        success_hosts: job.success_hosts.clone(),
        default_success_url: job.success_url.clone(),
        loopback_http,
    }
}

/// A host that is not written the way URLs write it would never match.
pub(super) fn check_hosts(key: &str, hosts: &[String], problems: &mut Vec<Problem>) {
    for host in hosts {
        let plain = |byte: u8| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-:[]".contains(&byte)
        };
        let whole = host.bytes().all(plain) && !host.starts_with('.') && !host.ends_with('.');
        if !whole || url::Host::parse(host).map(|parsed| parsed.to_string()).as_ref() != Ok(host) {
            problems.push(Problem::new(
                format!("`{key}` names {host:?}, which no URL's host ever equals"),
                "give host names only: lower case, no https://, no port, no *",
            ));
        }
    }
}
