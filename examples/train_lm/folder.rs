//! The folder of a run, `--out`: of one process at a time. What it holds is looked at first, and thrown away only when the
//! new run can start.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};

use crate::{checkpoint, claim::Claim, config::Args};

pub struct Folder<'a> {
    args: &'a Args,
    /// The checkpoint to resume from; `None` for a new run.
    pub resume_from: Option<PathBuf>,
    _claim: Claim,
}

impl<'a> Folder<'a> {
    /// Refuses arguments that do not fit what lies in `--out`; changes nothing in it but to lock it.
    pub fn open(args: &'a Args) -> Result<Self> {
        let out = args.out.display();
        // A mistyped --out is not made by --resume.
        ensure!(!args.resume || args.out.is_dir(), "--resume: no checkpoint in {out}");
        fs::create_dir_all(&args.out).with_context(|| format!("cannot create {out}"))?;
        let claim = Claim::take(&args.out.join("lock"))?.with_context(|| {
            format!("another process is training in {out}: wait for it, stop it, or choose another --out")
        })?;
        let newest = checkpoint::newest(&args.out)?;
        if args.resume {
            ensure!(newest.is_some(), "--resume: no checkpoint in {out}");
            let differences = args.run.differences(&checkpoint::read_json(&args.out.join("run.json"))?)?;
            ensure!(
                differences.is_empty(),
                "--resume: {out} holds another run: {}; give the arguments it was started with, or choose another --out",
                differences.join(", ")
            );
        } else {
            ensure!(
                newest.is_none() || args.restart,
                "{out} holds a run already: --resume continues it, --restart throws it away, --out chooses another place"
            );
        }
        Ok(Self { args, resume_from: newest.filter(|_| args.resume), _claim: claim })
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
        Folder::open(&args(&out, &[])).unwrap().begin().unwrap();
        for name in ["step-000004", "step-000008", "step-000012.unfinished", "notes"] {
            fs::create_dir(out.join(name)).unwrap();
        }
        let (resume, restart) = (args(&out, &["--resume"]), args(&out, &["--restart", "--seed=1"]));
        drop(Folder::open(&restart).unwrap());
        assert_eq!(Folder::open(&resume).unwrap().resume_from, Some(out.join("step-000008")));
        Folder::open(&restart).unwrap().begin().unwrap();
        let mut left: Vec<_> = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["notes", "run.json"]);
        let begun = checkpoint::read_json(&out.join("run.json")).unwrap();
        assert!(restart.run.differences(&begun).unwrap().is_empty());
        assert_eq!(resume.run.differences(&begun).unwrap(), ["--seed is 0, was 1"]);
        fs::remove_dir_all(out).unwrap();
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let out = std::env::temp_dir().join(format!("train-lm-refused-{}", std::process::id()));
        let resume = args(&out, &["--resume"]);
        assert!(refusal(&resume).starts_with("--resume: no checkpoint in "));
        assert!(!out.exists());

        // Two that begin at once, before either has a checkpoint.
        let begin = args(&out, &[]);
        let other = Folder::open(&begin).unwrap();
        assert!(refusal(&begin).starts_with("another process is training in "));
        other.begin().unwrap();
        drop(other);

        assert!(refusal(&resume).starts_with("--resume: no checkpoint in "));
        fs::create_dir(out.join("step-000004")).unwrap();
        assert!(refusal(&begin).contains("holds a run already: "));
        for (other, difference) in
            [("--seed=1", "--seed is 1, was 0"), ("--device=cuda", "--device is \"cuda\", was \"cpu\"")]
        {
            let refusal = refusal(&args(&out, &["--resume", other]));
            assert!(refusal.contains(&format!(" holds another run: {difference}; ")), "{refusal}");
        }
        fs::remove_dir_all(out).unwrap();
    }
}
