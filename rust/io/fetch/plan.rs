//! Tensors and what lies between them → parts, each of which one thread reads in one go.

use crate::error::{Error, Kind, Result, try_push, try_with_capacity};
use crate::image::ALIGNMENT;
use crate::io::buffer::OWN_BLOCK;
use crate::io::fetch::Extent;

/// Bytes of a part, at most: what one thread reads before it looks for more work.
const MAX_PART: u64 = OWN_BLOCK as u64;

/// A range of bytes of the image that lies in one tensor, or between tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) extent: Extent,
    /// The tensor, and where in it the piece lies.
    pub(super) tensor: Option<(usize, usize)>,
}

/// What one thread reads in one go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    first: usize,
    end: usize, // of its pieces
    /// Bytes of all its pieces.
    pub(super) len: u64,
    /// Those of them that belong to tensors.
    pub(super) of_tensors: u64,
    /// Memory for the small tensors in it, each at a multiple of the alignment.
    pub(super) arena: usize,
}

/// What is to be read, in the order of the image.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pieces: Vec<Piece>,
    parts: Vec<Part>,
    last: Vec<usize>, // tensor → its last part
}

/// Plans the parts. A tensor below [`OWN_BLOCK`] lies in one part; larger ones are cut. What lies between tensors is read
/// if there is a checksum (`whole`). No part is larger than a quarter of `read_ahead`, unless it is one piece.
///
/// # Errors
/// `Image` when tensors overlap or leave the image of `len` bytes, `Memory`.
pub(super) fn plan(tensors: &[Extent], len: u64, whole: bool, read_ahead: u64) -> Result<Plan> {
    let mut order = try_with_capacity(tensors.len())?;
    order.extend((0..tensors.len()).filter(|&i| tensors[i].len > 0));
    order.sort_unstable_by_key(|&i| tensors[i].offset);
    let mut last = try_with_capacity(tensors.len())?;
    last.resize(tensors.len(), 0);
    let plan = Plan { pieces: Vec::new(), parts: Vec::new(), last };
    let mut cutter = Cutter { plan, most: (read_ahead / 4).clamp(1, MAX_PART), part: Part::default() };
    let mut at = 0;
    for i in order {
        let tensor = tensors[i];
        let end = tensor.offset.checked_add(tensor.len).filter(|&end| end <= len);
        let Some(end) = end.filter(|_| tensor.offset >= at) else {
            return Err(Error::new(Kind::Image, "malformed HDF5: two tensors share bytes, or one leaves the file"));
        };
        if whole {
            cutter.add(Extent { offset: at, len: tensor.offset - at }, None)?;
        }
        cutter.add(tensor, Some(i))?;
        at = end;
    }
    if whole {
        cutter.add(Extent { offset: at, len: len - at }, None)?;
    }
    cutter.end_part()?;
    Ok(cutter.plan)
}

/// The plan so far, and the part that is not full yet.
struct Cutter {
    plan: Plan,
    most: u64, // bytes of a part
    part: Part,
}

impl Cutter {
    /// Adds a range of bytes, in pieces.
    fn add(&mut self, range: Extent, tensor: Option<usize>) -> Result<()> {
        let mut at = 0;
        while at < range.len {
            let n = (range.len - at).min(MAX_PART);
            let small = tensor.is_some() && range.len < OWN_BLOCK as u64;
            let room = if small { (n as usize).next_multiple_of(ALIGNMENT as usize) } else { 0 };
            if self.part.len > 0 && (self.part.len + n > self.most || self.part.arena + room > OWN_BLOCK) {
                self.end_part()?;
            }
            let extent = Extent { offset: range.offset + at, len: n };
            try_push(&mut self.plan.pieces, Piece { extent, tensor: tensor.map(|i| (i, at as usize)) })?;
            self.part.len += n;
            self.part.arena += room;
            if let Some(i) = tensor {
                self.part.of_tensors += n;
                self.plan.last[i] = self.plan.parts.len();
            }
            at += n;
        }
        Ok(())
    }

