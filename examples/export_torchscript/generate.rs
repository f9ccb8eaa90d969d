//! Sampling with a module of fixed context length.

use anyhow::{Result, ensure};
use tch::{CModule, Device, Kind, Tensor};

/// Continues `prompt` by `count` bytes.
///
/// The module takes exactly `seqlen` tokens. A shorter text is padded on the right, which changes nothing: attention
/// is causal, so no position sees what comes after it. Of a longer text the last `seqlen` bytes are taken.
pub fn sample(
    module: &CModule,
    prompt: &[u8],
    count: usize,
    seqlen: i64,
    temperature: f64,
    device: Device,
) -> Result<Vec<u8>> {
    ensure!(!prompt.is_empty(), "--prompt must have at least one byte");
    let seqlen = seqlen as usize;
    let mut text = prompt.to_vec();
    for _ in 0..count {
        let context = &text[text.len().saturating_sub(seqlen)..];
        let mut tokens: Vec<i64> = context.iter().map(|&byte| i64::from(byte)).collect();
        let last = tokens.len() as i64 - 1;
        tokens.resize(seqlen, 0);
        let tokens = Tensor::from_slice(&tokens).unsqueeze(0).to_device(device);
        let logits = tch::no_grad(|| module.forward_ts(&[tokens]))?.get(0).get(last).to_kind(Kind::Float);
        let next = if temperature > 0.0 {
            (logits / temperature).softmax(-1, Kind::Float).multinomial(1, true)
        } else {
            logits.argmax(-1, false)
        };
        text.push(u8::try_from(i64::try_from(next)?)?);
    }
    Ok(text)
}
