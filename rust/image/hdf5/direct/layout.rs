//! Tree → metadata image and offsets, in one pass over the tree and 0.4 µs a dataset.
//!
//! Objects are written children first, so that every address is known when it is needed. The payload follows the
//! metadata; only its start is patched in at the end.

use std::collections::HashMap;

use super::{SIGNATURE, UNDEFINED, message};
use crate::dtype::{Class, DType};
use crate::error::{Error, Kind, Result};
use crate::image::{ALIGNMENT, Layout};
use crate::io::buffer::vec_with_capacity;
use crate::limits;
use crate::tree::{Attribute, Dataset, Tree, Value};

/// Entries of a symbol-table node: twice the "group leaf node K" of the superblock.
const LEAF: usize = 8;
/// Children of a group B-tree node: twice the "group internal node K".
const FAN: usize = 32;
/// Bytes of a group B-tree node: header, FAN children, FAN + 1 keys.
const BTREE_NODE: usize = 24 + 8 * (FAN + FAN + 1);
/// Bytes after which a global heap collection is closed; the library's own are at least 4096.
const HEAP_COLLECTION: usize = 64 << 10;
/// Attributes an object may carry here; Keras writes one.
const MAX_ATTRIBUTES: usize = 1000;

/// Lays `tree` out. Datasets are placed in its order.
pub(super) fn lay_out(tree: &Tree) -> Result<Layout> {
    let (mut offsets, payload) = place(tree.datasets());
    let nodes = nodes(tree);
    let objects = nodes.len() - 1 + tree.datasets().len();
    if objects > limits::MAX_OBJECTS {
        return Err(Error::new(Kind::Invalid, "too many groups and datasets for one file")
            .with_found(format_args!("at most {}", limits::MAX_OBJECTS), objects));
    }
    let mut w = Writer::with_capacity(96 + tree.datasets().len() * 256 + nodes.len() * 1024);
    w.superblock();
    let mut groups = vec![GroupAddress::default(); nodes.len()];
    for i in (0..nodes.len()).rev() {
        // A child's index is above its parent's.
        groups[i] = w.group(&nodes[i], tree.datasets(), &offsets, &groups)?;
    }
    w.close_heap();
    w.place_heaps();
    w.pad(ALIGNMENT as usize);
    let start = w.bytes.len() as u64;
    for at in std::mem::take(&mut w.payload_addresses) {
        let relative = u64::from_le_bytes(w.bytes[at..at + 8].try_into().expect("eight bytes"));
        w.patch(at, &(relative + start).to_le_bytes());
    }
    offsets.iter_mut().flatten().for_each(|o| *o += start);
    let len = start + payload;
    w.finish_superblock(len, groups[0]);
    Ok(Layout { metadata: vec![(0, w.bytes)], offsets, len })
}

/// Offsets of the datasets from the start of the payload, and its length.
fn place(datasets: &[Dataset]) -> (Vec<Option<u64>>, u64) {
    let mut end = 0u64;
    let offsets = datasets.iter().map(|d| {
        (d.nbytes > 0).then(|| {
            let start = end.next_multiple_of(if d.nbytes < ALIGNMENT { 8 } else { ALIGNMENT });
            end = start + d.nbytes;
            start
        })
    });
    (offsets.collect(), end)
}

enum Child {
    Group(usize),
    Dataset(usize),
}

#[derive(Default)]
struct Node<'a> {
    path: &'a str,
    children: Vec<(&'a str, Child)>,
    attributes: &'a [Attribute],
}

/// The groups of the tree, root first, parents before children, each with its children by name.
fn nodes(tree: &Tree) -> Vec<Node<'_>> {
    fn group<'a>(path: &'a str, nodes: &mut Vec<Node<'a>>, by_path: &mut HashMap<&'a str, usize>) -> usize {
        if let Some(&i) = by_path.get(path) {
            return i;
        }
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let parent = group(parent, nodes, by_path);
        let i = nodes.len();
        nodes.push(Node { path, ..Node::default() });
        nodes[parent].children.push((name, Child::Group(i)));
        by_path.insert(path, i);
        i
    }
    let mut nodes = vec![Node { attributes: tree.attributes(), ..Node::default() }];
    let mut by_path = HashMap::from([("", 0)]);
    for g in tree.groups() {
        let i = group(&g.path, &mut nodes, &mut by_path);
        nodes[i].attributes = &g.attributes;
    }
    let mut last = ("", 0); // neighbours share their group
    for (i, d) in tree.datasets().iter().enumerate() {
        let (parent, name) = d.path.rsplit_once('/').unwrap_or(("", &d.path));
        if parent != last.0 {
            last = (parent, group(parent, &mut nodes, &mut by_path));
        }
        nodes[last.1].children.push((name, Child::Dataset(i)));
    }
    for node in &mut nodes {
        node.children.sort_unstable_by_key(|c| c.0.as_bytes());
    }
    nodes
}

