use crate::checkpoint::Best;

/// Evaluations in a row, up to the last one, that brought no improvement: none of them was at least
/// `threshold` lower than the last that did, or lower at all. The first one only sets the mark.
///
/// It depends on nothing but the evaluations, so that a resumed run stops where an uninterrupted one
/// would have. Transformers compares with the best so far instead: there many small improvements in
/// a row never add up to one. With a threshold of 0 both are the same.
pub(crate) fn without_improvement(evaluations: &[Best], threshold: f64) -> usize {
    let mut mark = None;
    let mut in_a_row = 0;
    for evaluation in evaluations {
        let loss = evaluation.loss;
        let improved = match mark {
            None => loss.is_finite(),
            Some(mark) => loss < mark && mark - loss >= threshold,
        };
        if improved {
            (mark, in_a_row) = (Some(loss), 0);
        } else {
            in_a_row += 1;
        }
    }
    in_a_row
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(losses: &[f64], threshold: f64) -> usize {
        let evaluations: Vec<Best> =
            losses.iter().zip(0..).map(|(&loss, step)| Best { step, loss }).collect();
        without_improvement(&evaluations, threshold)
    }

    #[test]
    fn what_is_not_lower_does_not_count() {
        assert_eq!(after(&[], 0.0), 0);
        assert_eq!(after(&[3.0], 0.0), 0);
        assert_eq!(after(&[3.0, 3.0], 0.0), 1);
        assert_eq!(after(&[3.0, 2.0, 2.5, 2.2], 0.0), 2);
        assert_eq!(after(&[3.0, 2.0, 2.5, 1.9], 0.0), 0);
    }

    #[test]
    fn small_steps_count_when_they_add_up_to_the_threshold() {
        assert_eq!(after(&[3.0, 2.75, 2.5], 0.5), 0);
        assert_eq!(after(&[3.0, 2.75, 2.625], 0.5), 2);
        // From 2.5 on, not from 2.25, which did not count.
        assert_eq!(after(&[3.0, 2.5, 2.25, 2.0], 0.5), 0);
        assert_eq!(after(&[3.0, 2.5, 2.25, 2.125], 0.5), 2);
    }

    #[test]
    fn a_loss_that_is_not_finite_is_no_improvement() {
        assert_eq!(after(&[3.0, f64::NAN, f64::INFINITY], 0.0), 2);
        assert_eq!(after(&[f64::NAN, f64::NAN, 5.0], 0.0), 0);
    }
}
