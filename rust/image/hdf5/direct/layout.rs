//! Tree → metadata image and offsets, in one pass over the tree and 0.4 µs a dataset.
//!
//! Objects are written children first, so that every address is known when it is needed. The payload follows the
//! metadata; only its start is patched in at the end.

use std::collections::HashMap;

use super::fields::Append;
use super::structure::{
    BTREE, BTREE_ENTRY, BTREE_HEAD, CACHED_GROUP, END_OF_FILE_AT, GLOBAL_HEAP, GLOBAL_HEAP_HEAD, HEAP_OBJECT_HEAD,
    LOCAL_HEAP, LOCAL_HEAP_HEAD, ROOT_AT, SUPERBLOCK, SYMBOL, SYMBOL_CACHE_AT, SYMBOL_HEADER_AT, SYMBOL_NODE,
    SYMBOL_NODE_HEAD, SYMBOL_SCRATCH_AT,
};
use super::{SIGNATURE, UNDEFINED, message};
use crate::error::{Error, Kind, Result};
use crate::image::{ALIGNMENT, Layout};
use crate::io::buffer::vec_with_capacity;
use crate::limits;
use crate::tree::{Attribute, Dataset, Tree};

/// Entries of a symbol-table node: twice the "group leaf node K" of the superblock.
const LEAF: usize = 8;
/// Children of a group B-tree node: twice the "group internal node K".
const FAN: usize = 32;
/// Bytes of a group B-tree node: FAN children, each behind its key, and a last key.
const BTREE_NODE: usize = BTREE_HEAD + FAN * BTREE_ENTRY + 8;
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
    let mut w = Writer::with_capacity(SUPERBLOCK + tree.datasets().len() * 256 + nodes.len() * 1024);
    w.superblock();
    let mut groups = vec![GroupAddress::default(); nodes.len()];
    for i in (0..nodes.len()).rev() {
        // A child's index is above its parent's.
        groups[i] = w.group(&nodes[i], tree.datasets(), &offsets, &groups)?;
    }
    w.place_heaps();
    w.bytes.pad(ALIGNMENT as usize);
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
    heaps: Heaps,
}

impl Writer {
    fn with_capacity(n: usize) -> Self {
        Self { bytes: vec_with_capacity(n), payload_addresses: Vec::new(), heaps: Heaps::default() }
    }

