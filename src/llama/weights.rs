//! Weights from a safetensors file, checked by name and shape before any variable is touched.

use std::{collections::BTreeMap, path::Path};

use tch::{TchError, Tensor, nn};

use crate::{Error, Result};

/// Copies the tensors of the `.safetensors` file at `path` into the variables of `vs`, which keep their dtype and
/// device. Either all variables are set, or none and an error is returned.
///
/// `rotary_emb.inv_freq` buffers, which old files carry, are ignored.
///
/// # Errors
/// [`Error::File`] if the file is missing, truncated, not safetensors, or holds other names or shapes than `vs`.
pub fn load_weights(vs: &nn::VarStore, path: impl AsRef<Path>) -> Result<()> {
    load_tensors(vs.variables().into_iter().collect(), path)
}

/// [`load_weights`] for any named tensors, for example the state of an optimizer.
///
/// # Errors
/// As [`load_weights`].
pub fn load_tensors(variables: BTreeMap<String, Tensor>, path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let mut tensors = read_tensors(path)?;
    tensors.retain(|name, _| !name.ends_with("rotary_emb.inv_freq"));

    let missing: Vec<_> = variables.keys().filter(|name| !tensors.contains_key(*name)).collect();
    let extra: Vec<_> = tensors.keys().filter(|name| !variables.contains_key(*name)).collect();
    let shapes: Vec<_> = variables
        .iter()
        .filter_map(|(name, variable)| Some((name, variable.size(), tensors.get(name)?.size())))
        .filter(|(_, wanted, given)| wanted != given)
        .map(|(name, wanted, given)| format!("{name} (wanted {wanted:?}, got {given:?})"))
        .collect();
    let problems: Vec<_> =
        [("lacks", list(&missing)), ("has the unknown", list(&extra)), ("has another shape for", list(&shapes))]
            .into_iter()
            .filter_map(|(verb, names)| Some(format!("{verb} {}", names?)))
            .collect();
    if !problems.is_empty() {
        let message = format!("does not belong to this model: it {}", problems.join("; it "));
        return Err(Error::file(path, message));
    }
    tch::no_grad(|| {
        for (name, mut variable) in variables {
            variable.f_copy_(&tensors[&name])?;
        }
        Ok(())
    })
}

/// All tensors of a `.safetensors` file by name, on the CPU.
///
/// # Errors
/// [`Error::File`] if the file is missing, truncated or not safetensors.
pub fn read_tensors(path: impl AsRef<Path>) -> Result<BTreeMap<String, Tensor>> {
    let path = path.as_ref();
    std::fs::File::open(path).map_err(|error| Error::file(path, format!("cannot be read: {error}")))?;
    let tensors = Tensor::read_safetensors(path).map_err(|error| {
        let reason = match error {
            TchError::SafeTensorError { err, .. } => err.to_string(),
            other => other.to_string(),
        };
        Error::file(
            path,
            format!("not a whole safetensors file ({reason}): it may be truncated, copy or save it again"),
        )
    })?;
    Ok(tensors.into_iter().collect())
}

/// The first few of `items` and how many more there are; `None` if there are none.
fn list<T: ToString>(items: &[T]) -> Option<String> {
    const SHOWN: usize = 3;
    let mut text = items.iter().take(SHOWN).map(T::to_string).collect::<Vec<_>>().join(", ");
    if items.len() > SHOWN {
        text.push_str(&format!(" and {} more", items.len() - SHOWN));
    }
    (!items.is_empty()).then_some(text)
}
