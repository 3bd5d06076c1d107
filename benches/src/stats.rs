//! Medians.

use crate::random::Random;

/// The value that a share of the others is below. 0 of nothing.
pub fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let at = (sorted.len().saturating_sub(1) as f64 * share).round() as usize;
    sorted.get(at).copied().unwrap_or(0.0)
}

/// The middle value.
pub fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

/// A median with its bootstrap interval of 95 %.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// The median.
    pub median: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// How many times as long `slow` took as `fast`, pair by pair: how many times as fast `fast` is.
pub fn speedup(fast: &[f64], slow: &[f64]) -> Ratio {
    let ratios: Vec<f64> = fast.iter().zip(slow).map(|(fast, slow)| slow / fast).collect();
    let mut random = Random(1);
    let again: Vec<f64> = (0..1000)
        .map(|_| {
            let any = |_: &f64| ratios[random.below(ratios.len() as u32) as usize];
            median(&ratios.iter().map(any).collect::<Vec<_>>())
        })
        .collect();
    Ratio {
        median: median(&ratios),
        low: percentile(&again, 0.025),
        high: percentile(&again, 0.975),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_paired() {
        let ratio = speedup(&[1.0, 2.0, 3.0], &[2.0, 4.0, 6.0]);
        assert_eq!(ratio, Ratio { median: 2.0, low: 2.0, high: 2.0 });
        let ratio = speedup(&[1.0; 5], &[1.0, 2.0, 3.0, 4.0, 5.0]);
        assert!(ratio.median == 3.0 && ratio.low < 3.0 && ratio.high > 3.0);
    }

    #[test]
    fn percentiles() {
        assert_eq!(percentile(&[3.0, 1.0, 2.0], 0.5), 2.0);
        assert_eq!((percentile(&[3.0, 1.0], 0.0), percentile(&[3.0, 1.0], 1.0)), (1.0, 3.0));
        assert_eq!(median(&[]), 0.0);
    }
}
