//! Short strings that were met lately, with what was made of them: configs repeat a few dozen.

/// Strings of more bytes seldom come again.
const LONGEST: usize = 32;
const SLOTS: usize = 1024; // about 100 kB

/// What was made of short strings, each in the slot that its ends choose; two that choose the same are not shared.
#[derive(Debug)]
pub struct Recent<T> {
    slots: Vec<Option<(String, T)>>,
    credit: usize, // hits against misses
}

impl<T> Recent<T> {
    /// Nothing yet, and no memory.
    pub const fn new() -> Self {
        Self { slots: Vec::new(), credit: 0 }
    }

    /// Begins a text, with what earlier ones left.
    pub fn begin(&mut self) {
        self.slots.resize_with(SLOTS, || None);
        self.credit = 256;
    }

    /// Whether looking pays: a text of strings that do not repeat, as a vocabulary, should not be slow.
    pub fn pays(&self) -> bool {
        self.credit > 0
    }

    /// What was made of `text`, or is made now; `None` for long strings.
    ///
    /// # Panics
    /// Before [`Recent::begin`].
    pub fn get(&mut self, text: &str, make: impl FnOnce() -> T) -> Option<&T> {
        if text.len() > LONGEST {
            return None;
        }
        let slot = &mut self.slots[slot_of(text.as_bytes())];
        if slot.as_ref().is_some_and(|(known, _)| known == text) {
            self.credit += 1;
        } else {
            self.credit = self.credit.saturating_sub(1);
            let mut known = slot.take().map_or_else(String::new, |(known, _)| known); // for its memory
            known.clear();
            known.push_str(text);
            *slot = Some((known, make()));
        }
        slot.as_ref().map(|(_, made)| made)
    }
}

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// A hash of the ends of a string.
fn slot_of(text: &[u8]) -> usize {
    let ends = match (text.first_chunk(), text.last_chunk()) {
        (Some(&first), Some(&last)) => u64::from_le_bytes(first) ^ u64::from_le_bytes(last).rotate_left(29),
        _ => text.iter().fold(0, |word, &b| word << 8 | u64::from(b)),
    };
    ((ends ^ text.len() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_repeats_is_made_once_and_what_does_not_stops_paying() {
        let mut recent = Recent::new();
        recent.begin();
        for text in ["a", "name", "class_name", "a", "name", "class_name"] {
            assert_eq!(recent.get(text, || text.to_owned()).unwrap(), text);
        }
        for text in ["a", "name", "class_name"] {
            assert_eq!(recent.get(text, || unreachable!("it is known")).unwrap(), text);
        }
        assert_eq!(recent.get(&"x".repeat(LONGEST + 1), || unreachable!("it is too long")), None);
        for i in 0..1000 {
            recent.get(&format!("word_{i}"), || i.to_string());
        }
        assert!(!recent.pays());
        recent.begin();
        assert!(recent.pays());
    }
}
