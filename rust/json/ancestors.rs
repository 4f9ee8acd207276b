//! Containers inside themselves.

use std::collections::HashSet;
use std::hash::Hash;

/// What is open while nested containers are written, to find one inside itself: constant work for each.
#[derive(Debug)]
pub struct Ancestors<K> {
    near: Vec<K>, // the outermost ones, among which looking is faster than hashing
    far: HashSet<K>,
}

impl<K> Default for Ancestors<K> {
    fn default() -> Self {
        Self { near: Vec::new(), far: HashSet::new() }
    }
}

impl<K: Eq + Hash> Ancestors<K> {
    const NEAR: usize = 16;

    /// Opens a container; `false` if it is open already.
    pub fn open(&mut self, container: K) -> bool {
        if self.near.contains(&container) {
            return false;
        }
        if self.near.len() < Self::NEAR {
            self.near.push(container);
            return true;
        }
        self.far.insert(container)
    }

    /// Closes the innermost one.
    pub fn close(&mut self, container: &K) {
        if !self.far.remove(container) {
            self.near.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_inside_itself_is_found_with_constant_work() {
        thread_local!(static COMPARED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) });
        #[derive(Debug)]
        struct Key(usize);
        impl Hash for Key {
            fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
                self.0.hash(state);
            }
        }
        impl PartialEq for Key {
            fn eq(&self, other: &Self) -> bool {
                COMPARED.set(COMPARED.get() + 1);
                self.0 == other.0
            }
        }
        impl Eq for Key {}
        for depth in [1, 16, 17, 1000, 100_000] {
            let mut open = Ancestors::default();
            COMPARED.set(0);
            for n in 0..depth {
                assert!(open.open(Key(n)));
                assert!(open.open(Key(depth + n))); // a sibling of what comes next
                open.close(&Key(depth + n));
            }
            assert!(COMPARED.get() <= depth * 40, "{} comparisons for {depth}", COMPARED.get());
            for n in (0..depth).rev() {
                assert!(!open.open(Key(n)) && !open.open(Key(0)), "{n} of {depth}");
                open.close(&Key(n));
                assert!(open.open(Key(n)), "{n} of {depth}");
                open.close(&Key(n));
            }
        }
    }
}
