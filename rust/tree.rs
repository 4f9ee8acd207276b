//! What a weights file holds: groups, attributes and datasets, in the order they were recorded. No bytes of datasets.

use std::collections::{HashMap, hash_map::Entry};
use std::sync::Arc;

use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::limits;

/// An attribute: name and value.
pub type Attribute = (String, Value);

/// The value of an attribute: what h5py makes of Python's strings and bytes. Others are not read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    /// `str`: a variable-length UTF-8 string.
    Text(String),
    /// `bytes`: a variable-length string said to be ASCII. A string of fixed length is read as one, too.
    Bytes(Vec<u8>),
    /// A list of `bytes`: a row of variable-length strings. An empty one has no type of its own: NumPy's is `float64`,
    /// and any empty row is read as one.
    List(Vec<Vec<u8>>),
    /// A NumPy array of `bytes`: a row of strings of one fixed length, padded with zeros.
    Fixed(usize, Vec<Vec<u8>>),
}

impl Value {
    /// The strings in it.
    pub fn strings(&self) -> Vec<&[u8]> {
        match self {
            Self::Text(text) => vec![text.as_bytes()],
            Self::Bytes(bytes) => vec![bytes],
            Self::List(all) | Self::Fixed(_, all) => all.iter().map(Vec::as_slice).collect(),
        }
    }

    /// How many strings are in it, and their bytes.
    pub fn extent(&self) -> (usize, usize) {
        match self {
            Self::Text(text) => (1, text.len()),
            Self::Bytes(bytes) => (1, bytes.len()),
            Self::List(all) | Self::Fixed(_, all) => (all.len(), all.iter().map(Vec::len).sum()),
        }
    }

    /// Bytes of the value in an object header.
    fn bytes(&self) -> usize {
        match self {
            Self::Text(_) | Self::Bytes(_) => 16,
            Self::List(all) => all.len().saturating_mul(16),
            Self::Fixed(length, all) => all.len().saturating_mul(*length),
        }
    }

    /// Bytes of the object header message (HDF5 format, §IV.A.2.m, version 1), without its own header.
    pub(crate) fn message_bytes(&self, name: &str) -> usize {
        let (datatype, dataspace) = match self {
            Self::Text(_) | Self::Bytes(_) => (24, 8),
            Self::List(_) => (24, 24),
            Self::Fixed(..) => (8, 24),
        };
        let fixed = 8 + (name.len() + 1).next_multiple_of(8) + datatype + dataspace;
        self.bytes().checked_next_multiple_of(8).map_or(usize::MAX, |value| value.saturating_add(fixed))
    }

    /// The string, if it is one of UTF-8.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

/// A tensor to be written: where, of what type and shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// Path from the root, without a leading slash: `layers/dense/vars/0`. Shared with the tree's own table.
    pub path: Arc<str>,
    /// Element type.
    pub dtype: DType,
    /// Dimensions; empty for a scalar.
    pub shape: Vec<u64>,
    /// Attributes, in order.
    pub attributes: Vec<Attribute>,
    /// Bytes of the tensor: `dtype.size()` times the product of `shape`.
    pub nbytes: u64,
}

/// A group that was named: it exists even when empty. Its ancestors are implied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Path from the root, without a leading slash.
    pub path: Arc<str>,
    /// Attributes, in order.
    pub attributes: Vec<Attribute>,
}

/// Groups and datasets of one weights image. Paths are unique and valid; [`Tree`] cannot hold others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    attributes: Vec<Attribute>,
    groups: Vec<Group>,
    datasets: Vec<Dataset>,
    nodes: HashMap<Arc<str>, Node>,
    last_group: Option<Arc<str>>,
    nbytes: u64,
    attribute_bytes: u64,
    flat: bool,
}

/// What stands at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    /// A group that so far is only somebody's parent.
    Implied,
    /// A group added by name.
    Group,
    /// A dataset.
    Dataset,
}

impl Tree {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty tree without levels: paths are names, in which a slash is a letter like any other.
    pub fn flat() -> Self {
        Self { flat: true, ..Self::default() }
    }

    /// Attributes of the root.
    pub fn attributes(&self) -> &[Attribute] {
        &self.attributes
    }

