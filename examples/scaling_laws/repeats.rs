//! How much of a text can be copied from its own context, and from how far: what attention to far tokens is worth on it.

use std::{collections::HashMap, fmt::Write};

/// Lengths of the context that has to come again.
const CONTEXTS: [usize; 3] = [4, 8, 12];

/// Of the tokens of a text, those whose context was there before in the same sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Repeats {
    pub tokens: usize,
    /// Last seen at most so far back, or only farther; and how many of them a copy predicts rightly.
    pub near: usize,
    pub near_right: usize,
    pub far: usize,
    pub far_right: usize,
}

/// Counts over sequences of `seqlen` tokens side by side.
pub fn count(text: &[i16], seqlen: usize, near: usize, context: usize) -> Repeats {
    let mut repeats = Repeats::default();
    for sequence in text.chunks(seqlen) {
        let mut seen: HashMap<&[i16], usize> = HashMap::new();
        for position in context..sequence.len() {
            repeats.tokens += 1;
            let before = seen.insert(&sequence[position - context..position], position);
            let Some(before) = before else { continue };
            let right = usize::from(sequence[before] == sequence[position]);
            if position - before <= near {
                repeats.near += 1;
                repeats.near_right += right;
            } else {
                repeats.far += 1;
                repeats.far_right += right;
            }
        }
    }
    repeats
}

pub fn table(text: &[i16], seqlen: usize, near: usize) -> String {
    let mut table = format!(
        "| context | seen within {near} tokens | copy right | seen only farther | copy right |\n|---|---|---|---|---|\n"
    );
    let share = |part: usize, whole: usize| 100.0 * part as f64 / whole.max(1) as f64;
    for context in CONTEXTS {
        let Repeats { tokens, near, near_right, far, far_right } = count(text, seqlen, near, context);
        let (near, near_right) = (share(near, tokens), share(near_right, near));
        let (far, far_right) = (share(far, tokens), share(far_right, far));
        let _ = writeln!(table, "| {context} | {near:.1} % | {near_right:.0} % | {far:.1} % | {far_right:.0} % |");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counted_by_hand() {
        //          0  1  2  3  4  5  6  7  8  9
        let text = [1, 2, 3, 9, 1, 2, 3, 1, 2, 4];
        // After "1 2": 3, then 3 four tokens later (right), then 4 three tokens later (wrong). After "2 3": 9, then 1.
        let expected = Repeats { tokens: 8, near: 1, near_right: 0, far: 2, far_right: 1 };
        assert_eq!(count(&text, 10, 3, 2), expected);
        // A sequence knows nothing of the one before it.
        assert_eq!(count(&text, 5, 3, 2), Repeats { tokens: 6, ..Repeats::default() });
    }
}
