//! The power law: loss = a C^-b, fitted by least squares to the logarithms.

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Serialize;

/// Resampled fits behind an interval.
const DRAWS: usize = 2000;
/// The share of them inside the interval.
const CONFIDENCE: f64 = 0.95;

/// A loss and what it cost, in PFLOP/s-days.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    pub compute: f64,
    pub loss: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Law {
    pub a: f64,
    pub b: f64,
}

/// A law and the 95 % intervals of its constants.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Fit {
    #[serde(flatten)]
    pub law: Law,
    pub a_interval: [f64; 2],
    pub b_interval: [f64; 2],
    pub points: usize,
}

impl Law {
    /// `None` unless the points have at least two different computes.
    pub fn of(points: &[Point]) -> Option<Self> {
        let logs = || points.iter().map(|point| (point.compute.ln(), point.loss.ln()));
        let count = points.len() as f64;
        let mean_x = logs().map(|log| log.0).sum::<f64>() / count;
        let mean_y = logs().map(|log| log.1).sum::<f64>() / count;
        let spread: f64 = logs().map(|log| (log.0 - mean_x).powi(2)).sum();
        // Runs of one size differ in nothing but rounding.
        if spread.is_nan() || spread < 1e-12 {
            return None;
        }
        let slope = logs().map(|log| (log.0 - mean_x) * (log.1 - mean_y)).sum::<f64>() / spread;
        Some(Self { a: (mean_y - slope * mean_x).exp(), b: -slope })
    }

    pub fn loss(&self, compute: f64) -> f64 {
        self.a * compute.powf(-self.b)
    }
}

impl Fit {
    /// `None` with fewer than three points: two always lie on a law.
    ///
    /// The intervals are the bootstrap's: runs drawn with replacement, as often as there are runs, and fitted again.
    pub fn of(points: &[Point]) -> Option<Self> {
        if points.len() < 3 {
            return None;
        }
        let law = Law::of(points)?;
        let mut random = StdRng::seed_from_u64(0);
        let mut draw =
            || -> Vec<Point> { points.iter().map(|_| points[random.random_range(0..points.len())]).collect() };
        let laws: Vec<Law> = (0..DRAWS).filter_map(|_| Law::of(&draw())).collect();
        let interval = |constant: fn(&Law) -> f64| {
            let mut values: Vec<f64> = laws.iter().map(constant).collect();
            values.sort_by(f64::total_cmp);
            let cut = (values.len() as f64 * (1.0 - CONFIDENCE) / 2.0) as usize;
            [values[cut], values[values.len() - 1 - cut]]
        };
        let (a_interval, b_interval) = (interval(|law| law.a), interval(|law| law.b));
        Some(Self { law, a_interval, b_interval, points: points.len() })
    }
}

/// The ends of runs that nothing beat: no point of `all` is as low with less compute.
///
/// A run that is still on its way has not lowered its learning rate, so only ends are candidates; but whatever another
/// run reached on its way counts against them.
pub fn frontier(ends: &[Point], all: &[Point]) -> Vec<Point> {
    let beaten =
        |end: &&Point| all.iter().any(|other| other.compute < end.compute * (1.0 - 1e-9) && other.loss <= end.loss);
    ends.iter().filter(|end| !beaten(end)).copied().collect()
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;

    use super::*;

    const PAPER: Law = Law { a: 2.625, b: 0.063 };

    fn points(noise: impl Fn(usize) -> f64) -> Vec<Point> {
        let compute = |i: usize| 1e-5 * 2f64.powi(i as i32);
        (0..8).map(|i| Point { compute: compute(i), loss: PAPER.loss(compute(i)) * noise(i) }).collect()
    }

    #[test]
    fn a_known_law_is_recovered() {
        let fit = Fit::of(&points(|_| 1.0)).unwrap();
        assert_relative_eq!(fit.law.a, PAPER.a, max_relative = 1e-9);
        assert_relative_eq!(fit.law.b, PAPER.b, max_relative = 1e-9);
        assert_relative_eq!(fit.b_interval[0], fit.b_interval[1], max_relative = 1e-6);
    }

    #[test]
    fn the_interval_covers_the_law() {
        // Independent noise of 1 %: a 95 % interval of so few points misses more often than one time in twenty.
        let mut random = StdRng::seed_from_u64(1);
        let mut covered = 0;
        for _ in 0..50 {
            let noise: Vec<f64> =
                (0..8).map(|_| 1.0 + 0.01 * (random.random::<f64>() + random.random::<f64>() - 1.0)).collect();
            let fit = Fit::of(&points(|i| noise[i])).unwrap();
            let inside = |interval: [f64; 2], value| interval[0] <= value && value <= interval[1];
            covered += usize::from(inside(fit.a_interval, PAPER.a) && inside(fit.b_interval, PAPER.b));
        }
        assert!(covered >= 35, "{covered} of 50");
    }

    #[test]
    fn too_little_to_fit() {
        let all = points(|_| 1.0);
        assert_eq!(Fit::of(&all[..2]), None);
        assert_eq!(Fit::of(&[all[0]; 5]), None);
    }

    #[test]
    fn beaten_runs_are_left_out() {
        let point = |compute, loss| Point { compute, loss };
        let ends = [point(1.0, 4.0), point(2.0, 3.0), point(4.0, 3.5), point(8.0, 2.0), point(8.0, 2.1)];
        let mut all = ends.to_vec();
        assert_eq!(frontier(&ends, &all), [ends[0], ends[1], ends[3], ends[4]]);
        // On its way, another run was lower for less.
        all.push(point(1.5, 2.9));
        assert_eq!(frontier(&ends, &all), [ends[0], ends[3], ends[4]]);
    }
}
