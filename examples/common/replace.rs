//! Files that are rewritten, and then go on.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
};

use anyhow::{Context, Result};

/// Puts a file of `text` in the place of `path` by one rename: a kill leaves the old file or the new one, never neither.
/// What is written to the returned file comes after the text.
pub fn replace(path: &Path, text: &str) -> Result<File> {
    let new = path.with_extension("new");
    let write = || -> Result<File> {
        let mut file = File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        Ok(file)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_file_stays_until_the_new_one_is_whole() {
        let folder = std::env::temp_dir().join(format!("replace-{}", std::process::id()));
        let (path, new) = (folder.join("lines.jsonl"), folder.join("lines.new"));
        fs::create_dir_all(&new).unwrap();
        fs::write(&path, "old\n").unwrap();
        assert!(replace(&path, "new\n").unwrap_err().to_string().starts_with("cannot write "));
        assert_eq!(fs::read_to_string(&path).unwrap(), "old\n");

        fs::remove_dir(&new).unwrap();
        replace(&path, "new\n").unwrap().write_all(b"more\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new\nmore\n");
        assert!(!new.exists());
        fs::remove_dir_all(folder).unwrap();
    }
}
