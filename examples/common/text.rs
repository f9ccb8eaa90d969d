//! Text from files and directories: documents long enough for long context, and the held-out split.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

/// One document in so many is held out.
const HELD_OUT: u64 = 32;
/// Ends a document; text holds no NUL bytes.
pub const SEPARATOR: u8 = 0;

/// The documents of `data`, or of the C++ headers of libtorch if it is empty, by the path of their first file. Files of
/// one directory are joined up to `document_bytes`.
pub fn documents(data: &[PathBuf], document_bytes: usize) -> Result<BTreeMap<String, Vec<u8>>> {
    join(if data.is_empty() { libtorch_headers()? } else { given_files(data)? }, document_bytes)
}

/// Whether a document belongs to the held-out part; decided by its text alone.
pub fn is_held_out(text: &[u8]) -> bool {
    hash(text).is_multiple_of(HELD_OUT)
}

/// A file to read, and its name in the text.
struct File {
    path: PathBuf,
    name: String,
    /// Named on the command line itself: then it must be text.
    named: bool,
}

fn libtorch_headers() -> Result<Vec<File>> {
    let root = std::env::var_os("LIBTORCH").map_or_else(|| PathBuf::from(".libtorch/torch"), PathBuf::from);
    let include = root.join("include");
    let mut files = Vec::new();
    for directory in ["ATen", "c10", "torch"] {
        let directory = include.join(directory);
        ensure!(
            directory.is_dir(),
            "no {}: the default corpus is libtorch's headers; run `make libtorch`, set LIBTORCH, or name text with --data",
            directory.display()
        );
        walk(&directory, &include, &mut files)?;
    }
    // ATen/ops is thousands of nearly equal, machine-written files.
    files.retain(|file| file.name.ends_with(".h") && !file.name.starts_with("ATen/ops/"));
    Ok(files)
}

fn given_files(data: &[PathBuf]) -> Result<Vec<File>> {
    let mut files = Vec::new();
    for path in data {
        let metadata = fs::metadata(path).with_context(|| format!("--data {}", path.display()))?;
        if metadata.is_dir() {
            walk(path, path, &mut files)?;
        } else {
            files.push(File { path: path.clone(), name: path.display().to_string(), named: true });
        }
    }
    Ok(files)
}

/// All files below `directory`, named relative to `root`.
fn walk(directory: &Path, root: &Path, files: &mut Vec<File>) -> Result<()> {
    let context = || format!("cannot read the directory {}", directory.display());
    for entry in fs::read_dir(directory).with_context(context)? {
        let entry = entry.with_context(context)?;
        let (path, kind) = (entry.path(), entry.file_type()?);
        if kind.is_dir() {
            walk(&path, root, files)?;
        } else if kind.is_file() {
            let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
            files.push(File { path, name, named: false });
        }
    }
    Ok(())
}

/// Joins the files of each directory in the order of their names, every file under a line with its path.
fn join(mut files: Vec<File>, document_bytes: usize) -> Result<BTreeMap<String, Vec<u8>>> {
    // By directory first: a subdirectory in between would cut the document in two.
    files.sort_by(|a, b| (a.path.parent(), &a.name).cmp(&(b.path.parent(), &b.name)));
    let mut documents = BTreeMap::<String, Vec<u8>>::new();
    let mut open: Option<(PathBuf, String)> = None;
    for File { path, name, named } in files {
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if text.contains(&SEPARATOR) {
            if named {
                bail!("{} is a binary file (it has NUL bytes): --data takes text", path.display());
            }
            eprintln!("skipped {}: a binary file", path.display());
            continue;
        }
        if text.is_empty() {
            continue;
        }
        let parent = path.parent().unwrap_or(Path::new("")).to_owned();
        let key = match &open {
            Some((directory, key)) if *directory == parent && documents[key].len() + text.len() <= document_bytes => {
                key.clone()
            }
            // Not by its name: two directories on the command line may hold files of the same one.
            _ => path.display().to_string(),
        };
        let document = documents.entry(key.clone()).or_default();
        document.extend_from_slice(format!("=== {name}\n").as_bytes());
        document.extend_from_slice(&text);
        open = Some((parent, key));
    }
    Ok(documents)
}

/// FNV-1a: the same in every version of Rust, unlike the standard library's hasher.
pub fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}
