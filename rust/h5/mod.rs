//! A weights image: what a `.weights.h5` file is, and the two engines that lay one out and index one.
//!
//! An *engine* never moves payload: on the way out it places every dataset ([`Layout`]), on the way in it finds them
//! ([`Index`]). The bytes are written by `io/emit.rs` and `io/pack.rs` and read by `io/fetch.rs`, whatever the engine;
//! only what is no plain run of bytes is read by the engine.

pub mod direct;
pub mod filters;
#[cfg(feature = "libhdf5")]
pub mod libhdf5;

use std::borrow::Cow;
use std::ops::Range;

use crate::dtype::DType;
use crate::error::{Error, Kind, Result, out_of_memory};
use crate::io::{ReadAt, Window};
use crate::limits;
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
    /// `Hdf5` when the engine has no place for it.
    fn place(&mut self, i: usize, start: &[u64], skipped: u32, bytes: &[u8]) -> Result<u64>;

    /// The complete layout; its metadata lies where nothing was written.
    ///
    /// # Errors
    /// `Hdf5`.
    fn finish(self: Box<Self>) -> Result<Layout>;
}

/// Where the values of a dataset are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Storage {
    /// One run of bytes of the image, little-endian, C order: `nbytes` from this offset.
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

/// What was found at an object and below it, so that a second link to it needs no second walk.
struct Subtree {
    path: usize, // bytes of its path
    groups: Range<usize>,
    datasets: Range<usize>,
}

impl Index {
    /// What was found since `before` (groups, datasets) at the object whose path has `path` bytes.
    fn subtree(&self, path: usize, before: (usize, usize)) -> Subtree {
        Subtree { path, groups: before.0..self.groups.len(), datasets: before.1..self.datasets.len() }
    }

    /// Groups and datasets so far.
    fn sizes(&self) -> (usize, usize) {
        (self.groups.len(), self.datasets.len())
    }

    /// Lists everything of `subtree` again, under the path `to`.
    fn list_again(&mut self, subtree: &Subtree, to: &str, budget: &mut Budget) -> Result<()> {
        let renamed = |path: &str| {
            let new = format!("{to}{}", &path[subtree.path..]);
            if new.bytes().filter(|&b| b == b'/').count() > limits::MAX_DEPTH {
                return Err(too_deep(&new));
            }
            check_path(&new)?;
            Ok(new)
        };
        for i in subtree.groups.clone() {
            let path = renamed(&self.groups[i].0)?;
            budget.attributes(&self.groups[i].1)?;
            let attributes = self.groups[i].1.clone();
            self.add_group(path, attributes, budget)?;
        }
        for i in subtree.datasets.clone() {
            let path = renamed(&self.datasets[i].path)?;
            budget.attributes(&self.datasets[i].attributes)?;
            let found = Found { path, ..self.datasets[i].clone() };
            self.add_dataset(found, budget)?;
        }
        Ok(())
    }

    fn add_group(&mut self, path: String, attributes: Vec<Attribute>, budget: &mut Budget) -> Result<()> {
        self.check_room()?;
        budget.spend(2 * size_of::<(String, Vec<Attribute>)>() + ALLOCATION + path.len())?;
        push(&mut self.groups, (path, attributes))
    }

    fn add_dataset(&mut self, found: Found, budget: &mut Budget) -> Result<()> {
        self.check_room()?;
        let value = if let Storage::Compact(bytes) = &found.storage { bytes.len() } else { 0 };
        let heap = 3 * ALLOCATION + found.path.len() + found.shape.len() * 8 + value;
        budget.spend(2 * size_of::<Found>() + heap)?;
        push(&mut self.datasets, found)
    }

    fn check_room(&self) -> Result<()> {
        if self.groups.len() + self.datasets.len() < limits::MAX_OBJECTS {
            return Ok(());
        }
        Err(Error::new(Kind::Limit, "too many groups and datasets")
            .with_found(format_args!("at most {}", limits::MAX_OBJECTS), "more"))
    }

    /// Ends an index of HDF5 that starts at `base` of its image.
    fn finish(mut self, base: u64) -> Result<Self> {
        let mut objects = crate::error::try_with_capacity(self.datasets.len())?;
        objects.extend(self.datasets.iter().map(|d| d.object));
        objects.sort_unstable();
        self.shared = objects.windows(2).any(|w| w[0] == w[1]);
        for found in &mut self.datasets {
            if let Storage::Contiguous(offset) = &mut found.storage {
                *offset += base;
            }
        }
        Ok(self)
    }
}

/// What the memory allocator needs for itself, for each piece.
const ALLOCATION: usize = 16;

/// Memory that indexing an image may still take. Names, attributes and links can be pointed to many times, so what they
/// take is no question of the bytes of the image alone.
#[derive(Clone, Copy)]
struct Budget {
    left: u64,
    attributes: u64, // of it, for values of attributes
}

impl Budget {
    /// That of an image of `len` bytes.
    fn new(len: u64) -> Self {
        let left = limits::INDEX_FLOOR_BYTES.saturating_add(len.saturating_mul(limits::MAX_INDEX_EXPANSION));
        Self { left, attributes: limits::MAX_ATTRIBUTES_BYTES }
    }

    fn spend(&mut self, bytes: usize) -> Result<()> {
        self.left = self.left.checked_sub(bytes as u64).ok_or_else(|| {
            Error::new(Kind::Limit, "the names and attributes take too much memory for a file of this size")
                .with_advice("Its structures lead to the same places again and again, as no writer makes them.")
        })?;
        Ok(())
    }

    /// What values of attributes may still take.
    #[cfg(feature = "libhdf5")]
    fn for_values(&self) -> u64 {
        self.attributes.min(self.left)
    }

