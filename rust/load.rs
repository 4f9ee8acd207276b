//! A load from file to buffers: open, index, fetch.

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use crate::archive::WEIGHTS;
use crate::archive::read::{Member, Members, Method};
use crate::error::{Context, Error, Kind, Result, try_with_capacity};
use crate::image::hdf5::{self, direct::Direct};
use crate::image::safetensors::Safetensors;
use crate::image::{Engine, EngineKind, Found, Index, Storage};
use crate::io::buffer::Block;
use crate::io::fetch::{Extent, Fetch, Interrupt, Patience, Request, Slot};
use crate::io::{FileSource, ReadAt, Window};
use crate::limits;

/// Which engine indexes an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The direct one; libhdf5 for what it does not read.
    Auto,
    /// The direct one only.
    Direct,
    /// libhdf5 only.
    LibHdf5,
    /// No HDF5 at all, but safetensors.
    Safetensors,
}

impl Choice {
    /// The engine that lays out images whose datasets are compressed.
    ///
    /// # Errors
    /// `Unsupported` for the direct one, and when this build has no libhdf5.
    pub fn compressor(self) -> Result<Box<dyn Engine>> {
        match self {
            Self::Auto | Self::LibHdf5 => libhdf5(),
            Self::Direct | Self::Safetensors => Err(Error::new(Kind::Unsupported, "this engine does not compress")
                .with_advice("Choose the engine \"auto\" or \"libhdf5\".")),
        }
    }

    /// The engine that lays images out.
    ///
    /// # Errors
    /// `Unsupported` when this build has no libhdf5.
    pub fn writer(self) -> Result<Box<dyn Engine>> {
        match self {
            Self::Auto | Self::Direct => Ok(Box::new(Direct)),
            Self::LibHdf5 => libhdf5(),
            Self::Safetensors => Ok(Box::new(Safetensors)),
        }
    }
}

#[cfg(feature = "libhdf5")]
#[allow(clippy::unnecessary_wraps)] // it can fail in other builds
fn libhdf5() -> Result<Box<dyn Engine>> {
    Ok(Box::new(crate::image::hdf5::libhdf5::LibHdf5))
}

#[cfg(not(feature = "libhdf5"))]
fn libhdf5() -> Result<Box<dyn Engine>> {
    Err(Error::new(Kind::Unsupported, "this build of hornbeam has no libhdf5")
        .with_advice("Install a wheel, or build with the feature `libhdf5`."))
}

/// Opens a file for reading.
///
/// # Errors
/// `Io`.
pub fn open(path: &Path) -> Result<Arc<dyn ReadAt>> {
    let source = crate::io::open_regular(path).during("cannot open").and_then(FileSource::new);
    Ok(Arc::new(source.map_err(|e| e.with_path(path))?))
}

/// What a file is, by how it begins, whatever its name: `"keras"` for an archive, `"h5"`, also behind a user block,
/// `"safetensors"` or `"shards"`, a JSON object; `None` for anything else.
///
/// # Errors
/// `Io`.
pub fn kind(source: &dyn ReadAt) -> Result<Option<&'static str>> {
    let mut head = [0; 16];
    let head = &mut head[..source.len().min(16) as usize];
    source.read_at(head, 0)?;
    let header = head.first_chunk().map(|length| u64::from_le_bytes(*length));
    Ok(if [b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"].iter().any(|start| head.starts_with(*start)) {
        Some("keras") // before HDF5: an archive may hold it where a user block ends
    } else if hdf5::start(source)?.is_some() {
        Some("h5")
    } else if head.get(8) == Some(&b'{') && header.is_some_and(|n| n <= limits::MAX_SAFETENSORS_HEADER_BYTES) {
        Some("safetensors")
    } else {
        head.trim_ascii_start().starts_with(b"{").then_some("shards")
    })
}

/// One weights image inside a file, indexed.
pub struct Weights {
    source: Arc<dyn ReadAt>,
    image: Extent,
    stored: u64, // bytes it takes in its file
    crc: Option<u32>,
    checked: bool, // the CRC was compared before the index was read
    index: Index,
    engine: Box<dyn Engine>,
}

