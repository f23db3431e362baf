use std::time::Duration;

/// The smallest value that at least `share` of all values are not above (nearest rank). Zero if
/// there are none.
pub fn percentile(sorted: &[Duration], share: f64) -> Duration {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    let last = sorted.len().saturating_sub(1);
    sorted.get(rank.saturating_sub(1).min(last)).copied().unwrap_or_default()
}

/// Jain's fairness index (Jain, Chiu and Hawe 1984): 1 if all have the same, 1/n if one has all.
pub fn jain_index(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    let squares: f64 = shares.iter().map(|share| share * share).sum();
    // Nobody got anything: that is fair.
    if squares == 0.0 { 1.0 } else { sum * sum / (shares.len() as f64 * squares) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let ms = Duration::from_millis;
        let values: Vec<Duration> = (1..=200).map(ms).collect();
        assert_eq!(percentile(&values, 0.5), ms(100));
        assert_eq!(percentile(&values, 0.99), ms(198));
        assert_eq!(percentile(&values, 1.0), ms(200));
        assert_eq!(percentile(&values[..3], 0.5), ms(2));
        // The slowest of a few counts.
        assert_eq!(percentile(&values[..5], 0.99), ms(5));
        assert_eq!(percentile(&values[..1], 0.5), ms(1));
        assert_eq!(percentile(&[], 0.5), ms(0));
    }

    #[test]
    fn jains_index_is_between_one_over_n_and_one() {
        let close =
            |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12, "{found}");
        close(jain_index(&[3.0, 3.0, 3.0]), 1.0);
        close(jain_index(&[5.0, 0.0, 0.0, 0.0]), 0.25);
        // By hand: 6^2 / (3 * (1 + 4 + 9)).
        close(jain_index(&[1.0, 2.0, 3.0]), 36.0 / 42.0);
        close(jain_index(&[0.0, 0.0]), 1.0);
    }
}
