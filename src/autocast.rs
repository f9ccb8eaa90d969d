//! Mixed precision with a chosen dtype, on CPU and CUDA.

use tch::{Device, Kind};

use crate::{
    Result,
    dispatch::{AutocastState, autocast_state, float_kind, set_autocast},
};

/// Runs `f` with libtorch's autocast on: matrix products and the `moba` operators take their inputs in `kind`.
///
/// Unlike [`tch::autocast`] this works on the CPU too, lets the dtype be chosen, and restores the previous state also
/// when `f` panics. The state belongs to the calling thread.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for a device other than CPU or CUDA, or a `kind` that is not floating-point.
pub fn autocast<T>(device: Device, kind: Kind, f: impl FnOnce() -> T) -> Result<T> {
    let previous = autocast_state(device)?;
    set_autocast(device, AutocastState { enabled: true, kind: float_kind(kind)? }, 1)?;
    let _restore = Restore { device, previous };
    Ok(f())
}

struct Restore {
    device: Device,
    previous: AutocastState,
}

impl Drop for Restore {
    fn drop(&mut self) {
        // The same call succeeded on entry with the same device, so it cannot fail here.
        let restored = set_autocast(self.device, self.previous, -1);
        debug_assert!(restored.is_ok());
    }
}
