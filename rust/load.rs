//! A load from file to buffers: open, index, fetch.

use std::path::Path;
use std::sync::Arc;

use crate::archive::WEIGHTS;
use crate::archive::read::{Members, Method};
use crate::error::{Context, Error, Kind, Result};
use crate::h5::{Engine, Found, Index, Storage, direct::Direct};
use crate::io::buffer::Block;
use crate::io::fetch::{Extent, Fetch, Interrupt, Request, Slot};
use crate::io::{FileSource, ReadAt, Window};

/// Which engine indexes an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The direct one; libhdf5 for what it does not read.
    Auto,
    /// The direct one only.
    Direct,
    /// libhdf5 only.
    LibHdf5,
}

impl Choice {
    /// The engine that lays out images whose datasets are compressed.
    ///
    /// # Errors
    /// `Unsupported` for the direct one, and when this build has no libhdf5.
    pub fn compressor(self) -> Result<Box<dyn Engine>> {
        match self {
            Self::Auto | Self::LibHdf5 => libhdf5(),
            Self::Direct => Err(Error::new(Kind::Unsupported, "the direct engine does not compress")
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
        }
    }
}

#[cfg(feature = "libhdf5")]
#[allow(clippy::unnecessary_wraps)] // it can fail in other builds
fn libhdf5() -> Result<Box<dyn Engine>> {
    Ok(Box::new(crate::h5::libhdf5::LibHdf5))
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
    let file = std::fs::File::open(path).during("cannot open");
    let source = file.and_then(|file| match file.metadata() {
        Ok(m) if m.is_dir() => Err(Error::new(Kind::Io(std::io::ErrorKind::IsADirectory.into()), "cannot open")),
        _ => FileSource::new(file),
    });
    Ok(Arc::new(source.map_err(|e| e.with_path(path))?))
}

/// One weights image inside a file, indexed.
pub struct Weights {
    source: Arc<dyn ReadAt>,
    image: Extent,
    crc: Option<u32>,
    index: Index,
    engine: Box<dyn Engine>,
}

impl Weights {
    /// Indexes an image that is all of `source`.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn open(source: Arc<dyn ReadAt>, choice: Choice) -> Result<Self> {
        let image = Extent { offset: 0, len: source.len() };
        Self::open_image(source, image, None, choice)
    }

    /// Indexes the weights member of an archive; a compressed one is inflated into memory.
    ///
    /// # Errors
    /// `Archive` when there is none, those of the engine.
    pub fn open_member(source: &Arc<dyn ReadAt>, members: &Members, choice: Choice) -> Result<Self> {
        let member = members
            .get(WEIGHTS)
            .ok_or_else(|| Error::new(Kind::Archive, format!("There is no item named '{WEIGHTS}' in the archive")))?;
        let opened = match member.method {
            Method::Stored => {
                let image = Extent { offset: member.offset, len: member.size };
                Self::open_image(Arc::clone(source), image, Some(member.crc), choice).or_else(|e| {
                    // What cannot be understood has most likely changed after it was written, and then that is the news.
                    member.check(&**source)?;
                    Err(e)
                })
            }
            Method::Deflated => Self::open(Arc::new(member.read(&**source)?), choice),
        };
        opened.map_err(|e| e.with_member(WEIGHTS))
    }

    fn open_image(source: Arc<dyn ReadAt>, image: Extent, crc: Option<u32>, choice: Choice) -> Result<Self> {
        let window = Window::new(&*source, image.offset, image.len);
        let mut engine = choice.writer()?;
        let mut index = engine.index(&window);
        if choice == Choice::Auto
            && index.as_ref().is_err_and(|e| matches!(e.kind(), Kind::Unsupported))
            && let Ok(other) = libhdf5()
        {
            engine = other;
            index = engine.index(&window);
        }
        Ok(Self { index: index?, source, image, crc, engine })
    }

    /// Groups and datasets.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// The engine that read the index.
    pub fn engine(&self) -> &'static str {
        self.engine.name()
    }

    /// Whether a CRC-32 of the whole image is known.
    pub fn has_crc(&self) -> bool {
        self.crc.is_some()
    }

    /// Starts to read the datasets at `wanted` (indices into the index). With `verify`, all of the image passes its
    /// CRC, if it has one.
    ///
    /// # Errors
    /// Those of [`Fetch::start`].
    pub fn fetch(self: &Arc<Self>, wanted: &[usize], verify: bool, read_ahead: u64) -> Result<Reading> {
        let mut positions = vec![None; self.index.datasets.len()];
        let mut tensors = Vec::new();
        for &i in wanted {
            if let (Storage::Contiguous(offset), None) = (&self.index.datasets[i].storage, positions[i]) {
                positions[i] = Some(tensors.len());
                tensors.push(Extent { offset: *offset, len: self.index.datasets[i].nbytes });
            }
        }
        let request = Request {
            source: Arc::clone(&self.source),
            image: self.image,
            tensors,
            crc: self.crc.filter(|_| verify),
            read_ahead,
        };
        Ok(Reading { fetch: Fetch::start(request)?, positions, weights: Arc::clone(self) })
    }

    /// A dataset that is no run of bytes of the file.
    fn read(&self, dataset: &Found) -> Result<Slot> {
        let len = dataset.nbytes as usize;
        let mut bytes = Vec::new();
        match &dataset.storage {
            Storage::Compact(compact) => bytes.clone_from(compact),
            Storage::Empty => return Ok(Slot { block: Arc::new(Block::new(len)), start: 0, len }), // zero, untouched
            Storage::Contiguous(_) | Storage::Engine => {
                bytes.resize(len, 0);
                let window = Window::new(&*self.source, self.image.offset, self.image.len);
                self.engine.read(&window, &[&dataset.path], &mut [&mut bytes])?;
            }
        }
        Ok(Slot::copy_of(&bytes, Block::new(len)))
    }
}

/// A read of some datasets in progress.
pub struct Reading {
    fetch: Fetch,
    positions: Vec<Option<usize>>,
    weights: Arc<Weights>,
}

impl Reading {
    /// Waits for dataset `i` and takes it; `None` if it was taken before.
    ///
    /// # Errors
    /// Whatever stopped the reader.
    pub fn take(&self, i: usize, interrupt: Interrupt<'_>) -> Result<Option<Slot>> {
        match self.positions[i] {
            Some(position) => self.fetch.take(position, interrupt),
            None => self.weights.read(&self.weights.index.datasets[i]).map(Some),
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
