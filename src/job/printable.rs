//! Texts of strangers, made safe to show.

/// A text that is safe to show: control and direction characters escaped, at most `max`
/// characters.
#[must_use]
pub fn printable(text: &str, max: usize) -> String {
    let mut out = String::new();
    for (index, c) in text.chars().enumerate() {
        if index == max {
            out.push('…');
            break;
        }
        if matches!(c, '\\' | '"')
            || c.is_control()
            || !(c.is_alphanumeric() || c.is_ascii() || c == '…')
        {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}
