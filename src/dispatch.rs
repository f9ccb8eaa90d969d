//! The only door to C++: one boxed call that reaches every registered operator by name.
//!
//! libtorch checks number, types and defaults of the arguments against the operator's schema, so a wrong call is an
//! [`Error::Torch`] and never undefined behaviour; autograd, autocast and tracing see the call as any other.
//! All `unsafe` of the crate lives in this file.

use std::{
    ffi::{CStr, CString, c_char},
    sync::Once,
};

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::{Error, Result};

/// One argument of an operator call.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// `None`, or "use the schema's default" for an optional argument.
    None,
    /// `Tensor`.
    Tensor(&'a Tensor),
    /// `int` or `SymInt`.
    Int(i64),
    /// `float`.
    Double(f64),
    /// `bool`.
    Bool(bool),
    /// `Tensor[]`.
    Tensors(&'a [Tensor]),
}

impl<'a> From<&'a Tensor> for Value<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

impl<'a> From<&'a [Tensor]> for Value<'a> {
    fn from(tensors: &'a [Tensor]) -> Self {
        Self::Tensors(tensors)
    }
}

impl From<i64> for Value<'_> {
    fn from(int: i64) -> Self {
        Self::Int(int)
    }
}

impl From<f64> for Value<'_> {
    fn from(double: f64) -> Self {
        Self::Double(double)
    }
}

impl From<bool> for Value<'_> {
    fn from(bool: bool) -> Self {
        Self::Bool(bool)
    }
}

impl<'a, T: Into<Value<'a>>> From<Option<T>> for Value<'a> {
    fn from(option: Option<T>) -> Self {
        option.map_or(Self::None, Into::into)
    }
}

/// The layout of `moba::Argument` in csrc/boxed.cpp.
#[repr(C)]
struct Argument {
    tag: i32,
    int: i64,
    double: f64,
    tensor: *const C_tensor,
    tensors: *const *const C_tensor,
}

impl Argument {
    /// `list` receives the pointers of a tensor list, and must outlive the argument.
    fn new(value: &Value<'_>, list: &mut Vec<*const C_tensor>) -> Self {
        let none = Self { tag: 0, int: 0, double: 0.0, tensor: std::ptr::null(), tensors: std::ptr::null() };
        match *value {
            Value::None => none,
            Value::Tensor(tensor) => Self { tag: 1, tensor: tensor.as_ptr(), ..none },
            Value::Int(int) => Self { tag: 2, int, ..none },
            Value::Double(double) => Self { tag: 3, double, ..none },
            Value::Bool(bool) => Self { tag: 4, int: i64::from(bool), ..none },
            Value::Tensors(tensors) => {
                list.extend(tensors.iter().map(Tensor::as_ptr));
                Self { tag: 5, int: tensors.len() as i64, tensors: list.as_ptr(), ..none }
            }
        }
    }
}

unsafe extern "C" {
    fn moba_anchor() -> i32;
    fn moba_call(
        name: *const c_char,
        arguments: *const Argument,
        count: usize,
        outputs: *mut *mut C_tensor,
        capacity: usize,
        written: *mut usize,
    ) -> *mut c_char;
    fn moba_call_text(
        name: *const c_char,
        arguments: *const Argument,
        count: usize,
        text: *mut *mut c_char,
    ) -> *mut c_char;
    fn moba_schema(name: *const c_char, text: *mut *mut c_char) -> *mut c_char;
    fn moba_free(text: *mut c_char);
    fn moba_autocast_get(device: i32, enabled: *mut i32, dtype: *mut i32) -> *mut c_char;
    fn moba_autocast_set(device: i32, enabled: i32, dtype: i32, nesting: i32) -> *mut c_char;
}

/// Registers the `moba` operators with libtorch. Every function of this crate that uses them calls it; a program that
/// only loads TorchScript models which use the operators must call it once itself.
pub fn ensure_loaded() {
    static LOADED: Once = Once::new();
    LOADED.call_once(|| {
        // SAFETY: takes nothing, returns an int; the call keeps the linker from dropping the registration.
        std::hint::black_box(unsafe { moba_anchor() });
    });
}

