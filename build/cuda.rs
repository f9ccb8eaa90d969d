//! The CUDA toolkit: one nvcc call for each .cu file, in parallel, never relocatable device code (it would cost the
//! kernels their register reallocation), one CUDA runtime shared with libtorch.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    sync::atomic::{AtomicUsize, Ordering},
};

use anyhow::{Context, Result, bail};

use crate::libtorch::Libtorch;

/// The CUDA major version of the libtorch builds that this crate supports.
pub const MAJOR: &str = "13";
/// Portable kernels from sm_80 on, Hopper's own instructions in sm_90a.
const DEFAULT_ARCHITECTURES: &str = "8.0;9.0a";

pub struct Toolkit {
    nvcc: PathBuf,
    pub includes: Vec<PathBuf>,
    /// The folder of libcudart.
    pub runtime: PathBuf,
}

impl Toolkit {
    pub fn find(libtorch: &Libtorch) -> Result<Self> {
        if !libtorch.lib.join("libtorch_cuda.so").exists() {
            bail!(
                "the feature `cuda` needs a libtorch with CUDA, but {} has no libtorch_cuda.so",
                libtorch.lib.display()
            );
        }
        let checkout = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join(".cuda/nvidia/cu13");
        let beside_torch = libtorch.lib.join("../../nvidia/cu13");
        let from_path = || {
            let path = env::var_os("PATH")?;
            env::split_paths(&path).find(|folder| folder.join("nvcc").exists())?.parent().map(Path::to_owned)
        };
        for name in ["CUDA_HOME", "CUDA_PATH"] {
            println!("cargo:rerun-if-env-changed={name}");
        }
        let home = [
            env::var_os("CUDA_HOME").map(PathBuf::from),
            env::var_os("CUDA_PATH").map(PathBuf::from),
            Some(checkout),
            from_path(),
            Some(beside_torch.clone()),
            Some("/usr/local/cuda".into()),
        ];
        let home = home.into_iter().flatten().find(|home| home.join("bin/nvcc").exists()).context(
            "the feature `cuda` needs nvcc, and none was found. In a checkout run `make cuda-toolkit`; elsewhere set \
             CUDA_HOME to a CUDA 13 toolkit",
        )?;
        let nvcc = home.join("bin/nvcc");
        let text = Command::new(&nvcc).arg("--version").output().context("cannot run nvcc --version")?.stdout;
        let text = String::from_utf8_lossy(&text).into_owned();
        if !text.contains(&format!("release {MAJOR}.")) {
            let release = text.lines().find(|line| line.contains("release")).unwrap_or("an unknown version");
            bail!("wanted nvcc {MAJOR}.x, the CUDA of libtorch; {} is {release}", nvcc.display());
        }
        let runtimes = [libtorch.lib.clone(), beside_torch.join("lib"), home.join("lib64"), home.join("lib")];
        let runtime = runtimes.into_iter().find(|folder| folder.join(format!("libcudart.so.{MAJOR}")).exists());
        let runtime = runtime.with_context(|| format!("no libcudart.so.{MAJOR} beside libtorch or nvcc"))?;
        let includes = [home.join("include"), beside_torch.join("include")];
        let includes = includes.into_iter().filter(|folder| folder.exists()).collect();
        Ok(Self { nvcc, includes, runtime })
    }

    /// Object files of these sources; the reports of ptxas (registers, shared memory, spills) lie beside them as .log.
    pub fn compile(&self, sources: &[PathBuf]) -> Result<Vec<PathBuf>> {
        let out = crate::out_dir()?.join("cuda");
        // A report of a file that is gone would be read as today's.
        let _ = fs::remove_dir_all(&out);
        fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
        let architectures = architectures()?;
        let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize).max(1);
        let (next, objects) = (AtomicUsize::new(0), Mutex::new(Ok(Vec::new())));
        std::thread::scope(|scope| {
            for _ in 0..jobs {
                scope.spawn(|| {
                    while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let object = self.compile_one(source, &out, &architectures);
                        let Ok(mut all) = objects.lock() else { return };
                        match (&mut *all, object) {
                            (Ok(objects), Ok(object)) => objects.push(object),
                            (all @ Ok(_), Err(error)) => *all = Err(error),
                            (Err(_), _) => return,
                        }
                    }
                });
            }
        });
        let mut objects = objects.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)?;
        objects.sort();
        Ok(objects)
    }

    fn compile_one(&self, source: &Path, out: &Path, architectures: &[String]) -> Result<PathBuf> {
        let name = source.to_string_lossy().replace(['/', '\\'], "_");
        let object = out.join(&name).with_extension("o");
        let result = Command::new(&self.nvcc)
            .args(["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-Xptxas", "-v"])
            // A tenth of the default's size in every program; unpacked once, when a kernel is first used.
            .arg("-compress-mode=size")
            .args(architectures)
            .args(["-I", "csrc", "-c"])
            .arg(source)
            .arg("-o")
            .arg(&object)
            .output()
            .with_context(|| format!("cannot run {}", self.nvcc.display()))?;
        let report = String::from_utf8_lossy(&result.stderr);
        if !result.status.success() {
            bail!("nvcc failed on {}:\n{report}", source.display());
        }
        let log = object.with_extension("log");
        fs::write(&log, report.as_bytes()).with_context(|| format!("cannot write {}", log.display()))?;
        Ok(object)
    }
}

/// The -gencode flags of TORCH_CUDA_ARCH_LIST ("8.0;9.0a"), else of CUDA_COMPUTE_CAP ("90a"), else of the default. A
/// variable that names no architecture counts as unset.
fn architectures() -> Result<Vec<String>> {
    const SEPARATORS: [char; 3] = [';', ',', ' '];
    let variables = ["TORCH_CUDA_ARCH_LIST", "CUDA_COMPUTE_CAP"].map(|name| {
        println!("cargo:rerun-if-env-changed={name}");
        (name, env::var(name).unwrap_or_default())
    });
    let named = variables.into_iter().find(|(_, list)| !list.trim_matches(SEPARATORS).is_empty());
    let (name, list) = named.unwrap_or(("the default", DEFAULT_ARCHITECTURES.to_owned()));
    let mut flags = Vec::new();
    for entry in list.split(SEPARATORS).filter(|entry| !entry.is_empty()) {
        let ptx = entry.ends_with("+PTX");
        let number = entry.trim_end_matches("+PTX").replace('.', "");
        let digits = number.trim_end_matches(['a', 'f']);
        if !matches!(digits.parse::<u32>(), Ok(80..)) {
            bail!("{name}: wanted architectures from 8.0 on, for example \"8.0;9.0a\", got {entry:?}");
        }
        flags.push(format!("-gencode=arch=compute_{number},code=sm_{number}"));
        if ptx {
            flags.push(format!("-gencode=arch=compute_{number},code=compute_{number}"));
        }
    }
    Ok(flags)
}