/// Refuses images whose datasets at some positions take far more memory when they are decoded, together, than their
/// files say: each of them may be just below the limit for one.
///
/// # Errors
/// `Limit`, and `Invalid` for positions that there are not.
pub fn check_expansion<'a>(images: impl IntoIterator<Item = (&'a Weights, &'a [usize])>) -> Result<()> {
    let (mut decoded, mut stored) = (0u64, 0u64);
    for (weights, positions) in images {
        stored = stored.saturating_add(weights.stored);
        for &i in positions {
            let found =
                weights.index.datasets.get(i).ok_or_else(|| no_such_dataset(weights.index.datasets.len(), i))?;
            if found.storage == Storage::Engine {
                decoded = decoded.saturating_add(found.nbytes);
            }
        }
    }
    check_total(decoded, stored)
}

#[cold]
fn unreadable(reason: &str) -> Error {
    Error::new(Kind::Unsupported, format!("this dataset holds no numbers that can be read: {reason}"))
        .with_advice("Everything else in the file can be read.")
}

#[cold]
fn no_such_dataset(datasets: usize, i: usize) -> Error {
    Error::new(Kind::Invalid, "no dataset has this position").with_found(format_args!("less than {datasets}"), i)
}

fn check_total(decoded: u64, stored: u64) -> Result<()> {
    let checked = limits::check_expansion(decoded, stored, limits::BOMB_FLOOR_BYTES, limits::MAX_DEFLATE);
    checked.map_err(|e| {
        e.with_entry("all that are compressed, together")
            .with_advice("Read them one by one with hornbeam.open, or write the file without compression.")
    })
}

/// The image as something the HDF5 library may read: no code but this crate's runs while its lock is held, since `fork`
/// waits for that lock, and other code might wait for whoever forks.
fn for_library(source: &Arc<dyn ReadAt>, image: Extent, interrupt: Interrupt<'_>) -> Result<(Arc<dyn ReadAt>, Extent)> {
    const STEP: usize = 1 << 20;
    if source.is_native() {
        return Ok((Arc::clone(source), image));
    }
    let mut bytes: Vec<u8> = try_with_capacity(image.len as usize)?;
    let mut patience = Patience::new(interrupt);
    while (bytes.len() as u64) < image.len {
        patience.ask()?;
        let at = bytes.len();
        bytes.resize(at + STEP.min(image.len as usize - at), 0);
        source.read_at(&mut bytes[at..], image.offset + at as u64)?;
    }
    Ok((Arc::new(bytes), Extent { offset: 0, len: image.len }))
}

