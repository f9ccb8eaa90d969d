//! The tokenised text in one file: safetensors with the tokens of the training and the held-out part, two bytes each, and
//! what they are in the metadata.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{text, tokenizer::Tokens};

/// Files of one directory are joined up to this size, so that most tokens have a long context before them.
const DOCUMENT_BYTES: usize = 1 << 20;
/// Documents of at least this many tokens are counted, because a context of 32K tokens can fall inside them.
const LONG: usize = 32 << 10;
const METADATA: &str = "corpus";

/// What a text is. Two runs can be compared if these are equal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// SHA-256 of all tokens.
    pub corpus: String,
    /// SHA-256 of `tokenizer.json`.
    pub tokenizer: String,
    pub vocab_size: i64,
    pub bytes_per_token: f64,
}

pub struct Corpus {
    pub identity: Identity,
    pub train: Vec<i16>,
    pub held_out: Vec<i16>,
}

/// Reads text, trains the tokenizer and writes `out`, and `tokenizer.json` beside it.
pub fn build(data: &[PathBuf], vocab_size: usize, out: &Path) -> Result<()> {
    let documents = text::documents(data, DOCUMENT_BYTES)?;
    let bytes: usize = documents.values().map(Vec::len).sum();
    println!("text: {} documents, {:.1} MB", documents.len(), bytes as f64 / 1e6);

    // In the order of a hash, so that what the tokenizer sees is a sample of the whole text.
    let mut order: Vec<&Vec<u8>> = documents.values().collect();
    order.sort_by_key(|text| text::hash(text));
    let training = order.iter().filter(|text| !text::is_held_out(text)).map(|text| text.as_slice());
    let tokens = Tokens::train(vocab_size, training)?;

    let (mut train, mut held_out, mut long) = (Vec::new(), Vec::new(), 0);
    for text in documents.values() {
        let document = tokens.document(text)?;
        long += if document.len() >= LONG { document.len() } else { 0 };
        if text::is_held_out(text) { held_out.extend(document) } else { train.extend(document) }
    }
    ensure!(
        !train.is_empty() && !held_out.is_empty(),
        "the text has too few documents ({}) to hold some out: name more with --data",
        documents.len()
    );
    let json = tokens.json()?;
    let count = train.len() + held_out.len();
    let identity = Identity {
        corpus: digest(&train, &held_out),
        tokenizer: hex(&Sha256::digest(&json)),
        vocab_size: tokens.vocab_size() as i64,
        bytes_per_token: bytes as f64 / count as f64,
    };
    let corpus = Corpus { identity, train, held_out };
    corpus.write(out, &json).with_context(|| format!("cannot write {}", out.display()))?;
    println!(
        "tokens: {:.1} M of {:.2} bytes, {:.0} % of them in documents of 32K tokens and more; {}",
        count as f64 / 1e6,
        bytes as f64 / count as f64,
        100.0 * long as f64 / count as f64,
        out.display()
    );
    Ok(())
}

/// Writes the corpus `from` to `out` in pieces of so many tokens, shuffled within the training and the held-out part: the
/// same text, in which little comes back from far away.
pub fn shuffle(from: &Path, piece: usize, out: &Path) -> Result<()> {
    let beside = folder(out).is_some_and(|there| folder(from) == Some(there));
    ensure!(!beside, "--out wants another folder than that of {}: tokenizer.json is written beside it", from.display());
    let tokenizer = from.with_file_name("tokenizer.json");
    let json = fs::read_to_string(&tokenizer).with_context(|| format!("cannot read {}", tokenizer.display()))?;
    let corpus = Corpus::read(from)?.shuffled(piece);
    corpus.write(out, &json).with_context(|| format!("cannot write {}", out.display()))
}

/// The folder of a file, the same however the path is written; `None` if there is none yet.
fn folder(path: &Path) -> Option<PathBuf> {
    // Below ".", because the parent of a bare name is empty.
    Path::new(".").join(path.parent()?).canonicalize().ok()
}

impl Corpus {
    fn shuffled(self, piece: usize) -> Self {
        let mut random = StdRng::seed_from_u64(0);
        let mut shuffled = |tokens: &[i16]| {
            let mut pieces: Vec<_> = tokens.chunks(piece).collect();
            pieces.shuffle(&mut random);
            pieces.concat()
        };
        let (train, held_out) = (shuffled(&self.train), shuffled(&self.held_out));
        let identity = Identity { corpus: digest(&train, &held_out), ..self.identity };
        Self { identity, train, held_out }
    }

    pub fn read(path: &Path) -> Result<Self> {
        let missing = "build it with `scaling_laws corpus`, or make corpus";
        let file = fs::read(path).with_context(|| format!("cannot read the corpus {}: {missing}", path.display()))?;
        Self::parse(&file).with_context(|| format!("{} is no whole corpus: build it again", path.display()))
    }

    fn parse(file: &[u8]) -> Result<Self> {
        let (_, header) = SafeTensors::read_metadata(file)?;
        let metadata = header.metadata().as_ref().and_then(|all| all.get(METADATA)).context("it has no metadata")?;
        let identity: Identity = serde_json::from_str(metadata)?;
        let tensors = SafeTensors::deserialize(file)?;
        let part = |name| -> Result<Vec<i16>> {
            let tensor = tensors.tensor(name)?;
            ensure!(tensor.dtype() == Dtype::I16, "{name} is {:?}, wanted I16", tensor.dtype());
            Ok(tensor.data().chunks_exact(2).map(|pair| i16::from_le_bytes([pair[0], pair[1]])).collect())
        };
        let (train, held_out) = (part("train")?, part("held_out")?);
        ensure!(digest(&train, &held_out) == identity.corpus, "its tokens are not those that it was written with");
        Ok(Self { identity, train, held_out })
    }