    /// Gives the root its attributes.
    ///
    /// # Errors
    /// `Invalid` for what HDF5 cannot hold.
    pub fn set_attributes(&mut self, attributes: Vec<Attribute>) -> Result<()> {
        self.check_attributes("/", &attributes)?;
        self.attributes = attributes;
        Ok(())
    }

    /// Groups, in the order they were added.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Datasets, in the order they were added; their payload is laid out in this order.
    pub fn datasets(&self) -> &[Dataset] {
        &self.datasets
    }

    /// Bytes of all tensors.
    pub fn nbytes(&self) -> u64 {
        self.nbytes
    }

    /// Adds a group and, implicitly, its ancestors.
    ///
    /// # Errors
    /// `Invalid` when the path is malformed or already taken by a group with attributes or by a dataset.
    pub fn add_group(&mut self, path: &str, attributes: Vec<Attribute>) -> Result<()> {
        self.check_attributes(path, &attributes)?;
        let path = self.claim(path, Node::Group)?;
        self.groups.push(Group { path, attributes });
        Ok(())
    }

    /// Adds a dataset and, implicitly, its ancestors.
    ///
    /// # Errors
    /// `Invalid` when the path is malformed or taken, or the size overflows.
    pub fn add_dataset(
        &mut self,
        path: &str,
        dtype: DType,
        shape: impl Into<Vec<u64>>,
        attributes: Vec<Attribute>,
    ) -> Result<()> {
        let shape = shape.into();
        self.check_attributes(path, &attributes)?;
        let too_large = || Error::new(Kind::Invalid, "tensor is too large, alone or with the others").with_entry(path);
        let nbytes = dtype.nbytes(&shape).ok_or_else(too_large)?;
        let total = self.nbytes.checked_add(nbytes).filter(|&n| n <= limits::MAX_IMAGE_BYTES).ok_or_else(too_large)?;
        if shape.iter().any(|&n| n > limits::MAX_IMAGE_BYTES) {
            return Err(too_large()); // another dimension is 0
        }
        if shape.len() > limits::MAX_RANK {
            return Err(Error::new(Kind::Invalid, "HDF5 has no tensors of such rank")
                .with_found(format_args!("at most {}", limits::MAX_RANK), shape.len())
                .with_entry(path));
        }
        let path = self.claim(path, Node::Dataset)?;
        self.nbytes = total;
        self.datasets.push(Dataset { path, dtype, shape, attributes, nbytes });
        Ok(())
    }

    /// Checks attributes, and counts their bytes: a reader takes so many, with something for each string.
    fn check_attributes(&mut self, path: &str, attributes: &[Attribute]) -> Result<()> {
        const EACH: u64 = 64;
        check_attributes(path, attributes)?;
        let strings = attributes.iter().flat_map(|(_, value)| value.strings());
        let bytes = strings.map(|s| s.len() as u64 + EACH).sum::<u64>();
        let total = self.attribute_bytes.saturating_add(bytes);
        if total > limits::MAX_HEADER_BYTES {
            return Err(Error::new(Kind::Invalid, "the attributes of this file are too large together")
                .with_found(format_args!("at most {} bytes", limits::MAX_HEADER_BYTES), total)
                .with_entry(path));
        }
        self.attribute_bytes = total;
        Ok(())
    }

    /// Registers `path` and its ancestors, refusing what HDF5 or a file system underneath could misread.
    fn claim(&mut self, path: &str, node: Node) -> Result<Arc<str>> {
        let bad = |what: &str| Err(Error::new(Kind::Invalid, what).with_entry(path));
        if path.len() > limits::MAX_PATH_BYTES {
            return bad("path is too long for a weights file");
        }
        if self.flat {
            let shared: Arc<str> = path.into();
            return match self.nodes.insert(Arc::clone(&shared), node) {
                None => Ok(shared),
                Some(_) => bad("name is already taken"),
            };
        }
        let mut depth = 0;
        for part in path.split('/') {
            if matches!(part, "" | "." | "..") || part.contains('\0') {
                return bad("path has an empty part, '.', '..' or a NUL character, which HDF5 cannot store");
            }
            depth += 1;
        }
        if depth > limits::MAX_DEPTH {
            return bad("path is nested too deeply");
        }
        let head = path.rsplit_once('/').map_or("", |(head, _)| head);
        let mut implied: Vec<Arc<str>> = Vec::new();
        // Neighbours share their group, which was looked at a moment ago.
        let known = !head.is_empty() && self.last_group.as_deref() == Some(head);
        let mut parent = if known { "" } else { path };
        while let Some((head, _)) = parent.rsplit_once('/') {
            match self.nodes.get(head) {
                Some(Node::Dataset) => return bad("a parent of this path is a dataset"),
                Some(_) => break,
                None => implied.push(head.into()),
            }
            parent = head;
        }
        let shared: Arc<str> = path.into();
        match self.nodes.entry(Arc::clone(&shared)) {
            Entry::Vacant(free) => {
                free.insert(node);
            }
            Entry::Occupied(mut taken) => match (taken.get(), node) {
                (Node::Implied, Node::Group) => {
                    taken.insert(node);
                }
                (Node::Dataset, _) => return bad("name is already taken by a dataset"),
                _ => return bad("name is already taken by a group"),
            },
        }
        if !known {
            self.last_group = Some(head.into());
        }
        self.nodes.extend(implied.into_iter().map(|head| (head, Node::Implied)));
        Ok(shared)
    }
}

