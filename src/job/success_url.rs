//! `success_url`: where Creem sends a buyer who has paid. A URL that reads differently to a
//! person and to a browser is a phishing tool, so only URLs that read one way are passed on.

use url::{Host, Url};

/// Longest URL, in bytes.
pub const MAX: usize = 2048;

/// Checks a `success_url` as it was written.
///
/// `loopback_http` allows `http` and IP addresses for loopback hosts (test mode); `hosts`, if
/// not empty, is the whole list of allowed host names.
///
/// # Errors
/// The `error.code` of the rule that was broken.
pub fn check(text: &str, loopback_http: bool, hosts: &[String]) -> Result<(), &'static str> {
    if text.len() > MAX || text.bytes().any(|byte| byte <= b' ' || byte == 0x7f || byte == b'\\') {
        return Err("success_url_form");
    }
    let url = Url::parse(text).map_err(|_| "success_url_form")?;
    if !matches!(url.scheme(), "https" | "http") {
        return Err("success_url_scheme");
    }
    if text.get(url.scheme().len()..).is_none_or(|rest| !rest.starts_with("://")) {
        return Err("success_url_form");
    }
    let authority =
        text[url.scheme().len() + 3..].split(['/', '?', '#']).next().unwrap_or_default();
    if authority.contains('@') || !url.username().is_empty() || url.password().is_some() {
        return Err("success_url_userinfo");
    }
    let host = url.host().ok_or("success_url_form")?;
    let loopback = is_loopback(&host);
    if url.scheme() == "http" && !(loopback && loopback_http) {
        return Err("success_url_scheme");
    }
    check_host(&host, loopback && loopback_http, authority, hosts)?;
    if !same_as_written(&url, text) {
        return Err("success_url_form");
    }
    // Privileged ports of other protocols are what browsers block and request forgery wants.
    if !loopback && url.port().is_some_and(|port| port < 1024) {
        return Err("success_url_form");
    }
    Ok(())
}

fn check_host(
    host: &Host<&str>,
    local: bool,
    authority: &str,
    hosts: &[String],
) -> Result<(), &'static str> {
    let Host::Domain(name) = host else {
        return if local && hosts.is_empty() { Ok(()) } else { Err("success_url_host") };
    };
    if !local && !is_public_name(name) {
        return Err("success_url_host");
    }
    // What was written must be the host itself, not something that only parses to it.
    if authority != *name && !authority.strip_prefix(name).is_some_and(|rest| rest.starts_with(':'))
    {
        return Err("success_url_form");
    }
    if hosts.is_empty() || hosts.iter().any(|allowed| allowed == name) {
        Ok(())
    } else {
        Err("success_url_host")
    }
}

/// Whether a name is one that the public DNS can hold.
fn is_public_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253
        && name.contains('.')
        && name.split('.').all(label)
        && !name.ends_with(".localhost")
}

/// Whether a host is this machine.
#[must_use]
pub fn is_loopback(host: &Host<&str>) -> bool {
    match host {
        Host::Domain(name) => *name == "localhost",
        Host::Ipv4(address) => address.is_loopback(),
        Host::Ipv6(address) => address.is_loopback(),
    }
}

/// The same of a host as it stands in other addresses than URLs: IPv6 without brackets.
#[must_use]
pub fn is_loopback_name(name: &str) -> bool {
    let host =
        if name.contains(':') { Host::parse(&format!("[{name}]")) } else { Host::parse(name) };
    match host {
        Ok(Host::Domain(name)) => is_loopback(&Host::Domain(&name)),
        Ok(Host::Ipv4(address)) => is_loopback(&Host::Ipv4(address)),
        Ok(Host::Ipv6(address)) => is_loopback(&Host::Ipv6(address)),
        Err(_) => false,
    }
}

