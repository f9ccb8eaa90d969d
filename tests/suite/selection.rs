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
            let (wanted, other) = match device {
                Device::Cpu => (Backend::Cpu, Backend::CudaPortable),
                _ => (Backend::CudaPortable, Backend::Cpu),
            };
            assert_eq!(selection.backend, Some(wanted), "{selection}");
            assert_eq!(selection.refusals.len(), 1);
            assert_eq!((selection.refusals[0].backend, selection.refusals[0].filter), (other, "device"));
            drop(moba_attention(&x.q, &x.k, &x.v, &case.config()).unwrap());
        }
    }
    let x = Case::new(4, 8, 4, 2).inputs(1, Kind::Float, Device::Cpu);
    let text = select(&x.q, &x.k, &x.v, &MobaConfig::default()).to_string();
    assert_eq!(text, "cpu; not cuda_portable: device: want q on a CUDA device, got Cpu");
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
    assert!(
        text.contains("moba attention") && text.contains("cpu; not cuda_portable") && text.contains("4x2"),
        "{text}"
    );
    assert_eq!(logged(tracing::Level::INFO), "");
}
