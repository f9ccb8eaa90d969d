//! Where libtorch lies, as torch-sys found it, and whether it is a version that fits the tch in use.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

/// torch-sys minor version and the libtorch it is made for.
const PAIRS: [(&str, &str); 3] = [("0.24", "2.11"), ("0.25", "2.12"), ("0.26", "2.13")];

pub struct Libtorch {
    pub lib: PathBuf,
    pub include: PathBuf,
    /// `major.minor`
    pub version: String,
}

impl Libtorch {
    pub fn find() -> Result<Self> {
        let lib = env::var_os("DEP_TCH_LIBTORCH_LIB").map(PathBuf::from).context(
            "torch-sys did not say where libtorch is. In a checkout run `make libtorch`; elsewhere set LIBTORCH or \
             LIBTORCH_USE_PYTORCH=1 (README, In your own tch project)",
        )?;
        println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
        let root = env::var_os("LIBTORCH_INCLUDE").map_or_else(|| lib.join(".."), PathBuf::from);
        let include = root.join("include");
        if !include.join("ATen/ATen.h").exists() {
            bail!(
                "no libtorch headers in {}. In a checkout run `make libtorch`; elsewhere set LIBTORCH to a libtorch \
                 or to the folder of the Python package torch",
                include.display()
            );
        }
        let version = read_version(&include)?;
        Ok(Self { lib, include, version })
    }

    /// torch-sys checks no version when LIBTORCH points at a Python wheel, and a mismatch fails far from its cause.
    pub fn check_version(&self) -> Result<()> {
        let table = PAIRS.map(|(tch, torch)| format!("tch {tch} with libtorch {torch}")).join(", ");
        if !PAIRS.iter().any(|&(_, torch)| torch == self.version) {
            bail!("libtorch {} found in {}; wanted one of: {table}", self.version, self.lib.display());
        }
        let Some(tch) = locked_torch_sys() else { return Ok(()) };
        match PAIRS.iter().find(|&&(minor, _)| minor == tch) {
            Some(&(_, torch)) if torch != self.version => bail!(
                "tch {tch} needs libtorch {torch}, but libtorch {} was found in {}; pairs: {table}. Install torch \
                 {torch}, or change the tch version with `cargo update -p tch --precise VERSION`",
                self.version,
                self.lib.display()
            ),
            _ => Ok(()),
        }
    }

    pub fn openmp_link_name(&self) -> Result<String> {
        let found = fs::read_dir(&self.lib)
            .with_context(|| format!("cannot list {}", self.lib.display()))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .find(|name| name.starts_with("libgomp") && name.contains(".so"));
        Ok(found.map_or("dylib=gomp".to_owned(), |name| format!("dylib:+verbatim={name}")))
    }
}

fn read_version(include: &Path) -> Result<String> {
    // The second is where PyTorch up to 2.9 says it; since then it only includes the first.
    let [newer, older] =
        ["torch/headeronly/version.h", "torch/csrc/api/include/torch/version.h"].map(|name| include.join(name));
    let header = if newer.exists() { newer } else { older };
    let text = fs::read_to_string(&header).with_context(|| format!("cannot read {}", header.display()))?;
    let number = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(&format!("#define {name} ")));
        line.and_then(|line| line.split_whitespace().nth(2)).map(str::to_owned)
    };
    match (number("TORCH_VERSION_MAJOR"), number("TORCH_VERSION_MINOR")) {
        (Some(major), Some(minor)) => Ok(format!("{major}.{minor}")),
        _ => bail!("{} does not say which version it is", header.display()),
    }
}

/// The `major.minor` of torch-sys in the nearest Cargo.lock above OUT_DIR: cargo tells a build script no versions, and
/// the target folder normally lies in the workspace. None where it does not.
fn locked_torch_sys() -> Option<String> {
    let out = PathBuf::from(env::var_os("OUT_DIR")?);
    let lock = out.ancestors().map(|folder| folder.join("Cargo.lock")).find(|lock| lock.exists())?;
    println!("cargo:rerun-if-changed={}", lock.display());
    let text = fs::read_to_string(lock).ok()?;
    let (_, after) = text.split_once("name = \"torch-sys\"\nversion = \"")?;
    let mut numbers = after.split(['.', '"']);
    Some(format!("{}.{}", numbers.next()?, numbers.next()?))
}
