//! The device on the command line.

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde::Serialize;
use tch::{Cuda, Device};

#[derive(Clone, Copy, Debug, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DeviceArg {
    Cpu,
    Cuda,
}

impl DeviceArg {
    pub fn resolve(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda if Cuda::is_available() => Ok(Device::Cuda(0)),
            Self::Cuda => bail!(
                "--device cuda: libtorch sees no usable GPU; check the driver (nvidia-smi), and that this program was \
                 built with --features cuda"
            ),
        }
    }
}
