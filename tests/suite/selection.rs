//! `select` says the same as the operators do.

use std::{
    io,
    sync::{Arc, Mutex},
};

use tch::{Device, Kind, Tensor};
use tch_moba::{Backend, MobaConfig, moba_attention, select};

use crate::kit::{Case, KINDS, devices};

#[test]
fn what_runs_is_what_select_names() {
    for device in devices() {
        for kind in KINDS {
            let case = Case::new(20, 16, 8, 2).heads(4, 2);
            let x = case.inputs(1, kind, device);
            let selection = select(&x.q, &x.k, &x.v, &case.config());
            // head_dim 16 is not for tensor cores.
            let (wanted, others) = match device {
                Device::Cpu => (Backend::Cpu, [(Backend::CudaHopper, "device"), (Backend::CudaPortable, "device")]),
                _ => (Backend::CudaPortable, [(Backend::CudaHopper, "kernels"), (Backend::Cpu, "device")]),
            };
            assert_eq!(selection.backend, Some(wanted), "{selection}");
            let refusals: Vec<_> = selection.refusals.iter().map(|refusal| (refusal.backend, refusal.filter)).collect();
            assert_eq!(refusals, others, "{selection}");
            drop(moba_attention(&x.q, &x.k, &x.v, &case.config()).unwrap());
        }
    }
    let x = Case::new(4, 8, 4, 2).inputs(1, Kind::Float, Device::Cpu);
    let text = select(&x.q, &x.k, &x.v, &MobaConfig::default()).to_string();
    let reason = "device: want q on a CUDA device, got Cpu";
    assert_eq!(text, format!("cpu; not cuda_hopper: {reason}; not cuda_portable: {reason}"));
}

/// Every condition of the Hopper kernels, one broken at a time; what they refuse runs on the portable ones.
#[test]
fn what_the_hopper_kernels_take() {
    for device in devices().into_iter().filter(|device| device.is_cuda()) {
        let good = Case::new(70, 64, 16, 3).heads(4, 2);
        let select_case = |case: &Case, kind| {
            let x = case.inputs(1, kind, device);
            drop(moba_attention(&x.q, &x.k, &x.v, &case.config()).unwrap());
            select(&x.q, &x.k, &x.v, &case.config())
        };
        let selection = select_case(&good, Kind::BFloat16);
        if selection.backend == Some(Backend::CudaPortable) {
            // A GPU of another generation, or a build without code for this one; nothing below could be seen.
            assert!(
                selection.to_string().contains("device: wanted") || selection.to_string().contains("build: wanted")
            );
            continue;
        }
        for kind in [Kind::BFloat16, Kind::Half] {
            for head_dim in [64, 128] {
                let selection = select_case(&Case { head_dim, ..good }, kind);
                assert_eq!(selection.backend, Some(Backend::CudaHopper), "{selection}");
            }
        }
        let refused = [
            (good, Kind::Float, "dtype: wanted bfloat16 or float16"),
            (Case { head_dim: 80, ..good }, Kind::BFloat16, "head_dim: wanted 64 or 128, got 80"),
            (
                Case { block_size: 24, seqlen_q: 64, seqlen_k: 64, ..good },
                Kind::BFloat16,
                "block_size: wanted a multiple of 16, got 24",
            ),
            (
                Case::new(20, 64, 16, 2).heads(33, 1),
                Kind::BFloat16,
                "heads: wanted at most 32 for each head of k, got 33",
            ),
        ];
        for (case, kind, reason) in refused {
            let selection = select_case(&case, kind);
            assert_eq!(selection.backend, Some(Backend::CudaPortable), "{selection}");
            assert!(selection.to_string().contains(&format!("not cuda_hopper: kernels: {reason}")), "{selection}");
        }
        let x = good.inputs(1, Kind::BFloat16, device);
        let negative = good.config().with_softmax_scale(-0.5).unwrap();
        let selection = select(&x.q, &x.k, &x.v, &negative);
        assert!(selection.to_string().contains("kernels: softmax_scale: wanted more than 0"), "{selection}");
        drop(moba_attention(&x.q, &x.k, &x.v, &negative).unwrap());
    }
}

