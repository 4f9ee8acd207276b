//! A save from plan to commit: lay out, emit, close the archive, replace the file.

use std::path::{Path, PathBuf};

use crate::archive::write::{Archive, Content, lead_in};
use crate::commit::{self, Committed, Pending};
use crate::error::{Error, Kind, Result};
use crate::image::{Compression, Engine, EngineKind, Layout};
use crate::io::emit::{Progress, Sink, Tensors, emit};
use crate::io::pack::{self, pack};
use crate::limits::MAX_IMAGE_BYTES;
use crate::tree::Tree;

/// What will be written and where, before a payload byte moves.
pub struct Plan {
    tree: Tree,
    places: Places,
    engine: EngineKind,
}

/// How the datasets get their places.
enum Places {
    /// They have them.
    Known(Layout),
    /// As they are compressed.
    Open(Box<dyn Engine>, Compression),
}

impl Plan {
    /// Lays out `tree` with `engine`.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn new(tree: Tree, engine: &dyn Engine) -> Result<Self> {
        let layout = engine.lay_out(&tree)?;
        Ok(Self { tree, places: Places::Known(layout), engine: engine.kind() })
    }

    /// Has `engine` lay out `tree` while it is written, with the larger datasets compressed.
    pub fn compressed(tree: Tree, engine: Box<dyn Engine>, how: Compression) -> Self {
        Self { tree, engine: engine.kind(), places: Places::Open(engine, how) }
    }

    /// What was laid out.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// The engine that laid it out.
    pub fn engine(&self) -> EngineKind {
        self.engine
    }

    /// Bytes up to the end of the weights, in a file of its own or at the start of an archive; unknown for what is
    /// still to be compressed.
    pub fn weights_end(&self, archive: bool) -> Option<u64> {
        let Places::Known(layout) = &self.places else { return None };
        Some(layout.len + if archive { lead_in(layout.len) } else { 0 })
    }

    /// Bytes that the image does not exceed.
    fn most(&self) -> u64 {
        match &self.places {
            Places::Known(layout) => layout.len,
            // Far too much: chunks grow by their padding and their index, and a megabyte is a block of metadata.
            Places::Open(..) => {
                let objects = (self.tree.groups().len() + self.tree.datasets().len()) as u64;
                2 * self.tree.nbytes() + objects * 8192 + (4 << 20)
            }
        }
    }

    /// Writes the image to `base` of the sink; returns its bytes and its CRC-32.
    fn emit(
        &self,
        tensors: &mut dyn Tensors,
        base: u64,
        sink: &mut dyn Sink,
        progress: &Progress,
    ) -> Result<(u64, u32)> {
        match &self.places {
            Places::Known(layout) => {
                Ok((layout.len, emit(layout, self.tree.datasets(), tensors, base, sink, progress)?))
            }
            Places::Open(engine, how) => pack(&**engine, &self.tree, *how, tensors, base, sink, progress),
        }
    }
}

/// Where a save goes.
pub enum Target {
    /// To a file.
    Path(PathBuf, commit::Options),
    /// To the file at this path, which was opened before.
    Open(PathBuf, Pending),
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
    /// How the file took its place.
    pub committed: Committed,
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

    /// CRC-32 of the weights image.
    pub fn crc(&self) -> u32 {
        self.written.crc
    }

    /// Puts the new file in the old one's place.
    ///
    /// # Errors
    /// Those of [`Pending::commit`].
    pub fn commit(mut self) -> Result<Written> {
        if let Some(pending) = self.pending {
            self.written.committed = pending.commit(self.written.bytes)?;
        }
        Ok(self.written)
    }
}

/// Puts complete files in the places of old ones, and then the index that names them. With `options.atomic` the old
/// index goes first: whatever ends this half-way leaves no index, and never one that mixes two saves.
///
/// # Errors
/// Those of [`Pending::commit`].
pub fn commit_indexed(
    files: Vec<Prepared>,
    index: &Path,
    content: &[u8],
    options: commit::Options,
) -> Result<Vec<Committed>> {
    if options.atomic {
        commit::withdraw(index, options.durable)?;
    }
    let mut placed = files.into_iter().map(|f| f.commit().map(|w| w.committed)).collect::<Result<Vec<_>>>()?;
    placed.push(commit::write(index, content, options)?);
    Ok(placed)
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
        Target::Sink(_, base) if base > MAX_IMAGE_BYTES => {
            Err(Error::new(Kind::Invalid, "no file is written so far behind the start of a sink")
                .with_found(format_args!("at most {MAX_IMAGE_BYTES}"), base))
        }
        Target::Sink(mut sink, base) => {
            let (end, crc) = fill(plan, &mut *sink, base, tensors, members, progress)?;
            Ok(Prepared { written: Written { bytes: end - base, crc, committed: Committed::default() }, pending: None })
        }
        Target::Path(path, options) => {
            let pending = Pending::create(&path, options)?;
            write(plan, Target::Open(path, pending), tensors, members, progress)
        }
        Target::Open(path, pending) => {
            let mut file = pending.file();
            let filled = file.reserve(plan.weights_end(members.is_some()).unwrap_or(0));
            let filled = filled.and_then(|()| fill(plan, &mut file, 0, tensors, members, progress));
            let (bytes, crc) = filled.map_err(|e| full(e, pending.in_place().is_some()).with_path(&path))?;
            Ok(Prepared { written: Written { bytes, crc, committed: Committed::default() }, pending: Some(pending) })
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
    if let Places::Open(..) = plan.places {
        pack::check(sink)?;
    }
    let Some(members) = members else {
        let (len, crc) = plan.emit(tensors, base, sink, progress)?;
        return Ok((base + len, crc));
    };
    let mut archive = Archive::new(base, sink);
    let payload = archive.open_weights(plan.most(), sink)?;
    let (len, crc) = plan.emit(tensors, payload, sink, progress)?;
    if len != plan.most() {
        archive.resize_weights(len, sink)?;
    }
    archive.close_weights(crc, sink)?;
    for (name, content) in members()? {
        archive.add(&name, &content, sink)?;
    }
    Ok((archive.finish(sink)?, crc))
}