    fn patch(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Superblock version 0 (§II.A); base address 0 wherever the image will lie.
    fn superblock(&mut self) {
        let out = &mut self.bytes;
        out.put(&SIGNATURE);
        out.put(&[0, 0, 0, 0, 0, 8, 8, 0]); // versions, sizes of offsets and lengths
        out.u16(LEAF as u16 / 2);
        out.u16(FAN as u16 / 2);
        out.u32(0); // consistency flags
        for address in [0, UNDEFINED, 0, UNDEFINED] {
            out.u64(address); // base, free space, end of file (patched), driver information
        }
        out.resize(SUPERBLOCK, 0); // the root's symbol (patched)
    }

    fn finish_superblock(&mut self, end_of_file: u64, root: GroupAddress) {
        self.patch(END_OF_FILE_AT, &end_of_file.to_le_bytes());
        self.patch(ROOT_AT + SYMBOL_HEADER_AT, &root.header.to_le_bytes());
        self.patch(ROOT_AT + SYMBOL_CACHE_AT, &CACHED_GROUP.to_le_bytes());
        self.patch(ROOT_AT + SYMBOL_SCRATCH_AT, &root.btree.to_le_bytes());
        self.patch(ROOT_AT + SYMBOL_SCRATCH_AT + 8, &root.heap.to_le_bytes());
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
        let out = &mut self.bytes;
        out.put(&LOCAL_HEAP); // §III.D
        out.u32(0);
        out.u64(names.len() as u64);
        out.u64(1); // no free blocks
        out.u64(heap + LOCAL_HEAP_HEAD as u64);
        out.put(&names);
        let header = self.open_header(1, node.attributes).map_err(|e| e.with_entry(node.path))?;
        message::put_symbol_table(&mut self.bytes, btree, heap)?;
        self.close_header(header, node.attributes).map_err(|e| e.with_entry(node.path))?;
        Ok(GroupAddress { header: header as u64, btree, heap })
    }

    /// Symbol-table nodes (§III.B): `(address, heap offset of the last name)` of each.
    fn symbol_nodes(&mut self, symbols: &[Symbol]) -> Vec<(u64, u64)> {
        let out = &mut self.bytes;
        let chunks = symbols.chunks(LEAF);
        chunks
            .map(|chunk| {
                let address = out.len();
                out.put(&SYMBOL_NODE);
                out.put(&[1, 0]); // version
                out.u16(chunk.len() as u16);
                for s in chunk {
                    out.u64(s.name_offset);
                    out.u64(s.header);
                    out.u32(if s.scratch.is_some() { CACHED_GROUP } else { 0 });
                    out.u32(0);
                    let (btree, heap) = s.scratch.unwrap_or_default();
                    out.u64(btree);
                    out.u64(heap);
                }
                out.resize(address + SYMBOL_NODE_HEAD + LEAF * SYMBOL, 0);
                (address as u64, chunk.last().map_or(0, |s| s.name_offset))
            })
            .collect()
    }

    /// The group's version 1 B-tree (§III.A.1), level by level; returns the root's address.
    fn btree(&mut self, mut level_nodes: Vec<(u64, u64)>) -> u64 {
        let out = &mut self.bytes;
        for level in 0u8.. {
            let base = out.len() as u64;
            let count = level_nodes.len().div_ceil(FAN).max(1);
            let mut parents = Vec::with_capacity(count);
            let mut left_key = 0;
            for j in 0..count {
                let children = &level_nodes[j * FAN..level_nodes.len().min((j + 1) * FAN)];
                let address = out.len();
                let sibling = |k: usize| base + (k * BTREE_NODE) as u64;
                out.put(&BTREE);
                out.put(&[0, level]); // of a group
                out.u16(children.len() as u16);
                out.u64(if j == 0 { UNDEFINED } else { sibling(j - 1) });
                out.u64(if j + 1 == count { UNDEFINED } else { sibling(j + 1) });
                out.u64(left_key);
                for &(child, last_name) in children {
                    out.u64(child);
                    out.u64(last_name);
                    left_key = last_name;
                }
                out.resize(address + BTREE_NODE, 0);
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
        let out = &mut self.bytes;
        message::put_dataspace(out, &d.shape)?;
        message::put_datatype(out, d.dtype).map_err(|e| e.with_entry(&d.path))?;
        message::put_fill_value(out)?;
        let at = message::put_layout(out, offset, d.nbytes)?;
        if offset.is_some() {
            self.payload_addresses.push(at);
        }
        self.close_header(header, &d.attributes).map_err(|e| e.with_entry(&d.path))?;
        Ok(header as u64)
    }

    /// Starts a version 1 object header (§IV.A.1.a).
    fn open_header(&mut self, messages: u16, attributes: &[Attribute]) -> Result<usize> {
        if attributes.len() > MAX_ATTRIBUTES {
            return Err(Error::new(Kind::Invalid, "too many attributes on one object")
                .with_found(format_args!("at most {MAX_ATTRIBUTES}"), attributes.len()));
        }
        let out = &mut self.bytes;
        let at = out.len();
        out.put(&[1, 0]);
        out.u16(messages + attributes.len() as u16);
        out.u32(1); // reference count
        out.u64(0); // size (patched) and padding
        Ok(at)
    }

    fn close_header(&mut self, at: usize, attributes: &[Attribute]) -> Result<()> {
        for (name, value) in attributes {
            let heaps = &mut self.heaps;
            message::put_attribute(&mut self.bytes, name, value, |out, string| heaps.put_reference(out, string))?;
        }
        let size = (self.bytes.len() - at - 16) as u32;
        self.patch(at + 8, &size.to_le_bytes());
        Ok(())
    }

    /// Writes the global heaps, and into the references where they are.
    fn place_heaps(&mut self) {
        self.heaps.close();
        for (heap, references) in std::mem::take(&mut self.heaps.closed) {
            let address = self.bytes.len() as u64;
            self.bytes.put(&heap);
            for at in references {
                self.patch(at, &address.to_le_bytes());
            }
        }
    }
}

/// Global heap collections (§III.E), each with the places that refer to it.
#[derive(Default)]
struct Heaps {
    open: Vec<u8>,
    objects: u16, // in the open one
    references: Vec<usize>,
    closed: Vec<(Vec<u8>, Vec<usize>)>,
}

impl Heaps {
    /// Keeps a string, and puts a reference to it.
    fn put_reference(&mut self, out: &mut Vec<u8>, string: &[u8]) {
        let object = self.add(string);
        self.references.push(message::put_string_reference(out, string.len(), object));
    }

    /// Puts `value` into the open collection; its index there.
    fn add(&mut self, value: &[u8]) -> u16 {
        if self.open.len() + GLOBAL_HEAP_HEAD + HEAP_OBJECT_HEAD + value.len() > HEAP_COLLECTION {
            self.close();
        }
        let heap = &mut self.open;
        if heap.is_empty() {
            heap.put(&GLOBAL_HEAP);
            heap.u32(1); // version
            heap.u64(0); // size (patched)
            self.objects = 0;
        }
        self.objects += 1;
        heap.u16(self.objects);
        heap.put(&[0; 6]);
        heap.u64(value.len() as u64);
        heap.put(value);
        heap.pad(8);
        self.objects
    }

    fn close(&mut self) {
        if self.open.is_empty() {
            return;
        }
        let mut heap = std::mem::take(&mut self.open);
        let used = heap.len();
        let size = (used + HEAP_OBJECT_HEAD).max(4096);
        heap.u64(0); // object 0: the free space
        heap.u64((size - used) as u64);
        heap.resize(size, 0);
        heap[8..16].copy_from_slice(&(size as u64).to_le_bytes());
        self.closed.push((heap, std::mem::take(&mut self.references)));
    }
}