/// Where a group's header, B-tree and local heap are.
#[derive(Clone, Copy, Default)]
struct GroupAddress {
    header: u64,
    btree: u64,
    heap: u64,
}

/// A symbol-table entry (§III.C); the scratch pad caches a group's B-tree and heap.
struct Symbol {
    name_offset: u64,
    header: u64,
    scratch: Option<(u64, u64)>,
}

struct Writer {
    bytes: Vec<u8>,
    payload_addresses: Vec<usize>,
    heap: Vec<u8>,
    heap_objects: u16,
    heap_references: Vec<usize>,
    heaps: Vec<(Vec<u8>, Vec<usize>)>,
}

impl Writer {
    fn with_capacity(n: usize) -> Self {
        Self {
            bytes: vec_with_capacity(n),
            payload_addresses: Vec::new(),
            heap: Vec::new(),
            heap_objects: 0,
            heap_references: Vec::new(),
            heaps: Vec::new(),
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn u16(&mut self, v: u16) {
        self.put(&v.to_le_bytes());
    }

    fn u32(&mut self, v: u32) {
        self.put(&v.to_le_bytes());
    }

    fn u64(&mut self, v: u64) {
        self.put(&v.to_le_bytes());
    }

    fn pad(&mut self, multiple: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(multiple), 0);
    }

    fn patch(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Superblock version 0 (§II.A); base address 0 wherever the image will lie.
    fn superblock(&mut self) {
        self.put(&SIGNATURE);
        self.put(&[0, 0, 0, 0, 0, 8, 8, 0]); // versions, sizes of offsets and lengths
        self.u16(LEAF as u16 / 2);
        self.u16(FAN as u16 / 2);
        self.u32(0); // consistency flags
        for address in [0, UNDEFINED, 0, UNDEFINED] {
            self.u64(address); // base, free space, end of file (patched), driver information
        }
        self.put(&[0; 40]); // root symbol-table entry (patched)
    }

    fn finish_superblock(&mut self, end_of_file: u64, root: GroupAddress) {
        self.patch(40, &end_of_file.to_le_bytes());
        self.patch(64, &root.header.to_le_bytes());
        self.patch(72, &1u32.to_le_bytes()); // cache type: symbol table
        self.patch(80, &root.btree.to_le_bytes());
        self.patch(88, &root.heap.to_le_bytes());
    }

    /// A group: headers of its datasets, names, symbol nodes, B-tree, local heap, its own header.
    fn group(
        &mut self,
        node: &Node<'_>,
        datasets: &[Dataset],
        offsets: &[Option<u64>],
        groups: &[GroupAddress],
    ) -> Result<GroupAddress> {
        let mut names = vec![0u8; 8]; // offset 0 is the empty name, the B-tree's first key
        let mut symbols = Vec::with_capacity(node.children.len());
        for (name, child) in &node.children {
            let name_offset = names.len() as u64;
            names.extend_from_slice(name.as_bytes());
            names.resize((names.len() + 1).next_multiple_of(8), 0);
            symbols.push(match *child {
                Child::Group(i) => {
                    let g = groups[i];
                    Symbol { name_offset, header: g.header, scratch: Some((g.btree, g.heap)) }
                }
                Child::Dataset(i) => {
                    Symbol { name_offset, header: self.dataset(&datasets[i], offsets[i])?, scratch: None }
                }
            });
        }
        if names.len() as u64 > limits::MAX_HEADER_BYTES {
            return Err(Error::new(Kind::Invalid, "the names in this group are too long together")
                .with_found(format_args!("at most {} bytes", limits::MAX_HEADER_BYTES), names.len())
                .with_entry(node.path));
        }
        let leaves = self.symbol_nodes(&symbols);
        let btree = self.btree(leaves);
        let heap = self.bytes.len() as u64;
        self.put(b"HEAP\0\0\0\0"); // §III.D
        self.u64(names.len() as u64);
        self.u64(1); // no free blocks
        self.u64(heap + 32);
        self.put(&names);
        let header = self.open_header(1, node.attributes).map_err(|e| e.with_entry(node.path))?;
        self.message(message::SYMBOL_TABLE, 16, 0)?;
        self.u64(btree);
        self.u64(heap);
        self.close_header(header, node.attributes).map_err(|e| e.with_entry(node.path))?;
        Ok(GroupAddress { header: header as u64, btree, heap })
    }

    /// Symbol-table nodes (§III.B): `(address, heap offset of the last name)` of each.
    fn symbol_nodes(&mut self, symbols: &[Symbol]) -> Vec<(u64, u64)> {
        let chunks = symbols.chunks(LEAF);
        chunks
            .map(|chunk| {
                let address = self.bytes.len();
                self.put(b"SNOD\x01\0");
                self.u16(chunk.len() as u16);
                for s in chunk {
                    self.u64(s.name_offset);
                    self.u64(s.header);
                    self.u32(u32::from(s.scratch.is_some()));
                    self.u32(0);
                    let (btree, heap) = s.scratch.unwrap_or_default();
                    self.u64(btree);
                    self.u64(heap);
                }
                self.bytes.resize(address + 8 + LEAF * 40, 0);
                (address as u64, chunk.last().map_or(0, |s| s.name_offset))
            })
            .collect()
    }

    /// The group's version 1 B-tree (§III.A.1), level by level; returns the root's address.
    fn btree(&mut self, mut level_nodes: Vec<(u64, u64)>) -> u64 {
        for level in 0u8.. {
            let base = self.bytes.len() as u64;
            let count = level_nodes.len().div_ceil(FAN).max(1);
            let mut parents = Vec::with_capacity(count);
            let mut left_key = 0;
            for j in 0..count {
                let children = &level_nodes[j * FAN..level_nodes.len().min((j + 1) * FAN)];
                let address = self.bytes.len();
                let sibling = |k: usize| base + (k * BTREE_NODE) as u64;
                self.put(&[b'T', b'R', b'E', b'E', 0, level]);
                self.u16(children.len() as u16);
                self.u64(if j == 0 { UNDEFINED } else { sibling(j - 1) });
                self.u64(if j + 1 == count { UNDEFINED } else { sibling(j + 1) });
                self.u64(left_key);
                for &(child, last_name) in children {
                    self.u64(child);
                    self.u64(last_name);
                    left_key = last_name;
                }
                self.bytes.resize(address + BTREE_NODE, 0);
                parents.push((address as u64, left_key));
            }
            if count == 1 {
                return base;
            }
            level_nodes = parents;
        }
        unreachable!("every level has 32 times fewer nodes")
    }

    /// A dataset's object header; its address.
    fn dataset(&mut self, d: &Dataset, offset: Option<u64>) -> Result<u64> {
        let header = self.open_header(4, &d.attributes).map_err(|e| e.with_entry(&d.path))?;
        let rank = d.shape.len();
        self.message(message::DATASPACE, 8 + 16 * rank, 0)?;
        self.put(&[1, rank as u8, u8::from(rank > 0), 0, 0, 0, 0, 0]); // flag: maximum dimensions follow
        for &n in d.shape.iter().chain(&d.shape) {
            self.u64(n);
        }
        self.datatype(d.dtype).map_err(|e| e.with_entry(&d.path))?;
        self.message(message::FILL_VALUE, 8, 1)?;
        self.put(&[2, 2, 2, 1, 0, 0, 0, 0]); // version 2, late allocation, written if set, default value
        self.message(message::LAYOUT, 24, 0)?;
        self.put(&[3, 1]); // version 3, contiguous
        if offset.is_some() {
            self.payload_addresses.push(self.bytes.len());
        }
        self.u64(offset.unwrap_or(UNDEFINED));
        self.u64(d.nbytes);
        self.put(&[0; 6]);
        self.close_header(header, &d.attributes).map_err(|e| e.with_entry(&d.path))?;
        Ok(header as u64)
    }

    /// Starts a version 1 object header (§IV.A.1.a).
    fn open_header(&mut self, messages: u16, attributes: &[Attribute]) -> Result<usize> {
        if attributes.len() > MAX_ATTRIBUTES {
            return Err(Error::new(Kind::Invalid, "too many attributes on one object")
                .with_found(format_args!("at most {MAX_ATTRIBUTES}"), attributes.len()));
        }
        let at = self.bytes.len();
        self.put(&[1, 0]);
        self.u16(messages + attributes.len() as u16);
        self.u32(1); // reference count
        self.u64(0); // size (patched) and padding
        Ok(at)
    }

    fn close_header(&mut self, at: usize, attributes: &[Attribute]) -> Result<()> {
        for (name, value) in attributes {
            self.attribute(name, value)?;
        }
        let size = (self.bytes.len() - at - 16) as u32;
        self.patch(at + 8, &size.to_le_bytes());
        Ok(())
    }

    fn message(&mut self, kind: u16, size: usize, flags: u8) -> Result<()> {
        let Ok(bytes) = u16::try_from(size) else {
            return Err(Error::new(Kind::Invalid, "an object header message is too large")
                .with_found(format_args!("at most {} bytes", limits::MAX_MESSAGE_BYTES), size));
        };
        self.u16(kind);
        self.u16(bytes);
        self.put(&[flags, 0, 0, 0]);
        Ok(())
    }

    /// Datatype message (§IV.A.2.d), encoded as HDF5 does for h5py's types.
    fn datatype(&mut self, dtype: DType) -> Result<()> {
        let size = dtype.size();
        match dtype.class() {
            Class::Integer { .. } => self.message(message::DATATYPE, 16, 1)?,
            Class::Float(..) => self.message(message::DATATYPE, 24, 1)?,
            Class::Boolean => self.message(message::DATATYPE, 40, 1)?,
            Class::Complex(_) => self.message(message::DATATYPE, 128, 1)?,
            Class::Opaque => self.message(message::DATATYPE, 8, 1)?,
        }
        match dtype.class() {
            Class::Integer { signed } => {
                self.integer(size, signed);
                self.u32(0);
            }
            Class::Float(exponent, mantissa, bias) => {
                self.float(size, exponent, mantissa, bias);
                self.u32(0);
            }
            Class::Boolean => {
                self.put(&[0x18, 2, 0, 0, 1, 0, 0, 0]); // enumeration of two members over …
                self.integer(1, true);
                self.put(b"FALSE\0\0\0TRUE\0\0\0\0\x00\x01\0\0");
            }
            Class::Complex(part) => {
                self.put(&[0x16, 2, 0, 0]); // compound of two members
                self.u32(size as u32);
                let Class::Float(exponent, mantissa, bias) = part.class() else { unreachable!("parts are floats") };
                for (name, offset) in [(b'r', 0), (b'i', part.size())] {
                    self.put(&[name, 0, 0, 0, 0, 0, 0, 0]);
                    self.u32(offset as u32);
                    self.put(&[0; 28]); // no dimensions
                    self.float(part.size(), exponent, mantissa, bias);
                }
            }
            Class::Opaque => {
                self.put(&[0x15, 0, 0, 0]); // no tag
                self.u32(size as u32);
            }
        }
        Ok(())
    }

    /// 12 bytes: little-endian fixed-point number.
    fn integer(&mut self, size: usize, signed: bool) {
        self.put(&[0x10, if signed { 8 } else { 0 }, 0, 0]);
        self.u32(size as u32);
        self.u16(0);
        self.u16(size as u16 * 8);
    }

    /// 20 bytes: little-endian IEEE float, implied leading bit.
    fn float(&mut self, size: usize, exponent: u8, mantissa: u8, bias: u32) {
        self.put(&[0x11, 0x20, size as u8 * 8 - 1, 0]);
        self.u32(size as u32);
        self.u16(0);
        self.u16(size as u16 * 8);
        self.put(&[mantissa, exponent, 0, mantissa]);
        self.u32(bias);
    }

    /// Attribute message (§IV.A.2.m), as h5py writes it; variable-length strings are in the global heap.
    fn attribute(&mut self, name: &str, value: &Value) -> Result<()> {
        let (type_size, row): (usize, _) = match value {
            Value::Text(_) | Value::Bytes(_) => (20, None),
            Value::List(all) => (20, Some(all.len())),
            Value::Fixed(_, all) => (8, Some(all.len())),
        };
        let padded = (name.len() + 1).next_multiple_of(8);
        let space_size: u16 = if row.is_some() { 24 } else { 8 };
        let size = value.message_bytes(name);
        self.message(message::ATTRIBUTE, size, 0)?;
        let end = self.bytes.len() + size;
        self.put(&[1, 0]);
        self.u16(name.len() as u16 + 1);
        self.u16(type_size as u16);
        self.u16(space_size);
        let at = self.bytes.len();
        self.put(name.as_bytes());
        self.bytes.resize(at + padded, 0);
        match value {
            Value::List(all) if all.is_empty() => {
                self.float(8, 11, 52, 1023);
                self.u32(0);
            }
            Value::Fixed(length, _) => {
                self.put(&[0x13, 1, 0, 0]); // string, padded with NUL, ASCII
                self.u32(*length as u32);
            }
            _ => {
                let utf8 = u8::from(matches!(value, Value::Text(_)));
                self.put(&[0x19, 1, utf8, 0, 16, 0, 0, 0]); // variable-length string, null terminated, of …
                self.put(&[0x10, 0, 0, 0, 1, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0]); // … one-byte integers
            }
        }
        match row {
            None => self.put(&[1, 0, 0, 0, 0, 0, 0, 0]), // scalar
            Some(n) => {
                self.put(&[1, 1, 1, 0, 0, 0, 0, 0]);
                self.u64(n as u64);
                self.u64(n as u64); // at most
            }
        }
        match value {
            Value::Text(text) => self.string(text.as_bytes()),
            Value::Bytes(bytes) => self.string(bytes),
            Value::List(all) => all.iter().for_each(|s| self.string(s)),
            Value::Fixed(length, all) => {
                for s in all {
                    let end = self.bytes.len() + length;
                    self.put(s);
                    self.bytes.resize(end, 0);
                }
            }
        }
        self.bytes.resize(end, 0);
        Ok(())
    }

    /// A reference to a string in the global heap.
    fn string(&mut self, value: &[u8]) {
        self.u32(value.len() as u32);
        let object = self.heap_object(value);
        self.heap_references.push(self.bytes.len());
        self.u64(0); // address of the collection (patched)
        self.u32(u32::from(object));
    }

    /// Puts `value` into the open global heap collection (§III.E); its index there.
    fn heap_object(&mut self, value: &[u8]) -> u16 {
        if self.heap.len() + 32 + value.len() > HEAP_COLLECTION {
            self.close_heap();
        }
        if self.heap.is_empty() {
            self.heap.extend_from_slice(b"GCOL\x01\0\0\0\0\0\0\0\0\0\0\0"); // the size is patched
            self.heap_objects = 0;
        }
        self.heap_objects += 1;
        self.heap.extend_from_slice(&self.heap_objects.to_le_bytes());
        self.heap.extend_from_slice(&[0; 6]);
        self.heap.extend_from_slice(&(value.len() as u64).to_le_bytes());
        self.heap.extend_from_slice(value);
        self.heap.resize(self.heap.len().next_multiple_of(8), 0);
        self.heap_objects
    }

    fn close_heap(&mut self) {
        if self.heap.is_empty() {
            return;
        }
        let mut heap = std::mem::take(&mut self.heap);
        let used = heap.len();
        let size = (used + 16).max(4096);
        heap.extend_from_slice(&[0; 8]); // object 0: the free space
        heap.extend_from_slice(&((size - used) as u64).to_le_bytes());
        heap.resize(size, 0);
        heap[8..16].copy_from_slice(&(size as u64).to_le_bytes());
        self.heaps.push((heap, std::mem::take(&mut self.heap_references)));
    }

    fn place_heaps(&mut self) {
        for (heap, references) in std::mem::take(&mut self.heaps) {
            let address = self.bytes.len() as u64;
            self.put(&heap);
            for at in references {
                self.patch(at, &address.to_le_bytes());
            }
        }
    }
}