/// Name and value end up in one object header message; variable-length strings lie elsewhere.
fn check_attributes(path: &str, attributes: &[Attribute]) -> Result<()> {
    for (i, (name, value)) in attributes.iter().enumerate() {
        if name.is_empty() || name.contains('\0') || name.len() > limits::MAX_ATTRIBUTE_NAME_BYTES {
            return Err(Error::new(Kind::Invalid, "attribute name is empty, too long or holds a NUL").with_entry(path));
        }
        if attributes[..i].iter().any(|(other, _)| other == name) {
            return Err(Error::new(Kind::Invalid, format!("attribute '{name}' comes twice")).with_entry(path));
        }
        let strings = value.strings();
        if strings.iter().any(|s| s.contains(&0)) {
            return Err(Error::new(Kind::Invalid, "attribute value holds a NUL character, which HDF5 strings cannot")
                .with_entry(path));
        }
        let size = value.bytes();
        if size > limits::MAX_ATTRIBUTE_BYTES || value.message_bytes(name) > limits::MAX_MESSAGE_BYTES {
            return Err(Error::new(Kind::Invalid, format!("attribute '{name}' is too large for an object header"))
                .with_found(format_args!("at most {} bytes", limits::MAX_ATTRIBUTE_BYTES), size)
                .with_entry(path));
        }
        if let Value::Fixed(length, all) = value
            && (all.is_empty() || *length == 0 || all.iter().any(|s| s.len() > *length))
        {
            return Err(Error::new(
                Kind::Invalid,
                format!("the strings of attribute '{name}' are not of their length"),
            )
            .with_entry(path));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_flat_tree_are_only_unique() {
        let mut t = Tree::flat();
        for name in ["a", "a/b", "a//b", "", "..", "/"] {
            t.add_dataset(name, DType::F32, [2], vec![]).unwrap();
        }
        assert!(t.add_dataset("a/b", DType::F32, [2], vec![]).is_err());
        assert!(t.add_group("a", vec![]).is_err());
        assert_eq!(t.datasets().len(), 6);
    }

    #[test]
    fn refuses_what_hdf5_cannot_hold() {
        let mut t = Tree::new();
        t.add_dataset("a/b", DType::F32, [2], vec![]).unwrap();
        for bad in ["", "a//b", "/a", "a/", "a/../b", "a/.", "x\0", "a/b/c", "a/b", "a"] {
            assert!(t.add_dataset(bad, DType::F32, [1], vec![]).is_err(), "{bad:?}");
        }
        assert!(t.add_group("a/b", vec![]).is_err());
        t.add_group("a", vec![("name".into(), "x".into())]).unwrap(); // implied before, now named
        assert!(t.add_group("a", vec![]).is_err());
        assert!(t.add_dataset("big", DType::F64, [1 << 40, 1 << 40], vec![]).is_err());
        assert!(t.add_dataset("rank", DType::F64, [1; 33], vec![]).is_err());
        for _ in 0..2 {
            assert!(t.add_dataset("a/b/c/d", DType::F32, [1], vec![]).is_err()); // the first refusal leaves nothing
        }
        assert_eq!((t.datasets().len(), t.groups().len(), t.nbytes()), (1, 1, 8));
    }
}