impl Weights {
    /// Indexes an image that is all of `source`.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn open(source: Arc<dyn ReadAt>, choice: Choice) -> Result<Self> {
        Self::open_interruptibly(source, None, choice, &|| Ok(()))
    }

    /// As [`Weights::open_member`], or without members as [`Weights::open`], until `interrupt` returns an error.
    ///
    /// # Errors
    /// As these, or what `interrupt` returns.
    pub fn open_interruptibly(
        source: Arc<dyn ReadAt>,
        members: Option<&Members>,
        choice: Choice,
        interrupt: Interrupt<'_>,
    ) -> Result<Self> {
        if let Some(members) = members {
            return Self::member(&source, members, choice, interrupt);
        }
        let image = Extent { offset: 0, len: source.len() };
        Self::open_image(source, image, None, choice, interrupt)
    }

    /// Indexes the weights member of an archive; a compressed one is inflated into memory.
    ///
    /// # Errors
    /// `Archive` when there is none, `Limit` when it stands for far more bytes than it stores, those of the engine.
    pub fn open_member(source: &Arc<dyn ReadAt>, members: &Members, choice: Choice) -> Result<Self> {
        Self::open_interruptibly(Arc::clone(source), Some(members), choice, &|| Ok(()))
    }

    fn member(source: &Arc<dyn ReadAt>, members: &Members, choice: Choice, interrupt: Interrupt<'_>) -> Result<Self> {
        let member = members
            .get(WEIGHTS)
            .ok_or_else(|| Error::new(Kind::Archive, format!("There is no item named '{WEIGHTS}' in the archive")))?;
        let opened = match member.method {
            Method::Stored => {
                let image = Extent { offset: member.offset, len: member.size };
                Self::open_image(Arc::clone(source), image, Some(member), choice, interrupt)
            }
            Method::Deflated => {
                member.check_expansion(limits::BOMB_FLOOR_BYTES, limits::MAX_MEMBER_EXPANSION)?;
                let bytes = Arc::new(member.read(&**source, interrupt)?); // which compares its CRC
                let whole = Self::open_interruptibly(bytes, None, choice, interrupt);
                whole.map(|w| Self { crc: Some(member.crc), checked: true, stored: member.stored, ..w })
            }
        };
        opened.map_err(|e| e.with_member(WEIGHTS))
    }

    /// `member` is what the image is of an archive, if it is of one.
    fn open_image(
        source: Arc<dyn ReadAt>,
        image: Extent,
        member: Option<&Member>,
        choice: Choice,
        interrupt: Interrupt<'_>,
    ) -> Result<Self> {
        let check = || member.map_or(Ok(()), |m| m.check(&*source, interrupt));
        let engine = choice.writer()?;
        let opened = |source: Arc<dyn ReadAt>, image: Extent, engine: Box<dyn Engine>, checked| {
            let index = engine.index(&Window::new(&*source, image.offset, image.len))?;
            let (stored, crc) = (image.len, member.map(|m| m.crc));
            Ok(Self { source, image, stored, crc, checked, index, engine })
        };
        // The C library sees no byte whose checksum is wrong.
        let through_library = |engine| {
            check()?;
            let (source, image) = for_library(&source, image, interrupt)?;
            opened(source, image, engine, true)
        };
        match choice {
            Choice::LibHdf5 => through_library(engine),
            Choice::Auto | Choice::Direct => {
                opened(Arc::clone(&source), image, engine, false).or_else(|e| match (e.kind(), libhdf5()) {
                    (Kind::Unsupported, Ok(other)) if choice == Choice::Auto => through_library(other),
                    // What cannot be understood has most likely changed after it was written, and then that is the news.
                    _ => check().and(Err(e)),
                })
            }
            Choice::Safetensors => opened(source, image, engine, false),
        }
    }

    /// Groups and datasets.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// The datasets whose bytes are not in the file as they are, by their positions: compressed, in chunks, or never
    /// written. A small file can have large ones.
    pub fn decoded(&self) -> impl Iterator<Item = usize> {
        let decoded = |d: &Found| matches!(d.storage, Storage::Engine | Storage::Empty) && d.nbytes > 0;
        self.index.datasets.iter().enumerate().filter(move |(_, d)| decoded(d)).map(|(i, _)| i)
    }

    /// The engine that read the index.
    pub fn engine(&self) -> EngineKind {
        self.engine.kind()
    }

    /// Whether a CRC-32 of the whole image is known.
    pub fn has_crc(&self) -> bool {
        self.crc.is_some()
    }

    /// Where dataset `i` starts in the file; `None` where it is not one range of bytes of a file.
    pub fn offset(&self, i: usize) -> Option<u64> {
        match self.index.datasets[i].storage {
            Storage::Contiguous(offset) if self.source.as_slice().is_none() => Some(self.image.offset + offset),
            _ => None,
        }
    }

    /// Bytes `start..end` of dataset `i`, not checked. What is not one range of bytes of the file is read whole, by a thread of
    /// its own, so that the caller can be interrupted.
    ///
    /// # Errors
    /// `Invalid` when the dataset has no such bytes, `Io`, `Memory`, those of the engine, or what `interrupt` returns.
    pub fn read_part(self: &Arc<Self>, i: usize, start: u64, end: u64, interrupt: Interrupt<'_>) -> Result<Slot> {
        let dataset = &self.index.datasets[i];
        let read = || {
            if let Storage::Unreadable(reason) = &dataset.storage {
                return Err(unreadable(reason)); // whatever bytes are asked for
            }
            if start > end || end > dataset.nbytes {
                return Err(Error::new(Kind::Invalid, "the tensor has no such bytes")
                    .with_found(format_args!("at most {}", dataset.nbytes), format_args!("{start} to {end}")));
            }
            let len = (end - start) as usize;
            match &dataset.storage {
                Storage::Contiguous(at) => {
                    Slot::read_from(&*self.source, self.image.offset + at + start, len, interrupt)
                }
                Storage::Empty | Storage::Unreadable(_) => {
                    Ok(Slot { block: Arc::new(Block::new(len)?), start: 0, len })
                }
                Storage::Compact(bytes) => Slot::copy_of(&bytes[start as usize..end as usize]),
                Storage::Engine => {
                    let whole = self.fetch(&[i], false, 0)?.take(i, interrupt)?.expect("asked for, and not taken");
                    if len == whole.len {
                        return Ok(whole);
                    }
                    Slot::copy_of(&whole.bytes()[start as usize..end as usize])
                }
            }
        };
        read().map_err(|e| e.with_entry(&dataset.path))
    }

    /// Starts to read the datasets at `wanted` (indices into the index). With `verify`, all of the image passes its
    /// CRC, if it has one.
    ///
    /// # Errors
    /// `Limit` when what must be decoded is a bomb, else those of [`Fetch::start`].
    ///
    /// # Panics
    /// When there is no dataset at one of the positions.
    pub fn fetch(self: &Arc<Self>, wanted: &[usize], verify: bool, read_ahead: u64) -> Result<Reading> {
        let datasets = &self.index.datasets;
        let mut positions = try_with_capacity(datasets.len())?;
        positions.resize(datasets.len(), None);
        let mut tensors = try_with_capacity(wanted.len())?;
        // What has several names is read ahead by the first that is wanted, and for the others when they are taken.
        let wanted = if self.index.shared {
            let mut objects = HashSet::new();
            Cow::Owned(wanted.iter().copied().filter(|&i| objects.insert(datasets[i].object)).collect())
        } else {
            Cow::Borrowed(wanted)
        };
        for &i in &*wanted {
            if let (Storage::Contiguous(offset), None) = (&datasets[i].storage, positions[i]) {
                positions[i] = Some(tensors.len());
                tensors.push(Extent { offset: *offset, len: datasets[i].nbytes });
            }
        }
        let mut chunked = Vec::new();
        for &i in &*wanted {
            if let (Storage::Engine, None) = (&datasets[i].storage, positions[i]) {
                positions[i] = Some(tensors.len() + chunked.len());
                chunked.push(i);
            }
        }
        let decoded: Vec<u64> = chunked.iter().map(|&i| datasets[i].nbytes).collect();
        check_total(decoded.iter().copied().fold(0, u64::saturating_add), self.stored)?;
        let weights = Arc::clone(self);
        let decode = move |source: &dyn ReadAt, numbers: &[usize], out: &mut [&mut [u8]]| {
            let window = Window::new(source, weights.image.offset, weights.image.len);
            let paths: Vec<_> = numbers.iter().map(|&n| &weights.index.datasets[chunked[n]].path[..]).collect();
            weights.engine.read(&window, &paths, out)
        };
        let request = Request {
            source: Arc::clone(&self.source),
            image: self.image,
            tensors,
            decoded,
            decode: Box::new(decode),
            crc: self.crc.filter(|_| verify && !self.checked),
            read_ahead,
        };
        let nbytes = request.tensors.iter().map(|t| t.len).chain(request.decoded.iter().copied()).sum();
        Ok(Reading { fetch: Fetch::start(request)?, positions, nbytes, weights: Arc::clone(self) })
    }

    /// A dataset that was not read ahead: because that takes no reading, or because it has another name.
    fn read_now(self: &Arc<Self>, i: usize, interrupt: Interrupt<'_>) -> Result<Slot> {
        let dataset = &self.index.datasets[i];
        match &dataset.storage {
            Storage::Contiguous(_) | Storage::Engine if !self.index.shared => {
                Err(Error::new(Kind::Invalid, "this dataset was not asked for"))
            }
            _ => self.read_part(i, 0, dataset.nbytes, interrupt),
        }
    }
}

