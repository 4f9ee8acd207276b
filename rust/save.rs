//! A save from plan to commit: lay out, emit, close the archive, replace the file.

use std::path::PathBuf;

use crate::archive::write::{Archive, Content, lead_in};
use crate::commit::{self, Pending};
use crate::error::{Error, Kind, Result};
use crate::h5::{Engine, Layout};
use crate::io::emit::{Progress, Sink, Tensors, emit};
use crate::tree::Tree;

/// What will be written and where, before a payload byte moves.
#[derive(Debug)]
pub struct Plan {
    tree: Tree,
    layout: Layout,
    engine: &'static str,
}

impl Plan {
    /// Lays out `tree` with `engine`.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn new(tree: Tree, engine: &dyn Engine) -> Result<Self> {
        let layout = engine.lay_out(&tree)?;
        Ok(Self { tree, layout, engine: engine.name() })
    }

    /// What was laid out.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// The engine that laid it out.
    pub fn engine(&self) -> &'static str {
        self.engine
    }

    /// Bytes up to the end of the weights, in a file of its own or at the start of an archive.
    pub fn weights_end(&self, archive: bool) -> u64 {
        self.layout.len + if archive { lead_in(self.layout.len) } else { 0 }
    }
}

/// Where a save goes.
pub enum Target {
    /// To a file.
    Path(PathBuf, commit::Options),
    /// To a sink, from this offset on.
    Sink(Box<dyn Sink + Send>, u64),
}

/// The members of an archive other than the weights; asked for when the weights are written.
pub type Members<'a> = &'a mut dyn FnMut() -> Result<Vec<(String, Content)>>;

/// What a save did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the file.
    pub bytes: u64,
    /// CRC-32 of the weights image.
    pub crc: u32,
    /// Why the target was written over instead of being replaced, if it was.
    pub in_place: Option<&'static str>,
}

/// A complete new file that has not taken the old one's place. Dropping it leaves the old one.
#[derive(Debug)]
pub struct Prepared {
    written: Written,
    pending: Option<Pending>,
}

impl Prepared {
    /// Bytes of the new file.
    pub fn bytes(&self) -> u64 {
        self.written.bytes
    }

    /// Puts the new file in the old one's place.
    ///
    /// # Errors
    /// Those of [`Pending::commit`].
    pub fn commit(mut self) -> Result<Written> {
        if let Some(pending) = self.pending {
            self.written.in_place = pending.commit(self.written.bytes)?;
        }
        Ok(self.written)
    }
}

/// Writes `plan` to `target`: a bare weights image, or an archive when there are `members`. The old file is replaced
/// by [`Prepared::commit`].
///
/// # Errors
/// Those of every stage. The target is then as it was, unless it is written in place.
pub fn write(
    plan: &Plan,
    target: Target,
    tensors: &mut dyn Tensors,
    members: Option<Members<'_>>,
    progress: &Progress,
) -> Result<Prepared> {
    match target {
        Target::Sink(mut sink, base) => {
            let (end, crc) = fill(plan, &mut *sink, base, tensors, members, progress)?;
            Ok(Prepared { written: Written { bytes: end - base, crc, in_place: None }, pending: None })
        }
        Target::Path(path, options) => {
            let pending = Pending::create(&path, options)?;
            let mut file = pending.file();
            let filled = file.reserve(plan.weights_end(members.is_some()));
            let filled = filled.and_then(|()| fill(plan, &mut file, 0, tensors, members, progress));
            let (bytes, crc) = filled.map_err(|e| full(e, pending.in_place().is_some()).with_path(&path))?;
            Ok(Prepared { written: Written { bytes, crc, in_place: None }, pending: Some(pending) })
        }
    }
}

/// Says what to do when there is no room.
fn full(error: Error, in_place: bool) -> Error {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    let advice = if in_place {
        "The file is incomplete; free some space and save again."
    } else {
        "Free some space or save elsewhere; the old file is unchanged."
    };
    match error.kind() {
        Kind::Io(e) if matches!(e.kind(), StorageFull | QuotaExceeded | FileTooLarge) => error.with_advice(advice),
        _ => error,
    }
}

/// Writes everything; returns the end offset and the CRC-32 of the weights.
fn fill(
    plan: &Plan,
    sink: &mut dyn Sink,
    base: u64,
    tensors: &mut dyn Tensors,
    members: Option<Members<'_>>,
    progress: &Progress,
) -> Result<(u64, u32)> {
    let (layout, datasets) = (&plan.layout, plan.tree.datasets());
    let Some(members) = members else {
        let crc = emit(layout, datasets, tensors, base, sink, progress)?;
        return Ok((base + layout.len, crc));
    };
    let mut archive = Archive::new(base, sink);
    let payload = archive.open_weights(layout.len, sink)?;
    let crc = emit(layout, datasets, tensors, payload, sink, progress)?;
    archive.close_weights(crc, sink)?;
    for (name, content) in members()? {
        archive.add(&name, &content, sink)?;
    }
    Ok((archive.finish(sink)?, crc))
}
