//! Numbers in few characters.

use bytesize::ByteSize;

/// "0", "12.3", "456", "7.9k", "12.3M".
pub fn count(n: f64) -> String {
    match n {
        n if n <= 0.0 || n.is_nan() => "0".into(),
        n if n < 99.95 => format!("{n:.1}"),
        n if n < 9_999.5 => format!("{n:.0}"),
        n if n < 9_999_500.0 => format!("{:.1}k", n / 1e3),
        n if n < 1e10 => format!("{:.1}M", n / 1e6),
        n => format!("{:.1}G", n / 1e9),
    }
}

/// "-" for none.
pub fn bytes(n: u64) -> String {
    if n == 0 { "-".into() } else { ByteSize(n).to_string() }
}

/// In hundredths.
pub fn share(share: f64) -> String {
    match share {
        s if s <= 0.0 => "0%".into(),
        s if s < 0.0995 => format!("{:.1}%", 100.0 * s),
        s => format!("{:.0}%", 100.0 * s),
    }
}

/// A short time.
pub fn seconds(seconds: f64) -> String {
    match seconds {
        s if s <= 0.0 => "0".into(),
        s if s < 0.001 => format!("{:.0}us", 1e6 * s),
        s if s < 1.0 => format!("{:.0}ms", 1e3 * s),
        s => format!("{s:.1}s"),
    }
}

/// How long ago a moment was, in its largest unit; "-" if it never was.
pub fn age(now_millis: u64, then_millis: u64) -> String {
    if then_millis == 0 {
        return "-".into();
    }
    let seconds = now_millis.saturating_sub(then_millis) / 1000;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// "3 of 8", or what there is if nothing limits it.
pub fn of_quota(value: String, limit: Option<String>) -> String {
    match limit {
        Some(limit) => format!("{value} of {limit}"),
        None => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let counts = [0.0, 0.26, 99.9, 456.4, 12_345.0, 12.3e6, 4e10].map(count);
        assert_eq!(counts, ["0", "0.3", "99.9", "456", "12.3k", "12.3M", "40.0G"]);
        assert_eq!([0.0, 0.004, 0.25, 1.0].map(share), ["0%", "0.4%", "25%", "100%"]);
        assert_eq!([0.0, 2.5e-4, 0.0123, 2.0].map(seconds), ["0", "250us", "12ms", "2.0s"]);
        let now = 10_000_000_000;
        let ages = [0, 5, 90, 7200, 400_000].map(|ago| age(now, now - 1000 * ago));
        assert_eq!(ages, ["0s", "5s", "1m", "2h", "4d"]);
        assert_eq!((age(now, 0), age(5, 9000)), ("-".into(), "0s".into()));
        assert_eq!((bytes(0), bytes(2 << 20)), ("-".into(), "2.0 MiB".into()));
        assert_eq!(of_quota("3".into(), Some("8".into())), "3 of 8");
    }
}
