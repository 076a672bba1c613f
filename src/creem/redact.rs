//! Texts that come from outside, made fit for logs and replies.

use crate::job::printable;

/// Cuts a text to `max` characters, escapes what is not printable, and takes out whatever looks
/// like an e-mail address or a key of Creem's: validation messages may repeat what was sent.
#[must_use]
pub fn text(raw: &str, max: usize) -> String {
    // Bound the work first: the text may be as long as an answer.
    let bounded: String = raw.chars().take(max.saturating_mul(4)).collect();
    let ends = |c: char| c.is_whitespace() || "\"',;<>()[]=".contains(c);
    let mut kept = String::with_capacity(bounded.len());
    for word in bounded.split_inclusive(ends) {
        if word.contains('@') || word.contains("creem_") {
            kept.push('…');
            kept.extend(word.chars().next_back().filter(|c| ends(*c)));
        } else {
            kept.push_str(word);
        }
    }
    printable(kept.trim(), max)
}

#[cfg(test)]
mod tests {
    use super::text;

    #[test]
    fn addresses_and_keys_go_and_the_rest_stays() {
        assert_eq!(
            text("customer.email <ada@example.com> must be an email", 256),
            "customer.email <…> must be an email"
        );
        assert!(!text("bad key creem_test_abc123", 256).contains("abc123"));
        assert!(!text("email=ada@example.com", 256).contains("ada"));
        assert_eq!(text("a\nb\u{1b}[31m", 256), "a\\nb\\u{1b}[31m");
        assert_eq!(text(&"x".repeat(1_000_000), 10).chars().count(), 11);
    }
}
