/// How many rows of one tensor are measured at most: enough for a figure of two digits, few enough
/// to cost nothing beside the rounding itself.
const MAX_ROWS: usize = 64;

/// What rounding has cost: the squared error and the squared size of the same values.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Rounding {
    error: f64,
    size: f64,
}

impl Rounding {
    /// Adds values and what they became.
    pub fn add(&mut self, exact: &[f32], rounded: &[f32]) {
        // Four sums, so that the additions need not wait for each other.
        let (mut error, mut size) = ([0.0; 4], [0.0; 4]);
        for (exact, rounded) in exact.chunks(4).zip(rounded.chunks(4)) {
            for (i, (&exact, &rounded)) in exact.iter().zip(rounded).enumerate() {
                let far = f64::from(exact) - f64::from(rounded);
                error[i] += far * far;
                size[i] += f64::from(exact) * f64::from(exact);
            }
        }
        *self += Rounding { error: error.iter().sum(), size: size.iter().sum() };
    }

    /// sqrt(sum (x - y)^2 / sum x^2) of values x that became y; 0 if there were none, or zeros.
    pub fn relative_error(&self) -> f64 {
        if self.size > 0.0 { (self.error / self.size).sqrt() } else { 0.0 }
    }

    /// Every so many rows of `n_rows` is measured, beginning with the first.
    pub fn stride(n_rows: usize) -> usize {
        n_rows.div_ceil(MAX_ROWS).max(1)
    }
}

impl std::ops::AddAssign for Rounding {
    /// What is not finite leaves no trace: such a tensor is refused.
    fn add_assign(&mut self, other: Rounding) {
        if other.error.is_finite() && other.size.is_finite() {
            self.error += other.error;
            self.size += other.size;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_relative_to_all_values() {
        let mut rounding = Rounding::default();
        assert_eq!(rounding.relative_error(), 0.0);
        rounding.add(&[0.0, 0.0], &[0.0, 0.0]);
        assert_eq!(rounding.relative_error(), 0.0);
        rounding.add(&[3.0, 0.0, 0.0, 0.0, 4.0], &[3.0, 0.0, 0.0, 0.0, 4.5]);
        assert_eq!(rounding.relative_error(), 0.1);
        rounding.add(&[f32::NAN], &[0.0]);
        rounding += Rounding { error: 0.0, size: 75.0 };
        assert_eq!(rounding.relative_error(), 0.05);
        assert_eq!([1, 64, 65, 128, 8192].map(Rounding::stride), [1, 1, 2, 2, 128]);
    }
}