    /// For a value of an attribute, in `pieces` strings of `bytes` together.
    fn spend_value(&mut self, pieces: usize, bytes: usize) -> Result<()> {
        let total = pieces.saturating_mul(size_of::<Vec<u8>>() + ALLOCATION).saturating_add(bytes);
        let too_much = || Error::new(Kind::Limit, "attributes are too large");
        self.attributes = self.attributes.checked_sub(total as u64).ok_or_else(too_much)?;
        self.spend(total)
    }

    /// For an attribute but its value.
    fn spend_attribute(&mut self, name: usize) -> Result<()> {
        self.spend(2 * size_of::<Attribute>() + ALLOCATION + name)
    }

    /// For a copy of these.
    fn attributes(&mut self, all: &[Attribute]) -> Result<()> {
        for (name, value) in all {
            let (pieces, bytes) = value.extent();
            self.spend_attribute(name.len())?;
            self.spend_value(pieces, bytes)?;
        }
        Ok(())
    }
}

/// Appends, or says that there is no memory.
fn push<T>(to: &mut Vec<T>, item: T) -> Result<()> {
    if to.len() == to.capacity() {
        to.try_reserve(1).map_err(|_| out_of_memory(2 * to.len() * size_of::<T>()))?;
    }
    to.push(item);
    Ok(())
}

/// The name of a link: UTF-8, and one component of a path.
fn link_name(bytes: &[u8]) -> Result<&str> {
    match std::str::from_utf8(bytes) {
        Ok(name) if !matches!(name, "" | "." | "..") && !name.contains(['/', '\0']) => Ok(name),
        _ => Err(Error::new(Kind::Hdf5, "malformed HDF5: the name of a link is not UTF-8 or no component of a path")
            .with_found("one without slashes", String::from_utf8_lossy(&bytes[..bytes.len().min(100)]).escape_debug())),
    }
}

/// Refuses names of a group that do not ascend: a reader that searches for them would not find all, and of two equal
/// ones every reader finds another.
fn check_names<'a>(mut names: impl Iterator<Item = &'a [u8]>) -> Result<()> {
    let Some(mut last) = names.next() else { return Ok(()) };
    for name in names {
        if name <= last {
            let what = if name == last { "a name comes twice in a group" } else { "names of a group are not in order" };
            return Err(Error::new(Kind::Hdf5, format!("malformed HDF5: {what}"))
                .with_found("names that ascend", String::from_utf8_lossy(name).escape_debug())
                .with_advice("The file is damaged; use another copy."));
        }
        last = name;
    }
    Ok(())
}

fn check_path(path: &str) -> Result<()> {
    if path.len() <= limits::MAX_PATH_BYTES {
        return Ok(());
    }
    Err(Error::new(Kind::Limit, "a path is too long")
        .with_found(format_args!("at most {} bytes", limits::MAX_PATH_BYTES), path.len()))
}

#[cold]
fn too_deep(path: &str) -> Error {
    Error::new(Kind::Limit, "groups are nested too deeply")
        .with_found(format_args!("at most {} levels", limits::MAX_DEPTH), "more")
        .with_entry(path)
}

#[cold]
fn cycle() -> Error {
    Error::new(Kind::Hdf5, "a group contains itself, by a hard link")
        .with_advice("A model file cannot be like that; write its datasets to another file.")
}

/// Where the HDF5 in `image` starts: behind a user block of 512, 1024, 2048, … bytes, or none (§II).
///
/// # Errors
/// `Io`.
pub fn start(image: &dyn ReadAt) -> Result<Option<u64>> {
    let mut at = 0;
    while image.len().checked_sub(at).is_some_and(|left| left >= 8) {
        let mut head = [0; 8];
        image.read_at(&mut head, at)?;
        if head == direct::SIGNATURE {
            return Ok(Some(at));
        }
        at = if at == 0 { 512 } else { at * 2 };
    }
    Ok(None)
}

/// Runs `f` on the HDF5 in `image`, and where it starts.
fn behind_user_block<T>(image: &dyn ReadAt, f: impl FnOnce(&dyn ReadAt, u64) -> Result<T>) -> Result<T> {
    match start(image)? {
        Some(0) => f(image, 0),
        Some(at) => f(&Window::new(image, at, image.len() - at), at),
        None => Err(Error::new(Kind::Hdf5, "not an HDF5 file")
            .with_found("the HDF5 signature", "other bytes")
            .with_advice("Check that this is a weights file.")),
    }
}

/// What lays images out and finds their datasets.
pub trait Engine: Send + Sync {
    /// `"direct"` or `"libhdf5"`.
    fn name(&self) -> &'static str;

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
        Err(Error::new(Kind::Unsupported, format!("the {} engine does not compress", self.name())))
    }

    /// Finds every group and dataset of the image that is all of `image`.
    ///
    /// # Errors
    /// `Hdf5` for a malformed image, `Unsafe` for links and external storage, `Limit`, and `Unsupported` for legal
    /// HDF5 that this engine does not read (the caller may then ask the other engine).
    fn index(&self, image: &dyn ReadAt) -> Result<Index>;

    /// Reads the datasets at `paths` whose storage is [`Storage::Engine`] into `out`, each of exactly its `nbytes`.
    ///
    /// # Errors
    /// As [`Engine::index`].
    fn read(&self, image: &dyn ReadAt, paths: &[&str], out: &mut [&mut [u8]]) -> Result<()>;
}

/// A string of fixed length without its padding: NULs, or spaces as well.
fn unpadded(bytes: &[u8], spaces: bool) -> Vec<u8> {
    let text = bytes.split(|&b| b == 0).next().unwrap_or_default();
    let end = if spaces { text.iter().rposition(|&b| b != b' ').map_or(0, |last| last + 1) } else { text.len() };
    text[..end].to_vec()
}