    fn end_part(&mut self) -> Result<()> {
        if self.part.len > 0 {
            let end = self.plan.pieces.len();
            try_push(&mut self.plan.parts, Part { end, ..self.part })?;
            self.part = Part { first: end, ..Part::default() };
        }
        Ok(())
    }
}

impl Plan {
    /// How many parts there are.
    pub(super) fn len(&self) -> usize {
        self.parts.len()
    }

    pub(super) fn part(&self, number: usize) -> &Part {
        &self.parts[number]
    }

    /// The pieces of a part, in the order of the image.
    pub(super) fn pieces(&self, number: usize) -> &[Piece] {
        let part = self.part(number);
        &self.pieces[part.first..part.end]
    }

    /// The part that completes tensor `i`; `None` for what is not in the plan.
    pub(super) fn completes(&self, i: usize) -> Option<usize> {
        self.last.get(i).copied()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Tensors with gaps between them, in any order, and the bytes of the image.
    fn images() -> impl Strategy<Value = (Vec<Extent>, u64)> {
        let len = prop_oneof![4 => 0..3000u64, 2 => 0..2 * MAX_PART, 1 => 0..4 * MAX_PART];
        proptest::collection::vec((prop_oneof![Just(0u64), 0..70_000u64], len), 0..40).prop_map(|places| {
            let mut at = 0;
            let mut tensors = Vec::new();
            for (gap, len) in places {
                tensors.push(Extent { offset: at + gap, len });
                at += gap + len;
            }
            let n = tensors.len();
            if n > 1 {
                tensors.swap(0, n / 2);
            }
            (tensors, at + 17)
        })
    }

    proptest! {
        #[test]
        fn every_byte_is_in_one_piece_and_no_part_is_too_large(
            (tensors, len) in images(), whole: bool, shift in 0..64u32,
        ) {
            let read_ahead = u64::MAX >> shift;
            let plan = plan(&tensors, len, whole, read_ahead).unwrap();
            let (mut end, mut seen) = (0, vec![0; tensors.len()]);
            for number in 0..plan.len() {
                let (part, pieces) = (plan.part(number), plan.pieces(number));
                prop_assert!(!pieces.is_empty());
                prop_assert!(pieces.len() == 1 || part.len <= (read_ahead / 4).min(MAX_PART));
                let mut arena = 0;
                for &Piece { extent, tensor } in pieces {
                    prop_assert!(extent.len > 0 && extent.len <= MAX_PART && extent.offset >= end);
                    prop_assert!(!whole || extent.offset == end);
                    end = extent.offset + extent.len;
                    let Some((i, at)) = tensor else { continue };
                    prop_assert_eq!(at as u64, seen[i]);
                    prop_assert_eq!(extent.offset, tensors[i].offset + seen[i]);
                    seen[i] += extent.len;
                    prop_assert!(number <= plan.completes(i).unwrap());
                    if tensors[i].len < OWN_BLOCK as u64 {
                        prop_assert_eq!(extent.len, tensors[i].len, "a small tensor is not cut");
                        arena += (extent.len as usize).next_multiple_of(64);
                    }
                    if seen[i] == tensors[i].len {
                        prop_assert_eq!(plan.completes(i), Some(number));
                    }
                }
                prop_assert_eq!(part.arena, arena);
                prop_assert!(arena <= OWN_BLOCK || pieces.len() == 1);
                prop_assert_eq!(part.len, pieces.iter().map(|p| p.extent.len).sum::<u64>());
                let of_tensors = pieces.iter().filter(|p| p.tensor.is_some()).map(|p| p.extent.len).sum::<u64>();
                prop_assert_eq!(part.of_tensors, of_tensors);
            }
            prop_assert!(tensors.iter().zip(seen).all(|(t, seen)| t.len == seen));
            prop_assert!(!whole || end == len);
        }
    }
}
