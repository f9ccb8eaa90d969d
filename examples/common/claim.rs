//! Several processes may be given the same folder: a run is of the one that holds its lock.

use std::{
    fs::{self, File, TryLockError},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// A lock that ends with the process, however that ends; a file left by a kill hinders nobody.
pub struct Claim {
    path: PathBuf,
    _file: File,
}

impl Claim {
    /// `None` if another process has it.
    pub fn take(path: &Path) -> Result<Option<Self>> {
        let failed = || format!("cannot lock {}", path.display());
        loop {
            let file = File::options().create(true).append(true).open(path).with_context(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error).with_context(failed),
            }
            // Whoever had it may have removed the file between its opening here and its lock.
            let inode = file.metadata().with_context(failed)?.ino();
            if fs::metadata(path).is_ok_and(|there| there.ino() == inode) {
                return Ok(Some(Self { path: path.to_owned(), _file: file }));
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Only for tidiness: the lock ends with the file that is closed after this.
        drop(fs::remove_file(&self.path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time() {
        let path = std::env::temp_dir().join(format!("claim-{}", std::process::id()));
        let held = Claim::take(&path).unwrap().unwrap();
        assert!(Claim::take(&path).unwrap().is_none());
        drop(held);
        assert!(!path.exists());

        // Left by a kill.
        fs::write(&path, "").unwrap();
        assert!(Claim::take(&path).unwrap().is_some());
    }
}
