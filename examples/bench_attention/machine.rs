//! What the figures were taken on.

use std::fs;

use crate::{nvidia_smi, timer::Timer};

pub fn describe(timer: &Timer) -> Vec<String> {
    let device = match timer {
        Timer::Wall => format!("{}, {} threads", processor("model name"), tch::get_num_threads()),
        Timer::Events(stream) => {
            let name = stream.context().name().unwrap_or_else(|error| format!("unknown ({error:?})"));
            format!("{name}, driver {}", smi("driver_version"))
        }
    };
    vec![
        format!("device: {device}"),
        format!("versions: tch-moba {}, libtorch {}", env!("CARGO_PKG_VERSION"), libtorch()),
        format!("clocks before the run: {}", clocks(timer)),
    ]
}

pub fn clocks(timer: &Timer) -> String {
    match timer {
        Timer::Wall => format!("{} MHz", processor("cpu MHz")),
        Timer::Events(_) => smi("clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"),
    }
}

fn processor(field: &str) -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with(field));
    line.and_then(|line| line.split_once(':'))
        .map_or_else(|| "unknown".to_owned(), |(_, value)| value.trim().to_owned())
}

fn smi(query: &str) -> String {
    match nvidia_smi::query(query) {
        Some(answer) => format!("{query}: {answer}"),
        None => "unknown (nvidia-smi did not answer)".to_owned(),
    }
}

/// The version of the libtorch that the loader chose, which is not always the one of the build.
fn libtorch() -> String {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let library =
        maps.lines().find_map(|line| line.split_whitespace().last().filter(|path| path.ends_with("/libtorch_cpu.so")));
    let Some((root, _)) = library.and_then(|path| path.rsplit_once("/lib/")) else { return "unknown".to_owned() };
    // A PyTorch wheel says it in Python, a libtorch archive in a file of its own.
    let wheel = fs::read_to_string(format!("{root}/version.py")).ok();
    let wheel = wheel.as_deref().and_then(|text| text.lines().find_map(|line| line.strip_prefix("__version__ = ")));
    let archive = fs::read_to_string(format!("{root}/build-version")).ok();
    wheel.or(archive.as_deref()).unwrap_or("unknown").trim().trim_matches('\'').to_owned()
}