/// Every refusal of `select` is an error of the operator, and what `select` accepts runs.
#[test]
fn refusals_are_errors() {
    let zeros = |size: &[i64], kind| Tensor::zeros(size, (kind, Device::Cpu));
    let float = |size: &[i64]| zeros(size, Kind::Float);
    let good = || float(&[2, 4, 6, 8]);
    let cases = [
        ("rank", good(), float(&[4, 6, 8]), good(), "got 4, 3, 4 dimensions"),
        ("dtype", good(), zeros(&[2, 4, 6, 8], Kind::Half), good(), "Some(Half)"),
        ("dtype", zeros(&[2, 4, 6, 8], Kind::Int), good(), good(), "Some(Int)"),
        ("shape", good(), good(), float(&[2, 4, 7, 8]), "[2, 4, 7, 8]"),
        ("shape", good(), float(&[1, 4, 6, 8]), float(&[1, 4, 6, 8]), "[1, 4, 6, 8]"),
        ("shape", good(), float(&[2, 4, 6, 9]), float(&[2, 4, 6, 9]), "[2, 4, 6, 9]"),
        ("heads", good(), float(&[2, 3, 6, 8]), float(&[2, 3, 6, 8]), "got 4 and 3"),
        ("seqlen", good(), float(&[2, 4, 5, 8]), float(&[2, 4, 5, 8]), "got 6 and 5"),
    ];
    let config = MobaConfig::new(4, 2).unwrap();
    for (filter, q, k, v, reason) in cases {
        let selection = select(&q, &k, &v, &config);
        assert_eq!(selection.backend, None, "{selection}");
        let refusal = selection.refusals.iter().find(|refusal| refusal.backend == Backend::Cpu).unwrap();
        assert_eq!(refusal.filter, filter, "{selection}");
        assert!(refusal.reason.contains("want") && refusal.reason.contains(reason), "{selection}");
        assert!(selection.to_string().starts_with("none; not "), "{selection}");
        moba_attention(&q, &k, &v, &config).unwrap_err();
    }
    for empty in [[0, 4, 6, 8], [2, 4, 0, 8]] {
        let x = float(&empty);
        assert_eq!(select(&x, &x, &x, &config).backend, Some(Backend::Cpu));
        drop(moba_attention(&x, &x, &x, &config).unwrap());
    }
}

#[test]
fn head_dims_beyond_256_run_on_the_cpu_only() {
    let config = MobaConfig::new(4, 2).unwrap();
    for device in devices() {
        let x = Tensor::zeros([1, 1, 8, 257], (Kind::Float, device));
        let selection = select(&x, &x, &x, &config);
        let runs = moba_attention(&x, &x, &x, &config).is_ok();
        assert_eq!((selection.backend.is_some(), runs), (device == Device::Cpu, device == Device::Cpu), "{selection}");
    }
}

/// What a program with `RUST_LOG=debug` reads about each attention call.
#[test]
fn every_call_logs_its_backend_at_debug_level() {
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);
    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let x = Case::new(4, 8, 4, 2).inputs(1, Kind::Float, Device::Cpu);
    let logged = |level| {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_max_level(level).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            drop(moba_attention(&x.q, &x.k, &x.v, &MobaConfig::new(4, 2).unwrap()).unwrap());
        });
        String::from_utf8(log.0.lock().unwrap().clone()).unwrap()
    };
    let text = logged(tracing::Level::DEBUG);
    assert!(text.contains("moba attention") && text.contains("cpu; not cuda_hopper") && text.contains("4x2"), "{text}");
    assert_eq!(logged(tracing::Level::INFO), "");
}
