//! The table, the CSV file and the ratios.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::{Context, Result};

use crate::{
    contender::{Contender, Pass},
    name,
};

/// One measurement, and one line of the CSV file.
pub struct Row {
    pub device: String,
    pub dtype: String,
    pub batch: i64,
    pub heads: i64,
    pub heads_k: i64,
    pub head_dim: i64,
    pub seqlen: i64,
    pub contender: Contender,
    pub pass: Pass,
    pub times_ms: Vec<f64>,
    pub peak_mib: Option<f64>,
}

const HEADER: &str =
    "device,dtype,batch,heads,heads_k,head_dim,seqlen,block_size,top_k,data,impl,pass,median_ms,min_ms,max_ms,peak_mib";

impl Row {
    /// Median, least and greatest time.
    pub fn times(&self) -> (f64, f64, f64) {
        let mut times = self.times_ms.clone();
        times.sort_by(f64::total_cmp);
        let median = (times[(times.len() - 1) / 2] + times[times.len() / 2]) / 2.0;
        (median, times[0], times[times.len() - 1])
    }

    fn csv(&self) -> String {
        let (median, min, max) = self.times();
        let Self { device, dtype, batch, heads, heads_k, head_dim, seqlen, .. } = self;
        let Contender { kind, config, data } = &self.contender;
        let (kind, data, pass) = (name(kind), name(data), name(&self.pass));
        // Empty fields for a dense contender.
        let optional = |value: Option<i64>| value.map(|value| value.to_string()).unwrap_or_default();
        let block_size = optional(config.map(|config| config.block_size()));
        let top_k = optional(config.map(|config| config.top_k()));
        let peak = self.peak_mib.map(|peak| format!("{peak:.1}")).unwrap_or_default();
        format!(
            "{device},{dtype},{batch},{heads},{heads_k},{head_dim},{seqlen},{block_size},{top_k},{data},{kind},{pass},\
             {median:.4},{min:.4},{max:.4},{peak}"
        )
    }
}

pub struct Report {
    csv: Option<BufWriter<File>>,
    pub rows: Vec<Row>,
}

impl Report {
    pub fn new(csv: Option<&Path>) -> Result<Self> {
        let create = |path: &Path| -> Result<_> {
            let mut file =
                BufWriter::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?);
            writeln!(file, "{HEADER}")?;
            Ok(file)
        };
        Ok(Self { csv: csv.map(create).transpose()?, rows: Vec::new() })
    }

    /// Prints and stores the measurements of one shape; a run that is stopped later loses none of them.
    pub fn add(&mut self, rows: impl Iterator<Item = Row>) -> Result<()> {
        println!("{:<22} {:<17} {:>11} {:>11} {:>11} {:>10}", "", "", "median ms", "min ms", "max ms", "peak MiB");
        for row in rows {
            let (median, min, max) = row.times();
            let peak = row.peak_mib.map_or_else(|| "-".to_owned(), |peak| format!("{peak:.1}"));
            println!(
                "{:<22} {:<17} {median:>11.3} {min:>11.3} {max:>11.3} {peak:>10}",
                row.contender.to_string(),
                name(&row.pass)
            );
            if let Some(csv) = &mut self.csv {
                writeln!(csv, "{}", row.csv())?;
                csv.flush()?;
            }
            self.rows.push(row);
        }
        Ok(())
    }

    /// The fastest dense measurement of the same shape and pass.
    pub fn dense(&self, row: &Row) -> Option<&Row> {
        let shape = |row: &Row| (row.seqlen, row.pass, row.contender.data);
        let same = |other: &&Row| other.contender.config.is_none() && shape(other) == shape(row);
        self.rows.iter().filter(same).min_by(|a, b| a.times().0.total_cmp(&b.times().0))
    }

    /// Each MoBA measurement beside the fastest dense one.
    pub fn print_summary(&self) {
        println!();
        for row in self.rows.iter().filter(|row| row.contender.config.is_some() && row.pass != Pass::Route) {
            let (label, pass, ms) = (row.contender, name(&row.pass), row.times().0);
            match self.dense(row) {
                Some(dense) => println!(
                    "{label}, {} tokens, {pass}: {ms:.1} ms, full attention ({}) {:.1} ms, ratio {:.2} (full / MoBA)",
                    row.seqlen,
                    dense.contender,
                    dense.times().0,
                    dense.times().0 / ms
                ),
                None => println!("{label}, {} tokens, {pass}: {ms:.1} ms, no full attention was run", row.seqlen),
            }
        }
    }
}
