//! The checkpoints in the folder of a run, by their names.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// What the name of a checkpoint that is being written ends in.
pub const UNFINISHED: &str = "unfinished";

/// `step-NNNNNN`, or `step-NNNNNN.unfinished`, which a kill may have left.
pub struct Checkpoint {
    pub step: u64,
    pub finished: bool,
    pub path: PathBuf,
}

impl Checkpoint {
    fn parse(path: PathBuf) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_prefix("step-")?;
        let (step, finished) = match name.split_once('.') {
            Some((step, UNFINISHED)) => (step, false),
            Some(_) => return None,
            None => (name, true),
        };
        Some(Self { step: step.parse().ok()?, finished, path })
    }
}

/// All checkpoints under `out`; a folder that is not there has none.
pub fn list(out: &Path) -> Result<Vec<Checkpoint>> {
    let context = || format!("cannot read the checkpoints in {}", out.display());
    let entries = match fs::read_dir(out) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(context)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        found.extend(Checkpoint::parse(entry.with_context(context)?.path()));
    }
    Ok(found)
}

/// The newest finished checkpoint under `out`.
pub fn newest(out: &Path) -> Result<Option<PathBuf>> {
    let finished = list(out)?.into_iter().filter(|checkpoint| checkpoint.finished);
    Ok(finished.max_by_key(|checkpoint| checkpoint.step).map(|checkpoint| checkpoint.path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_is_finished_and_of_the_largest_step() {
        let out = std::env::temp_dir().join(format!("steps-{}", std::process::id()));
        assert_eq!(newest(&out).unwrap(), None);
        for name in ["step-999999", "step-1000000", "step-1000001.unfinished", "step-2000000.old", "step-x", "zzz"] {
            fs::create_dir_all(out.join(name)).unwrap();
        }
        assert_eq!(newest(&out).unwrap(), Some(out.join("step-1000000")));
        assert_eq!(list(&out).unwrap().len(), 3);
        fs::remove_dir_all(&out).unwrap();

        // What cannot be read is not taken for empty.
        fs::write(&out, "").unwrap();
        assert!(newest(&out).unwrap_err().to_string().starts_with("cannot read the checkpoints in "));
        fs::remove_file(out).unwrap();
    }
}