    fn write(&self, out: &Path, tokenizer: &str) -> Result<()> {
        if let Some(folder) = out.parent() {
            fs::create_dir_all(folder)?;
        }
        let (train, held_out) = (little_endian(&self.train), little_endian(&self.held_out));
        let view = |data| TensorView::new(Dtype::I16, vec![<[u8]>::len(data) / 2], data);
        let tensors = [("train", view(&train)?), ("held_out", view(&held_out)?)];
        let metadata = HashMap::from([(METADATA.to_owned(), serde_json::to_string(&self.identity)?)]);
        // Renamed at the end: a corpus that exists is whole.
        let partial = out.with_extension("partial");
        safetensors::serialize_to_file(tensors, Some(metadata), &partial)?;
        fs::write(out.with_file_name("tokenizer.json"), tokenizer)?;
        Ok(fs::rename(partial, out)?)
    }
}

impl Identity {
    /// What differs from `other`, as text.
    pub fn difference(&self, other: &Self) -> Option<String> {
        if self.tokenizer != other.tokenizer {
            return Some(format!("tokenizer {} and {}", short(&self.tokenizer), short(&other.tokenizer)));
        }
        (self.corpus != other.corpus).then(|| format!("corpus {} and {}", short(&self.corpus), short(&other.corpus)))
    }
}

/// Enough of a hash to tell it from others.
pub fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

fn digest(train: &[i16], held_out: &[i16]) -> String {
    let mut hasher = Sha256::new();
    hasher.update((train.len() as u64).to_le_bytes());
    hasher.update(little_endian(train));
    hasher.update(little_endian(held_out));
    hex(&hasher.finalize())
}

fn little_endian(tokens: &[i16]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A corpus without a file behind it, for tests.
#[cfg(test)]
pub fn of_tokens(train: Vec<i16>, held_out: Vec<i16>, vocab_size: i64) -> Result<Corpus> {
    ensure!(!train.is_empty(), "no tokens");
    let identity =
        Identity { corpus: digest(&train, &held_out), tokenizer: "none".into(), vocab_size, bytes_per_token: 1.0 };
    Ok(Corpus { identity, train, held_out })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_documents_of_their_own() {
        let folder = std::env::temp_dir().join(format!("scaling-text-{}", std::process::id()));
        let data = ["a", "b"].map(|name| folder.join(name));
        for directory in &data {
            fs::create_dir_all(directory).unwrap();
            fs::write(directory.join("same.txt"), "text\n").unwrap();
        }
        let documents = text::documents(&data, DOCUMENT_BYTES).unwrap();
        assert_eq!(documents.into_values().collect::<Vec<_>>(), [b"=== same.txt\ntext\n"; 2]);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn shuffled_in_whole_pieces() {
        let corpus = of_tokens((0..1000).collect(), (0..90).collect(), 1000).unwrap();
        let shuffled = of_tokens((0..1000).collect(), (0..90).collect(), 1000).unwrap().shuffled(10);
        assert_ne!(shuffled.train, corpus.train);
        assert!(corpus.identity.difference(&shuffled.identity).is_some());
        for (before, after) in [(corpus.train, shuffled.train), (corpus.held_out, shuffled.held_out)] {
            assert!(after.chunks(10).all(|piece| piece[0] % 10 == 0 && piece.is_sorted()));
            let mut sorted = after.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, before);
        }
    }

    #[test]
    fn a_folder_is_the_same_however_it_is_written() {
        let here = Path::new("corpus.safetensors");
        assert!(folder(here).is_some());
        for other in ["./corpus.safetensors", "src/../other.safetensors"] {
            assert_eq!(folder(Path::new(other)), folder(here));
            let refusal = format!("{:#}", shuffle(here, 10, Path::new(other)).unwrap_err());
            assert!(refusal.contains("--out wants another folder"), "{refusal}");
        }
        assert_ne!(folder(Path::new("src/corpus.safetensors")), folder(here));
        assert_eq!(folder(Path::new("not-there/corpus.safetensors")), None);
    }

    #[test]
    fn written_and_read() {
        let folder = std::env::temp_dir().join(format!("scaling-corpus-{}", std::process::id()));
        let path = folder.join("corpus.safetensors");
        let corpus = of_tokens(vec![1, 2, 300, -1], vec![7], 301).unwrap();
        corpus.write(&path, "{}").unwrap();
        let again = Corpus::read(&path).unwrap();
        assert_eq!((&again.train, &again.held_out), (&corpus.train, &corpus.held_out));
        assert_eq!(again.identity, corpus.identity);

        let mut file = fs::read(&path).unwrap();
        *file.last_mut().unwrap() ^= 1;
        fs::write(&path, file).unwrap();
        let error = format!("{:#}", Corpus::read(&path).err().unwrap());
        assert!(error.contains("no whole corpus") && error.contains("not those"), "{error}");
        fs::remove_dir_all(folder).unwrap();
    }
}