/// Calls the operator `name` (`namespace::operator` or `namespace::operator.overload`) with positional `arguments`;
/// missing trailing ones take the schema's defaults. Returns its tensors in one row: those of tuples, and of `Tensor[]`.
/// Outputs of other types, such as the numbers among the outputs of `aten`'s attention operators, are left out.
///
/// # Errors
/// [`Error::Torch`] if no such operator exists, if the arguments do not fit its schema, if it fails, or if it returns
/// more than 64 tensors.
pub fn call(name: &str, arguments: &[Value<'_>]) -> Result<Vec<Tensor>> {
    const CAPACITY: usize = 64;
    ensure_loaded();
    let c_name = c_string(name)?;
    let mut lists = vec![Vec::new(); arguments.len()];
    let arguments: Vec<Argument> =
        arguments.iter().zip(&mut lists).map(|(value, list)| Argument::new(value, list)).collect();
    let mut outputs = [std::ptr::null_mut(); CAPACITY];
    let mut written = 0;
    // SAFETY: the pointers, those in `lists` included, outlive the call; the tensors behind `arguments` are borrowed
    // for it; C++ writes at most CAPACITY owned tensors and their number.
    let error = unsafe {
        moba_call(c_name.as_ptr(), arguments.as_ptr(), arguments.len(), outputs.as_mut_ptr(), CAPACITY, &mut written)
    };
    check(name, error)?;
    // SAFETY: on success the first `written` pointers are heap-allocated tensors that we now own.
    Ok(outputs[..written].iter().map(|&tensor| unsafe { Tensor::from_ptr(tensor) }).collect())
}

/// As [`call`], for an operator whose only output is a `str`.
pub(crate) fn call_text(name: &str, arguments: &[Value<'_>]) -> Result<String> {
    ensure_loaded();
    let c_name = c_string(name)?;
    let mut lists = vec![Vec::new(); arguments.len()];
    let arguments: Vec<Argument> =
        arguments.iter().zip(&mut lists).map(|(value, list)| Argument::new(value, list)).collect();
    let mut text = std::ptr::null_mut();
    // SAFETY: as in `call`; `text` receives an owned C string on success.
    check(name, unsafe { moba_call_text(c_name.as_ptr(), arguments.as_ptr(), arguments.len(), &mut text) })?;
    // SAFETY: just written by `moba_call_text`, and read once.
    Ok(unsafe { take_string(text) })
}

/// The schema of a registered operator, as libtorch prints it.
///
/// # Errors
/// [`Error::Torch`] if no such operator exists.
pub fn schema(name: &str) -> Result<String> {
    ensure_loaded();
    let c_name = c_string(name)?;
    let mut text = std::ptr::null_mut();
    // SAFETY: `text` receives an owned C string on success.
    check(name, unsafe { moba_schema(c_name.as_ptr(), &mut text) })?;
    // SAFETY: just written by `moba_schema`, and read once.
    Ok(unsafe { take_string(text) })
}

/// The autocast state of one device type; restored by [`set_autocast`].
#[derive(Clone, Copy)]
pub(crate) struct AutocastState {
    pub enabled: bool,
    pub kind: i32,
}

/// Reads the calling thread's autocast state.
pub(crate) fn autocast_state(device: Device) -> Result<AutocastState> {
    let (mut enabled, mut kind) = (0, 0);
    // SAFETY: both out-parameters are valid for the call.
    check("autocast", unsafe { moba_autocast_get(device_type(device)?, &mut enabled, &mut kind) })?;
    Ok(AutocastState { enabled: enabled != 0, kind })
}

/// Sets the calling thread's autocast state; `nesting` (+1, -1) tells libtorch when to drop its cache of cast weights.
pub(crate) fn set_autocast(device: Device, state: AutocastState, nesting: i32) -> Result<()> {
    // SAFETY: plain integers.
    check("autocast", unsafe { moba_autocast_set(device_type(device)?, i32::from(state.enabled), state.kind, nesting) })
}

/// libtorch's number of a floating-point dtype (c10::ScalarType).
pub(crate) fn float_kind(kind: Kind) -> Result<i32> {
    match kind {
        Kind::Half => Ok(5),
        Kind::Float => Ok(6),
        Kind::Double => Ok(7),
        Kind::BFloat16 => Ok(15),
        other => Err(Error::config(format!("autocast kind must be a floating-point kind, got {other:?}"))),
    }
}

/// libtorch's number of a device type (c10::DeviceType).
fn device_type(device: Device) -> Result<i32> {
    match device {
        Device::Cpu => Ok(0),
        Device::Cuda(_) => Ok(1),
        other => Err(Error::config(format!("device must be Cpu or Cuda, got {other:?}"))),
    }
}

fn c_string(name: &str) -> Result<CString> {
    CString::new(name).map_err(|_| Error::config(format!("an operator name has no NUL byte, got {name:?}")))
}

fn check(op: &str, error: *mut c_char) -> Result<()> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: a non-null return is an owned C string that nobody else frees.
    let message = unsafe { take_string(error) };
    Err(Error::Torch { op: op.to_owned(), message })
}

/// # Safety
/// `text` must be a C string allocated by csrc/boxed.cpp and not freed yet.
unsafe fn take_string(text: *mut c_char) -> String {
    // SAFETY: promised by the caller.
    let string = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    // SAFETY: allocated by csrc/boxed.cpp, freed once.
    unsafe { moba_free(text) };
    string
}
