//! The folder of a run, `--out`: what it holds is looked at first, and thrown away only when the new run can start.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};

use crate::{
    checkpoint,
    config::{Args, RunConfig},
};

pub struct Folder<'a> {
    args: &'a Args,
    /// The checkpoint to resume from; `None` for a new run.
    pub resume_from: Option<PathBuf>,
}

impl<'a> Folder<'a> {
    /// Refuses arguments that do not fit what lies in `--out`; changes nothing in it.
    pub fn open(args: &'a Args) -> Result<Self> {
        let out = args.out.display();
        let newest = checkpoint::newest(&args.out)?;
        if args.resume {
            ensure!(newest.is_some(), "--resume: no checkpoint in {out}");
            let before: RunConfig = checkpoint::read_json(&args.out.join("run.json"))?;
            let differences = args.run.differences(&before)?;
            ensure!(
                differences.is_empty(),
                "--resume: {out} holds another run: {}; give the arguments it was started with, or choose another --out",
                differences.join(", ")
            );
            return Ok(Self { args, resume_from: newest });
        }
        ensure!(
            newest.is_none() || args.restart,
            "{out} holds a run already: --resume continues it, --restart throws it away, --out chooses another place"
        );
        fs::create_dir_all(&args.out).with_context(|| format!("cannot create {out}"))?;
        Ok(Self { args, resume_from: None })
    }

    /// Begins a new run in place of the one that was there.
    pub fn begin(&self) -> Result<()> {
        // All of them: a kill may have left two, and the new run would be taken up from the one that stays.
        checkpoint::remove(&self.args.out, None)?;
        let path = self.args.out.join("run.json");
        fs::write(&path, serde_json::to_string_pretty(&self.args.run)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;

    use super::*;

    fn args(out: &Path, more: &[&str]) -> Args {
        Args::parse_from(["train_lm", "--out", out.to_str().unwrap()].iter().chain(more))
    }

    fn refusal(args: &Args) -> String {
        Folder::open(args).err().unwrap().to_string()
    }

    #[test]
    fn a_restart_leaves_no_checkpoint_and_only_once_it_begins() {
        let out = std::env::temp_dir().join(format!("train-lm-folder-{}", std::process::id()));
        assert!(refusal(&args(&out, &["--resume"])).starts_with("--resume: no checkpoint in "));
        assert!(!out.exists());
        Folder::open(&args(&out, &[])).unwrap().begin().unwrap();
        for name in ["step-000004", "step-000008", "step-000012.unfinished", "notes"] {
            fs::create_dir(out.join(name)).unwrap();
        }

        assert!(refusal(&args(&out, &[])).contains("holds a run already"));
        assert!(refusal(&args(&out, &["--resume", "--seed=1"])).contains("holds another run: --seed is 1, was 0;"));
        let restart = args(&out, &["--restart", "--seed=1"]);
        let folder = Folder::open(&restart).unwrap();
        let resume = args(&out, &["--resume"]);
        assert_eq!(Folder::open(&resume).unwrap().resume_from, Some(out.join("step-000008")));
        folder.begin().unwrap();
        assert!(refusal(&resume).starts_with("--resume: no checkpoint in "));
        assert!(out.join("notes").exists() && !out.join("step-000012.unfinished").exists());
        let begun: RunConfig = checkpoint::read_json(&out.join("run.json")).unwrap();
        assert_eq!(begun, restart.run);
        fs::remove_dir_all(out).unwrap();
    }
}
