//! Gradients against central differences: the check behind this crate's tests, public for functions built on it.

use tch::{Kind, Tensor};

use crate::{Error, Result};

/// How finely and how strictly [`gradcheck`] looks. The defaults suit float64 inputs of ordinary size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradcheckOptions {
    /// Half the distance between the two points of a difference.
    pub step: f64,
    /// Allowed difference, absolute part.
    pub atol: f64,
    /// Allowed difference, as a fraction of the numeric value.
    pub rtol: f64,
    /// Inputs of at most this many elements are checked element by element, larger ones along one direction that
    /// touches every element.
    pub max_elements: usize,
}

impl Default for GradcheckOptions {
    fn default() -> Self {
        Self { step: 1e-6, atol: 1e-6, rtol: 1e-5, max_elements: 4096 }
    }
}

/// Compares the gradient that autograd computes for `f` with central differences, for every input.
///
/// `f` must be smooth around `inputs` and repeatable. MoBA's selection of blocks is not smooth, so check it with the
/// routing held fixed: compute [`route`](crate::route) once and let `f` call [`routed_attention`](crate::routed_attention).
/// The output is projected to a number with fixed weights; add several outputs up before returning them.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_moba::{GradcheckOptions, gradcheck};
/// let x = Tensor::arange(6, (Kind::Double, Device::Cpu)).view([2, 3]);
/// gradcheck(|x| Ok(x[0].f_square()?), &[x], &GradcheckOptions::default())?;
/// # Ok::<(), tch_moba::Error>(())
/// ```
///
/// # Errors
/// [`Error::Gradient`] names input, element, both values and the allowed difference; also for an input that is not
/// float64 and for an output that depends on no input. Errors of `f` pass through.
pub fn gradcheck(f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor], options: &GradcheckOptions) -> Result<()> {
    let inputs = inputs.iter().enumerate().map(|(i, x)| leaf(i, x)).collect::<Result<Vec<_>>>()?;
    let analytic = analytic_gradients(&f, &inputs)?;
    for (number, gradient) in analytic.iter().enumerate() {
        let numeric = |direction: &Tensor| -> Result<f64> {
            let along = |sign: f64| -> Result<f64> {
                let moved = move_input(&inputs, number, &direction.f_mul_scalar(sign * options.step)?)?;
                // No graph is needed here, and it would only keep memory.
                Ok(tch::no_grad(|| project(&f(&moved)?))?.f_double_value(&[])?)
            };
            Ok((along(1.0)? - along(-1.0)?) / (2.0 * options.step))
        };
        let compare = |place: &str, analytic: f64, numeric: f64| {
            let allowed = options.atol + options.rtol * numeric.abs();
            // Written so that NaN on either side fails.
            if (analytic - numeric).abs() <= allowed {
                return Ok(());
            }
            Err(Error::Gradient(format!(
                "input {number}, {place}: autograd says {analytic:e}, central differences say {numeric:e}, \
                 allowed difference {allowed:e}"
            )))
        };
        let size = inputs[number].size();
        if inputs[number].numel() <= options.max_elements {
            let gradient = Vec::<f64>::try_from(gradient.f_reshape([-1])?)?;
            for (flat, &analytic) in gradient.iter().enumerate() {
                let direction = inputs[number].f_zeros_like()?;
                let mut element = direction.f_view([-1])?.f_get(flat as i64)?;
                let _ = element.f_fill_(1.0)?;
                let place = format!("element {:?}", position(flat as i64, &size));
                compare(&place, analytic, numeric(&direction)?)?;
            }
        } else {
            let direction = weights(&inputs[number])?;
            let analytic = gradient.f_mul(&direction)?.f_sum(Kind::Double)?.f_double_value(&[])?;
            compare("along a direction through all elements", analytic, numeric(&direction)?)?;
        }
    }
    Ok(())
}

fn leaf(number: usize, input: &Tensor) -> Result<Tensor> {
    if input.f_kind()? != Kind::Double {
        return Err(Error::Gradient(format!("input {number} must be float64, got {:?}", input.f_kind()?)));
    }
    Ok(input.f_detach()?.f_contiguous()?.f_set_requires_grad(true)?)
}

fn analytic_gradients(f: &impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let value = project(&f(inputs)?)?;
    if !value.requires_grad() {
        return Err(Error::Gradient("the output depends on no input, so there is no gradient to check".to_owned()));
    }
    let gradients = Tensor::f_run_backward(&[value], inputs, false, false)?;
    let or_zero = |(gradient, input): (Tensor, &Tensor)| {
        // An input that the output does not depend on has no gradient; that reads as zero.
        if gradient.defined() { Ok(gradient) } else { Ok(input.f_zeros_like()?) }
    };
    gradients.into_iter().zip(inputs).map(or_zero).collect()
}

/// The inputs with `change` added to one of them.
fn move_input(inputs: &[Tensor], number: usize, change: &Tensor) -> Result<Vec<Tensor>> {
    let detached = inputs.iter().map(|x| x.f_detach());
    let mut moved = detached.collect::<std::result::Result<Vec<_>, _>>()?;
    moved[number] = moved[number].f_add(change)?;
    Ok(moved)
}

fn project(output: &Tensor) -> Result<Tensor> {
    Ok(output.f_to_kind(Kind::Double)?.f_mul(&weights(output)?)?.f_sum(Kind::Double)?)
}

/// Fixed weights in -1..=1 without a pattern that an error could hide in; the caller's random state stays untouched.
fn weights(like: &Tensor) -> Result<Tensor> {
    let n = Tensor::f_arange(like.numel() as i64, (Kind::Double, like.device()))?;
    Ok(n.f_square()?.f_add_scalar(1.0)?.f_cos()?.f_view(like.size().as_slice())?)
}

/// Index in every dimension of element number `flat`.
fn position(mut flat: i64, size: &[i64]) -> Vec<i64> {
    let mut index: Vec<i64> = size.iter().rev().map(|&n| (flat % n, flat /= n).0).collect();
    index.reverse();
    index
}
