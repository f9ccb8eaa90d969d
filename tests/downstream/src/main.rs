//! MoBA with every block selected must be full attention; with `MOBA_REQUIRE_CUDA=1` a hidden GPU is a failure.

use std::error::Error;

use tch::{Cuda, Device, Kind, Tensor};
use tch_moba::{MobaConfig, full_attention, moba_attention};

fn main() -> Result<(), Box<dyn Error>> {
    println!("CUDA available: {}", Cuda::is_available());
    if std::env::var_os("MOBA_REQUIRE_CUDA").is_some() && !Cuda::is_available() {
        return Err("MOBA_REQUIRE_CUDA is set, but libtorch sees no GPU".into());
    }
    let gpu = Cuda::is_available().then_some(Device::Cuda(0));
    for device in std::iter::once(Device::Cpu).chain(gpu) {
        let [q, k, v] = [(); 3].map(|()| Tensor::randn([1, 4, 100, 32], (Kind::Float, device)));
        let out = moba_attention(&q, &k, &v, &MobaConfig::new(16, 7)?)?;
        let error = (out - full_attention(&q, &k, &v, None)?).abs().max().double_value(&[]);
        println!("{device:?}: largest difference from full attention {error:.1e}");
        if !(error < 1e-5) {
            return Err(format!("{device:?}: MoBA over all blocks is not full attention").into());
        }
    }
    Ok(())
}
