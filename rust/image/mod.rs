//! A weights image: what a weights file holds, and the engines that lay one out and index one.
//!
//! An *engine* never moves payload: on the way out it places every dataset ([`Layout`]), on the way in it finds them
//! ([`Index`]). The bytes are written by `io/emit.rs` and `io/pack.rs` and read by `io/fetch/`, whatever the engine;
//! only what is not one range of bytes is read by the engine. Formats: [`hdf5`], with two engines, and [`safetensors`].

pub mod hdf5;
pub mod safetensors;

use std::borrow::Cow;
use std::fmt;

use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::io::ReadAt;
use crate::tree::{Attribute, Tree};

/// Every dataset of at least this many bytes starts at a multiple of it, so that TensorFlow and JAX can share it.
pub const ALIGNMENT: u64 = 64;

/// Where everything of an image goes. Offsets are from the start of the image; the superblock's base address is 0.
#[derive(Debug, Default)]
pub struct Layout {
    /// Metadata: `(offset, bytes)`, ascending, disjoint from each other and from the datasets.
    pub metadata: Vec<(u64, Vec<u8>)>,
    /// Offset of each dataset of the tree, in its order; `None` where it has no bytes.
    pub offsets: Vec<Option<u64>>,
    /// Bytes of the whole image; what neither metadata nor datasets cover is zero.
    pub len: u64,
}

/// How datasets are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compression {
    pub(crate) level: u32,
    pub(crate) shuffle: bool,
    pub(crate) chunk_bytes: u64,
}

impl Compression {
    /// Deflate at `level`, 0 (store) to 9, in chunks of at most `chunk_bytes`, 1 KiB to 1 GiB. With `shuffle` the bytes
    /// of the elements are transposed first, which makes numbers compress better.
    ///
    /// # Errors
    /// `Invalid` for other numbers.
    pub fn new(level: u32, shuffle: bool, chunk_bytes: u64) -> Result<Self> {
        if level > 9 {
            return Err(Error::new(Kind::Invalid, "no such compression level").with_found("0 to 9", level));
        }
        if !(1 << 10..=1 << 30).contains(&chunk_bytes) {
            return Err(Error::new(Kind::Invalid, "chunks cannot be of this size")
                .with_found("1 KiB to 1 GiB", format_args!("{chunk_bytes} bytes")));
        }
        Ok(Self { level, shuffle, chunk_bytes })
    }
}

/// A layout whose chunks are placed one by one, when they are compressed.
pub trait Chunked {
    /// Where the datasets without chunks go. The metadata is still to come, into what is left free or behind it.
    fn layout(&self) -> &Layout;

    /// The offset of the chunk of dataset `i` that starts at these indices, which will be written as `bytes`; bit `n`
    /// of `skipped` says that the `n`-th filter is not to be undone.
    ///
    /// # Errors
    /// `Image` when the engine has no place for it.
    fn place(&mut self, i: usize, start: &[u64], skipped: u32, bytes: &[u8]) -> Result<u64>;

    /// The complete layout; its metadata lies where nothing was written.
    ///
    /// # Errors
    /// `Image`.
    fn finish(self: Box<Self>) -> Result<Layout>;
}

/// Where the values of a dataset are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Storage {
    /// One range of bytes of the image, little-endian, C order: `nbytes` from this offset.
    Contiguous(u64),
    /// In the metadata itself (at most 64 KiB).
    Compact(Vec<u8>),
    /// Nowhere: the tensor has no elements, or was never written (HDF5 then reads zeros).
    Empty,
    /// Only the engine can read it (chunks, filters, other byte orders): [`Engine::read`].
    Engine,
    /// Listed but never read, for this reason: strings, structures, no values at all, an unknown filter.
    Unreadable(Cow<'static, str>),
}

/// A dataset found in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Path from the root, without a leading slash.
    pub path: String,
    /// Element type; of no meaning where the dataset is [`Storage::Unreadable`].
    pub dtype: DType,
    /// Dimensions.
    pub shape: Vec<u64>,
    /// Bytes of the tensor; 0 where it is unreadable.
    pub nbytes: u64,
    /// Where the values are.
    pub storage: Storage,
    /// Attributes that are strings or rows of strings; others are dropped.
    pub attributes: Vec<Attribute>,
    /// Which object of the file it is: two names of one dataset (hard links) have the same.
    pub object: u64,
}

/// Everything an image holds, in the order its groups list it (names ascending by byte).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    /// Attributes of the root, as those of groups.
    pub attributes: Vec<Attribute>,
    /// Every group but the root, parents first, with its attributes.
    pub groups: Vec<(String, Vec<Attribute>)>,
    /// Every dataset, once for each of its names.
    pub datasets: Vec<Found>,
    /// Whether some dataset has several names.
    pub shared: bool,
}

/// The engines there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// [`hdf5::direct`].
    Direct,
    /// The HDF5 library, in builds that have it.
    LibHdf5,
    /// [`safetensors`].
    Safetensors,
}

impl EngineKind {
    /// The name that Python knows it by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::LibHdf5 => "libhdf5",
            Self::Safetensors => "safetensors",
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What lays images out and finds their datasets.
pub trait Engine: Send + Sync {
    /// Which one it is.
    fn kind(&self) -> EngineKind;

    /// Places every dataset of `tree`.
    ///
    /// # Errors
    /// `Invalid` for what the format cannot hold.
    fn lay_out(&self, tree: &Tree) -> Result<Layout>;

    /// Places the datasets of `tree` that have no chunks; `chunks` has the shape of the others'.
    ///
    /// # Errors
    /// `Unsupported` where the engine does not compress, else as [`Engine::lay_out`].
    fn lay_out_chunked(&self, _: &Tree, _chunks: &[Option<Vec<u64>>], _: Compression) -> Result<Box<dyn Chunked>> {
        Err(Error::new(Kind::Unsupported, format!("the {} engine does not compress", self.kind())))
    }

    /// Finds every group and dataset of the image that is all of `image`.
    ///
    /// # Errors
    /// `Image` for a malformed image, `Unsafe` for links and external storage, `Limit`, and `Unsupported` for legal
    /// HDF5 that this engine does not read (the caller may then ask the other engine).
    fn index(&self, image: &dyn ReadAt) -> Result<Index>;

    /// Reads the datasets at `paths` whose storage is [`Storage::Engine`] into `out`, each of exactly its `nbytes`.
    ///
    /// # Errors
    /// As [`Engine::index`].
    fn read(&self, image: &dyn ReadAt, paths: &[&str], out: &mut [&mut [u8]]) -> Result<()>;
}
