//! Useful operations per second: what the sparsity of MoBA leaves of the speed of a dense kernel.

use crate::{
    contender::Pass,
    name,
    report::{Report, Row},
};

impl Row {
    /// Pairs of a query and a key that it sees, of one head.
    fn pairs(&self) -> f64 {
        let seen = |query: i64| match self.contender.config {
            None => query + 1,
            Some(config) => {
                let (size, current) = (config.block_size(), query / config.block_size());
                current.min(config.top_k() - 1) * size + query % size + 1
            }
        };
        (0..self.seqlen).map(|query| seen(query) as f64).sum()
    }

    /// 10^9 useful operations per second. Forward multiplies and adds head_dim numbers for each pair twice, for the score
    /// and for the output; backward does it five times.
    fn rate(&self) -> f64 {
        let products = match self.pass {
            Pass::Route => 0.0,
            Pass::Forward => 2.0,
            Pass::ForwardBackward => 7.0,
        };
        let operations = products * 2.0 * self.head_dim as f64 * self.pairs() * (self.batch * self.heads) as f64;
        operations / self.times().0 / 1e6
    }

    /// Peak memory beyond q, k, v, the output, its gradient and those of q, k and v, over the size of q, k and v.
    fn extra_memory(&self) -> Option<f64> {
        let width = match self.dtype.as_str() {
            "f64" => 8,
            "f32" => 4,
            _ => 2,
        };
        let mib = |heads: i64| (self.batch * heads * self.seqlen * self.head_dim * width) as f64 / (1024.0 * 1024.0);
        let (q, kv) = (mib(self.heads), 2.0 * mib(self.heads_k));
        let outputs = match self.pass {
            Pass::Route => return None,
            Pass::Forward => q,
            Pass::ForwardBackward => 3.0 * q + kv,
        };
        self.peak_mib.map(|peak| (peak - outputs).max(0.0) / (q + kv))
    }
}

impl Report {
    pub fn print_rates(&self) {
        println!();
        for row in self.rows.iter().filter(|row| row.contender.config.is_some()) {
            let what = format!("{}, {} tokens, {}", row.contender, row.seqlen, name(&row.pass));
            let forward = |other: &&Row| {
                other.pass == Pass::Forward && other.contender == row.contender && other.seqlen == row.seqlen
            };
            match (row.pass, self.rows.iter().find(forward), self.dense(row)) {
                (Pass::Route, Some(forward), _) => {
                    println!("{what}: {:.1} % of forward", 100.0 * row.times().0 / forward.times().0);
                    continue;
                }
                (Pass::Route, None, _) => continue,
                (_, _, Some(dense)) => {
                    let (ours, theirs) = (row.rate(), dense.rate());
                    print!(
                        "{what}: {ours:.0} GFLOP/s, {} {theirs:.0} GFLOP/s, rate {:.2}, {:.1} times faster",
                        dense.contender,
                        ours / theirs,
                        dense.times().0 / row.times().0
                    );
                }
                (_, _, None) => print!("{what}: {:.0} GFLOP/s", row.rate()),
            }
            match row.extra_memory() {
                Some(extra) => println!("; memory beyond inputs and outputs {extra:.2} of q, k, v"),
                None => println!(),
            }
        }
    }
}