/// Whether the parsed URL is the text, an empty path's slash apart.
fn same_as_written(url: &Url, text: &str) -> bool {
    let parsed = url.as_str();
    if parsed == text {
        return true;
    }
    let start = url.scheme().len() + 3;
    let end = text[start..].find(['?', '#']).map_or(text.len(), |at| start + at);
    !text[start..end].contains('/') && parsed == format!("{}/{}", &text[..end], &text[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_known_by_its_names_and_addresses() {
        for name in ["localhost", "127.0.0.1", "127.1.2.3", "::1"] {
            assert!(is_loopback_name(name), "{name}");
        }
        for name in ["localhost.example", "10.0.0.1", "::2", "", "a b", "127.0.0.1.example"] {
            assert!(!is_loopback_name(name), "{name}");
        }
    }

    #[test]
    fn urls_that_read_one_way_pass() {
        for text in [
            "https://shop.example/thanks",
            "https://shop.example",
            "https://shop.example?order=1",
            "https://shop.example/a/b?x=1&y=%20z",
            "https://shop.example:8443/x",
            "https://shop.example/#/thanks",
            "https://xn--bcher-kva.example/",
        ] {
            assert_eq!(check(text, false, &[]), Ok(()), "{text}");
        }
    }

    #[test]
    fn every_trick_has_its_code() {
        for (text, code) in [
            ("javascript:alert(1)", "success_url_scheme"),
            ("data:text/html,x", "success_url_scheme"),
            ("http://shop.example/", "success_url_scheme"),
            ("ftp://shop.example/", "success_url_scheme"),
            ("http://localhost:3000/", "success_url_scheme"),
            ("https://shop.example.com@evil.com", "success_url_userinfo"),
            ("https://user:pw@shop.example/", "success_url_userinfo"),
            ("https://@shop.example/", "success_url_userinfo"),
            ("https://evil.com\\@shop.example.com", "success_url_form"),
            ("https://2130706433/", "success_url_host"),
            ("https://127.0.0.1/", "success_url_host"),
            ("https://[::ffff:127.0.0.1]/", "success_url_host"),
            ("https://[::1]/", "success_url_host"),
            ("https://169.254.169.254/latest", "success_url_host"),
            ("https://intranet/", "success_url_host"),
            ("https://shop..example/", "success_url_host"),
            ("https://-shop.example/", "success_url_host"),
            ("https://*.example/", "success_url_host"),
            ("https://app.localhost/", "success_url_host"),
            ("https://shop.example./", "success_url_host"),
            ("https://sh\top.example/", "success_url_form"),
            ("https://shop.example/\n", "success_url_form"),
            (" https://shop.example/", "success_url_form"),
            ("https://SHOP.example/", "success_url_form"),
            ("https://shop.example:443/", "success_url_form"),
            ("https://shop.example:22/", "success_url_form"),
            ("https://b\u{fc}cher.example/", "success_url_form"),
            ("https://shop.example/a/../b", "success_url_form"),
            ("https:shop.example", "success_url_form"),
            ("https:/shop.example", "success_url_form"),
            ("//shop.example/", "success_url_form"),
            ("/thanks", "success_url_form"),
            ("thanks", "success_url_form"),
            ("", "success_url_form"),
            ("https://", "success_url_form"),
            ("https://shop%2eexample/", "success_url_form"),
            ("https://evil.com%2f@shop.example/", "success_url_userinfo"),
        ] {
            assert_eq!(check(text, false, &[]), Err(code), "{text}");
        }
        let long = format!("https://shop.example/{}", "a".repeat(MAX));
        assert_eq!(check(&long, false, &[]), Err("success_url_form"));
    }

    #[test]
    fn loopback_is_for_test_mode() {
        for text in [
            "http://localhost:3000/ok",
            "http://127.0.0.1:81/",
            "http://[::1]:8080/x",
            "https://127.0.0.1:8443/",
        ] {
            assert_eq!(check(text, true, &[]), Ok(()), "{text}");
            assert!(check(text, false, &[]).is_err(), "{text}");
        }
    }

    #[test]
    fn an_allow_list_is_exact() {
        let hosts = vec!["shop.example".to_owned()];
        assert_eq!(check("https://shop.example/x", false, &hosts), Ok(()));
        for text in [
            "https://shop.example.evil.com/",
            "https://evil-shop.example/",
            "https://www.shop.example/",
        ] {
            assert_eq!(check(text, false, &hosts), Err("success_url_host"), "{text}");
        }
    }
}