/// A read of some datasets in progress.
pub struct Reading {
    fetch: Fetch,
    nbytes: u64,
    positions: Vec<Option<usize>>,
    weights: Arc<Weights>,
}

impl Reading {
    /// Bytes of the tensors that are read ahead.
    pub fn nbytes(&self) -> u64 {
        self.nbytes
    }

    /// Bytes of those that were read so far.
    pub fn done(&self) -> u64 {
        self.fetch.read()
    }

    /// Waits for dataset `i` and takes it; `None` if it was taken before.
    ///
    /// # Errors
    /// `Invalid` when there is no such dataset, or it was not asked for; whatever stopped the reader.
    pub fn take(&self, i: usize, interrupt: Interrupt<'_>) -> Result<Option<Slot>> {
        let position = self.positions.get(i).ok_or_else(|| no_such_dataset(self.positions.len(), i))?;
        match *position {
            Some(position) => self.fetch.take(position, interrupt),
            None => self.weights.read_now(i, interrupt).map(Some),
        }
    }

    /// Waits until every byte was read and checked; keeps what was not taken, or with `drop_rest` drops it.
    ///
    /// # Errors
    /// `Crc`, or whatever stopped the reader.
    pub fn complete(&self, drop_rest: bool, interrupt: Interrupt<'_>) -> Result<()> {
        if drop_rest { self.fetch.drain(interrupt) } else { self.fetch.complete(interrupt) }
    }
}
