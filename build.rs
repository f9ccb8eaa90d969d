//! Compiles csrc/ into a static library of libtorch operators. No network, no GPU needed, nothing written outside OUT_DIR.

#[path = "build/cuda.rs"]
mod cuda;
#[path = "build/libtorch.rs"]
mod libtorch;

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::libtorch::Libtorch;

fn main() {
    // A build script speaks to the user through its panic message: one line, no backtrace.
    if let Err(error) = run() {
        eprintln!("\ntch-moba: {error:#}\n");
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-changed=build");
    if env::var_os("CARGO_FEATURE_DOC_ONLY").is_some() || env::var_os("DOCS_RS").is_some() {
        return Ok(());
    }
    let libtorch = Libtorch::find()?;
    libtorch.check_version()?;
    let cuda = env::var_os("CARGO_FEATURE_CUDA").map(|_| cuda::Toolkit::find(&libtorch)).transpose()?;
    compile(&libtorch, cuda.as_ref())?;
    link(&libtorch, cuda.as_ref())?;
    // For build scripts of dependents: DEP_MOBA_OPS_LIBTORCH_LIB and so on.
    println!("cargo:libtorch_lib={}", libtorch.lib.display());
    println!("cargo:libtorch_include={}", libtorch.include.display());
    println!("cargo:torch_version={}", libtorch.version);
    println!("cargo:cuda={}", u8::from(cuda.is_some()));
    Ok(())
}

fn compile(libtorch: &Libtorch, cuda: Option<&cuda::Toolkit>) -> Result<()> {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        // Optimised in every profile: these loops are the product. Neither flag lets the compiler assume that there
        // is no NaN.
        .opt_level(3)
        .flags(["-fno-math-errno", "-fno-trapping-math", "-fopenmp"])
        .warnings(false)
        .include("csrc")
        .include(&libtorch.include)
        .include(libtorch.include.join("torch/csrc/api/include"))
        .link_lib_modifier("+whole-archive")
        .files(sources(Path::new("csrc"), "cpp", &["csrc/cuda"])?);
    if let Ok(abi) = env::var("LIBTORCH_CXX11_ABI") {
        build.define("_GLIBCXX_USE_CXX11_ABI", abi.as_str());
    }
    if let Some(cuda) = cuda {
        build.define("MOBA_WITH_CUDA", None).file("csrc/cuda/ops.cpp");
        build.includes(&cuda.includes);
        build.objects(cuda.compile(&sources(Path::new("csrc/cuda"), "cu", &[])?)?);
    }
    build.try_compile("moba_ops_cpp").context("the C++ compiler failed on csrc (its messages stand above)")
}

/// Links libtorch so that `cargo run` and `cargo test` of this crate and of its dependents find it without any build
/// script or environment variable: cargo puts link search paths inside OUT_DIR on the loader's path.
fn link(libtorch: &Libtorch, cuda: Option<&cuda::Toolkit>) -> Result<()> {
    let out = out_dir()?;
    let mut folders = vec![("libtorch-lib", libtorch.lib.clone())];
    folders.extend(cuda.map(|cuda| ("cudart-lib", cuda.runtime.clone())));
    for (name, target) in folders {
        let link = out.join(name);
        if link.symlink_metadata().is_ok() {
            std::fs::remove_file(&link).with_context(|| format!("cannot replace {}", link.display()))?;
        }
        std::os::unix::fs::symlink(&target, &link).with_context(|| format!("cannot create {}", link.display()))?;
        println!("cargo:rustc-link-search=native={}", link.display());
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", target.display());
    }
    // The OpenMP runtime that libtorch itself runs on: two of them in a process would each keep a thread pool.
    println!("cargo:rustc-link-lib={}", libtorch.openmp_link_name()?);
    if cuda.is_some() {
        println!("cargo:rustc-link-lib=dylib=torch_cuda");
        println!("cargo:rustc-link-lib=dylib=c10_cuda");
        println!("cargo:rustc-link-lib=dylib:+verbatim=libcudart.so.{}", cuda::MAJOR);
    }
    Ok(())
}

/// Every file below `folder` with this extension, sorted; the folder is the list.
fn sources(folder: &Path, extension: &str, except: &[&str]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() && !except.iter().any(|name| Path::new(name) == path) {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn out_dir() -> Result<PathBuf> {
    env::var_os("OUT_DIR").map(PathBuf::from).context("cargo did not set OUT_DIR")
}
