//! HDF5: what its two engines share.
//!
//! [`direct`] is safe Rust for what h5py writes for Keras; `libhdf5` is the C library, for everything else and as the
//! reference.

pub mod direct;
mod element;
pub mod filters;
#[cfg(feature = "libhdf5")]
pub mod libhdf5;

use std::borrow::Cow;
use std::ops::Range;

use super::{Found, Index, Storage};
use crate::dtype::DType;
use crate::error::{Error, Kind, Result, try_push};
use crate::io::{ReadAt, Window};
use crate::limits;
use crate::tree::{Attribute, Value};

/// What was found at an object and below it, so that a second link to it needs no second walk.
struct Subtree {
    path: usize, // bytes of its path
    groups: Range<usize>,
    datasets: Range<usize>,
}

impl Found {
    /// A dataset that is listed, and not read for this reason.
    fn unreadable(
        path: String,
        shape: Vec<u64>,
        reason: Cow<'static, str>,
        attributes: Vec<Attribute>,
        object: u64,
    ) -> Self {
        let storage = Storage::Unreadable(reason);
        Self { path, dtype: DType::Opaque(1), shape, nbytes: 0, storage, attributes, object }
    }
}

/// Says of opaque bytes that they are HDF5's own bfloat16, as h5py's attribute does.
fn tag_bfloat16(attributes: &mut Vec<Attribute>) {
    if !attributes.iter().any(|(name, _)| name == "dtype") {
        attributes.push(("dtype".into(), "bfloat16".into()));
    }
}

/// How many strings an attribute of this shape has, if it is a scalar or a row.
fn string_count(shape: &[u64]) -> Option<usize> {
    match shape {
        [] => Some(1),
        &[n] => usize::try_from(n).ok(),
        _ => None,
    }
}

/// What the strings of an attribute mean: a row, of one `length` if they have one, or a scalar.
fn string_value(mut strings: Vec<Vec<u8>>, row: bool, utf8: bool, length: Option<usize>) -> Value {
    match length {
        Some(length) if row => Value::Fixed(length, strings),
        None if row => Value::List(strings),
        _ => match String::from_utf8(strings.pop().unwrap_or_default()) {
            Ok(text) if utf8 => Value::Text(text),
            Ok(text) => Value::Bytes(text.into_bytes()),
            Err(error) => Value::Bytes(error.into_bytes()),
        },
    }
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
        try_push(&mut self.groups, (path, attributes))
    }

    fn add_dataset(&mut self, found: Found, budget: &mut Budget) -> Result<()> {
        self.check_room()?;
        let value = if let Storage::Compact(bytes) = &found.storage { bytes.len() } else { 0 };
        let heap = 3 * ALLOCATION + found.path.len() + found.shape.len() * 8 + value;
        budget.spend(2 * size_of::<Found>() + heap)?;
        try_push(&mut self.datasets, found)
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

#[cold]
fn refused(what: &str) -> Error {
    Error::new(Kind::Unsafe, format!("Not allowed: H5 file with {what}"))
        .with_advice("It points to data outside itself, which a model file must not.")
}

/// Refuses every link but a hard one, by the number of its kind (§IV.A.2.g, `H5L_type_t`).
fn check_link(kind: i32) -> Result<()> {
    match kind {
        0 => Ok(()),
        1 => Err(refused("SoftLink")),
        64 => Err(refused("ExternalLink")),
        _ => Err(refused("user-defined link")),
    }
}

/// The name of a link: UTF-8, and one component of a path.
fn link_name(bytes: &[u8]) -> Result<&str> {
    match std::str::from_utf8(bytes) {
        Ok(name) if !matches!(name, "" | "." | "..") && !name.contains(['/', '\0']) => Ok(name),
        _ => Err(Error::new(Kind::Image, "malformed HDF5: the name of a link is not UTF-8 or no component of a path")
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
            return Err(Error::new(Kind::Image, format!("malformed HDF5: {what}"))
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
    Error::new(Kind::Image, "a group contains itself, by a hard link")
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
        None => Err(Error::new(Kind::Image, "not an HDF5 file")
            .with_found("the HDF5 signature", "other bytes")
            .with_advice("Check that this is a weights file.")),
    }
}

/// A string of fixed length without its padding: NULs, or spaces as well.
fn unpadded(bytes: &[u8], spaces: bool) -> Vec<u8> {
    let text = bytes.split(|&b| b == 0).next().unwrap_or_default();
    let end = if spaces { text.iter().rposition(|&b| b != b' ').map_or(0, |last| last + 1) } else { text.len() };
    text[..end].to_vec()
}
