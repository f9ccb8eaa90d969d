//! Text to tokens: a byte-level BPE trained on the text itself, or plain bytes.

use std::ops::RangeInclusive;

use anyhow::{Result, anyhow, ensure};
use tokenizers::{
    Tokenizer,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
    pre_tokenizers::byte_level::ByteLevel,
};

use crate::text::SEPARATOR;

/// At least the bytes, and at most what two bytes of a token hold.
pub const VOCAB_SIZES: RangeInclusive<i64> = 256..=i16::MAX as i64;
/// Most text that the BPE is trained on: more changes a vocabulary of thousands little.
const TRAINING_BYTES: usize = 32 << 20;
/// Text is encoded in pieces of about this size, cut at the ends of lines.
const PIECE_BYTES: usize = 64 << 10;
/// Pieces at a time: a token takes far more memory before it is reduced to its number.
const PIECES: usize = 128;

pub enum Tokens {
    Bytes,
    Bpe { tokenizer: Box<Tokenizer>, separator: i16 },
}

impl Tokens {
    /// Trains a BPE of `vocab_size` tokens (of `VOCAB_SIZES`), of which 256 are the bytes; no more than those: plain bytes.
    pub fn train<'a>(vocab_size: usize, documents: impl Iterator<Item = &'a [u8]>) -> Result<Self> {
        if vocab_size == 256 {
            return Ok(Self::Bytes);
        }
        let mut left = TRAINING_BYTES;
        let sample = documents.map_while(|text| {
            let taken = text.len().min(left);
            left -= taken;
            (taken > 0).then(|| pieces(&text[..taken]))
        });
        let sample: Vec<String> = sample.flatten().collect();

        let mut tokenizer = Tokenizer::new(BPE::default());
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        let trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(vocab_size)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        tokenizer.train(&mut TrainerWrapper::from(trainer), sample.iter()).map_err(|error| anyhow!("BPE: {error}"))?;
        let tokenizer = Box::new(tokenizer);
        let separator = encode(&tokenizer, vec![char::from(SEPARATOR).to_string()])?;
        ensure!(separator.len() == 1, "BPE: the separator of documents must be one token, not {}", separator.len());
        Ok(Self::Bpe { tokenizer, separator: separator[0] })
    }

    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Bytes => 256,
            Self::Bpe { tokenizer, .. } => tokenizer.get_vocab_size(true),
        }
    }

    /// The tokenizer in the form of Hugging Face's `tokenizer.json`; the word `bytes` for plain bytes.
    pub fn json(&self) -> Result<String> {
        match self {
            Self::Bytes => Ok("\"bytes\"".to_owned()),
            Self::Bpe { tokenizer, .. } => tokenizer.to_string(false).map_err(|error| anyhow!("BPE: {error}")),
        }
    }

    /// The tokens of a document and, after them, the separator.
    pub fn document(&self, text: &[u8]) -> Result<Vec<i16>> {
        match self {
            Self::Bytes => Ok(text.iter().chain([&SEPARATOR]).map(|&byte| i16::from(byte)).collect()),
            Self::Bpe { tokenizer, separator } => {
                let mut tokens = Vec::with_capacity(text.len() / 2);
                for pieces in pieces(text).chunks(PIECES) {
                    tokens.extend(encode(tokenizer, pieces.to_vec())?);
                }
                tokens.push(*separator);
                Ok(tokens)
            }
        }
    }
}

fn encode(tokenizer: &Tokenizer, pieces: Vec<String>) -> Result<Vec<i16>> {
    let encodings = tokenizer.encode_batch_fast(pieces, false).map_err(|error| anyhow!("BPE: {error}"))?;
    encodings.iter().flat_map(|encoding| encoding.get_ids()).map(|&id| Ok(i16::try_from(id)?)).collect()
}

fn pieces(text: &[u8]) -> Vec<String> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.iter().skip(PIECE_BYTES).position(|&byte| byte == b'\n');
        let (piece, after) = rest.split_at(end.map_or(rest.len(), |end| PIECE_BYTES + end + 1));
        pieces.push(String::from_utf8_lossy(piece).into_owned());
        rest = after;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bpe_covers_its_text() {
        let text = "fn main() {\n    println!(\"hello, hello, hello\");\n}\n".repeat(50);
        let tokens = Tokens::train(300, [text.as_bytes()].into_iter()).unwrap();
        let document = tokens.document(text.as_bytes()).unwrap();
        assert!(document.len() < text.len() / 2 && tokens.vocab_size() <= 300);
        let Tokens::Bpe { tokenizer, separator } = &tokens else { panic!("not a BPE") };
        assert_eq!(document.last(), Some(separator));
        let ids: Vec<u32> = document.iter().map(|&id| id as u32).collect();
        let mut with_decoder = tokenizer.as_ref().clone();
        with_decoder.with_decoder(Some(ByteLevel::default()));
        assert_eq!(with_decoder.decode(&ids, false).unwrap(), text + "\0");
    }

    #[test]
    fn pieces_are_the_text() {
        let text = "one line\n".repeat(20_000);
        let pieces = pieces(text.as_bytes());
        assert!(pieces.len() > 2 && pieces.iter().all(|piece| piece.ends_with('\n')));
        assert_eq!(pieces.concat(), text);
    }
}
