//! Wall clock for the CPU, CUDA events for the GPU.

use std::{sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use cudarc::driver::{CudaContext, CudaStream, sys::CUevent_flags};
use tch::{Cuda, Device};

pub enum Timer {
    Wall,
    /// On the default stream, libtorch's current stream unless it is told otherwise.
    Events(Arc<CudaStream>),
}

impl Timer {
    pub fn new(device: Device) -> Result<Self> {
        let Device::Cuda(ordinal) = device else { return Ok(Self::Wall) };
        ensure!(
            Cuda::is_available(),
            "libtorch sees no GPU: --device cuda needs the feature `cuda`, a libtorch with CUDA and an NVIDIA driver"
        );
        let context = CudaContext::new(ordinal).context("the CUDA driver refused the device")?;
        Ok(Self::Events(context.default_stream()))
    }

    /// Milliseconds that `run` takes; what it returns is freed after the clock has stopped.
    pub fn ms<T>(&self, run: impl FnOnce() -> Result<T>) -> Result<f64> {
        match self {
            Self::Wall => {
                let start = Instant::now();
                let output = run()?;
                let elapsed = start.elapsed();
                drop(output);
                Ok(elapsed.as_secs_f64() * 1e3)
            }
            Self::Events(stream) => {
                stream.synchronize()?;
                let record = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
                let start = record()?;
                let output = run()?;
                let milliseconds = start.elapsed_ms(&record()?)?;
                drop(output);
                Ok(f64::from(milliseconds))
            }
        }
    }
}
