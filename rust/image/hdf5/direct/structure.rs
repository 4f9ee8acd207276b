//! The structures around object headers: superblock, B-trees and symbol nodes of groups, heaps of names and strings.
//!
//! They are read here, and written by `layout.rs` with the same words.

use std::collections::{HashMap, hash_map::Entry};

use super::fields::Fields;
use super::lookup3::check_sum;
use super::pages::{PAGE, Pages};
use super::{SIGNATURE, malformed, unsupported};
use crate::error::{Error, Kind, Result, try_push};
use crate::image::hdf5::{ALLOCATION, Budget, link_name, refused};
use crate::io::ReadAt;
use crate::limits;

/// What the structures begin with.
pub(super) const BTREE: [u8; 4] = *b"TREE";
pub(super) const SYMBOL_NODE: [u8; 4] = *b"SNOD";
pub(super) const LOCAL_HEAP: [u8; 4] = *b"HEAP";
pub(super) const GLOBAL_HEAP: [u8; 4] = *b"GCOL";

/// Bytes before the entries of each.
pub(super) const BTREE_HEAD: usize = 24;
pub(super) const SYMBOL_NODE_HEAD: usize = 8;
pub(super) const LOCAL_HEAP_HEAD: usize = 32;
pub(super) const GLOBAL_HEAP_HEAD: usize = 16;
/// Bytes of an entry: a key and a child, a symbol, and of an object of a global heap without its value.
pub(super) const BTREE_ENTRY: usize = 16;
pub(super) const SYMBOL: usize = 40;
pub(super) const HEAP_OBJECT_HEAD: usize = 16;

/// Where the superblock of version 0 (§II.A) has the end of the file and the root's symbol.
pub(super) const END_OF_FILE_AT: usize = 40;
pub(super) const ROOT_AT: usize = 56;
pub(super) const SUPERBLOCK: usize = ROOT_AT + SYMBOL;
/// Where a symbol (§III.C) has the address of the object header, the kind of what is cached of it, and that.
pub(super) const SYMBOL_HEADER_AT: usize = 8;
pub(super) const SYMBOL_CACHE_AT: usize = 16;
pub(super) const SYMBOL_SCRATCH_AT: usize = 24;
/// What is cached: a group's B-tree and heap, or where a soft link leads.
pub(super) const CACHED_GROUP: u32 = 1;
const CACHED_SOFT_LINK: u32 = 2;

/// What one object of a global heap takes in a table that is half empty.
const HEAP_OBJECT_MEMORY: usize = 64;
/// Bytes of metadata read in one go where it comes first, as `layout.rs` has it.
const MAX_PREFIX: u64 = 64 << 20;

/// Superblock (§II): the address of the root group's object header.
pub(super) fn open(image: &dyn ReadAt) -> Result<(u64, Pages<'_>)> {
    let mut pages = Pages::new(image);
    let head = pages.get(0, 48.min(image.len() as usize))?.into_owned();
    let f = Fields(&head);
    debug_assert!(head.starts_with(&SIGNATURE));
    let (sizes, addresses, root) = match f.u8(8)? {
        0 => (13, 24, ROOT_AT + SYMBOL_HEADER_AT),
        1 => (13, 28, ROOT_AT + SYMBOL_HEADER_AT + 4),
        2 | 3 => (9, 12, 36),
        _ => return Err(unsupported("superblocks of this version")),
    };
    if (f.u8(sizes)?, f.u8(sizes + 1)?) != (8, 8) {
        return Err(unsupported("offsets and lengths of other than 8 bytes"));
    }
    let fixed = pages.get(0, root + 8)?.into_owned();
    let f = Fields(&fixed);
    let (base, end) = match root {
        36 => (f.u64(addresses)?, f.u64(28)?),
        _ => (f.u64(addresses)?, f.u64(addresses + 16)?),
    };
    // The base address is where the HDF5 starts, or started before a user block was put before it or taken away, and
    // the end counts from where the file starts; all other addresses count from the base.
    let end = end.checked_sub(base).ok_or_else(|| malformed("the file ends before it starts"))?;
    if end > image.len() {
        return Err(Error::new(Kind::Image, "the HDF5 file is truncated")
            .with_found(format_args!("{end} bytes"), format_args!("{} bytes", image.len()))
            .with_advice("It was cut short or is still being written; copy or save it again."));
    }
    if root == 36 {
        let whole = pages.get(0, 48)?.into_owned();
        check_sum(&whole, "superblock")?;
    }
    let root = f.u64(root)?;
    // `layout.rs` keeps all metadata before the payload and ends it with the root group and the heaps.
    if root > PAGE && root < MAX_PREFIX {
        pages.prefix(root + (64 << 10))?;
    }
    Ok((root, pages))
}

/// Symbol table (§III): names and object header addresses of a group's members.
pub(super) fn symbols(
    pages: &Pages<'_>,
    budget: &mut Budget,
    (btree, heap): (u64, u64),
    out: &mut Vec<(String, u64)>,
) -> Result<()> {
    let head = pages.get(heap, LOCAL_HEAP_HEAD)?;
    let f = Fields(&head);
    f.signature(0, LOCAL_HEAP)?;
    let (size, data) = (f.u64(8)?, f.u64(24)?);
    if size > limits::MAX_HEADER_BYTES {
        return Err(Error::new(Kind::Limit, "a group's names are too large"));
    }
    let names = pages.get(data, size as usize)?;
    let mut nodes = Vec::new();
    symbol_nodes(pages, btree, None, &mut nodes)?;
    budget.spend(nodes.len() * 2 * size_of::<u64>())?;
    for node in nodes {
        let head = pages.get(node, SYMBOL_NODE_HEAD)?;
        Fields(&head).signature(0, SYMBOL_NODE)?;
        let count = usize::from(Fields(&head).u16(6)?);
        let entries = pages.get(node.saturating_add(SYMBOL_NODE_HEAD as u64), count * SYMBOL)?;
        for entry in entries.chunks_exact(SYMBOL) {
            let f = Fields(entry);
            if f.u32(SYMBOL_CACHE_AT)? == CACHED_SOFT_LINK {
                return Err(refused("SoftLink"));
            }
            let name = usize::try_from(f.u64(0)?).ok().and_then(|at| names.get(at..));
            let name = name.ok_or_else(|| malformed("a name lies outside its heap"))?;
            let longest = &name[..name.len().min(limits::MAX_PATH_BYTES + 1)]; // the heap may be one long name
            let end = longest.iter().position(|&b| b == 0).ok_or_else(|| {
                let too_long = || Error::new(Kind::Limit, "a name is too long");
                if longest.len() == name.len() { malformed("a name has no end") } else { too_long() }
            })?;
            keep_link(budget, &name[..end], f.u64(SYMBOL_HEADER_AT)?, out)?;
        }
    }
    Ok(())
}

/// Keeps a link; each copy of a name that is in the file once is counted.
pub(super) fn keep_link(budget: &mut Budget, name: &[u8], address: u64, out: &mut Vec<(String, u64)>) -> Result<()> {
    budget.spend(2 * size_of::<(String, u64)>() + ALLOCATION + name.len())?;
    try_push(out, (link_name(name)?.to_owned(), address))
}

/// Version 1 group B-tree (§III.A.1): addresses of its symbol nodes, ascending by name.
fn symbol_nodes(pages: &Pages<'_>, address: u64, expected: Option<u8>, out: &mut Vec<u64>) -> Result<()> {
    let head = pages.get(address, BTREE_HEAD)?;
    let f = Fields(&head);
    f.signature(0, BTREE)?;
    let (level, count) = (f.u8(5)?, usize::from(f.u16(6)?));
    // Levels fall by one towards the leaves, so a cycle cannot go on.
    if f.u8(4)? != 0 || level > limits::MAX_BTREE_LEVELS || expected.is_some_and(|e| e != level) {
        return Err(malformed("a B-tree node is of the wrong type or level"));
    }
    let body = pages.get(address + BTREE_HEAD as u64, count * BTREE_ENTRY + 8)?;
    for i in 0..count {
        let child = Fields(&body).u64(i * BTREE_ENTRY + 8)?;
        if out.len() > limits::MAX_OBJECTS {
            return Err(Error::new(Kind::Limit, "too many members in a group"));
        }
        match level {
            0 => out.push(child),
            _ => symbol_nodes(pages, child, Some(level - 1), out)?,
        }
    }
    Ok(())
}

/// The global heap collections (§III.E) that were read: collection → object → (offset, length).
#[derive(Default)]
pub(super) struct GlobalHeaps(HashMap<u64, HashMap<u16, (u64, u64)>>);

impl GlobalHeaps {
    /// The first `n` bytes of an object.
    pub(super) fn object(
        &mut self,
        pages: &Pages<'_>,
        budget: &mut Budget,
        (collection, object): (u64, u32),
        n: usize,
    ) -> Result<Vec<u8>> {
        let objects = match self.0.entry(collection) {
            Entry::Occupied(e) => e.into_mut(),
            Entry::Vacant(e) => e.insert(heap_objects(pages, budget, collection)?),
        };
        let object = u16::try_from(object).ok().and_then(|i| objects.get(&i)).copied();
        match object {
            Some((at, length)) if n as u64 <= length => Ok(pages.get(at, n)?.into_owned()),
            _ => Err(malformed("a string is not in its heap")),
        }
    }
}

/// Where the objects of a collection are.
fn heap_objects(pages: &Pages<'_>, budget: &mut Budget, collection: u64) -> Result<HashMap<u16, (u64, u64)>> {
    let head = pages.get(collection, GLOBAL_HEAP_HEAD)?;
    Fields(&head).signature(0, GLOBAL_HEAP)?;
    let size = Fields(&head).u64(8)?;
    if size > limits::MAX_HEADER_BYTES {
        return Err(Error::new(Kind::Limit, "a heap of strings is too large"));
    }
    let bytes = pages.get(collection, size as usize)?;
    let mut objects = HashMap::new();
    let mut at = GLOBAL_HEAP_HEAD;
    budget.spend(4 * size_of::<(u64, HashMap<u16, (u64, u64)>)>())?;
    while at + HEAP_OBJECT_HEAD <= bytes.len() {
        let f = Fields(&bytes[at..]);
        let (index, length) = (f.u16(0)?, f.u64(8)?);
        let left = (bytes.len() - at - HEAP_OBJECT_HEAD) as u64;
        if index == 0 {
            break; // the free space
        }
        if length > left {
            return Err(malformed("a string lies outside its heap"));
        }
        budget.spend(HEAP_OBJECT_MEMORY)?;
        objects.insert(index, (collection + (at + HEAP_OBJECT_HEAD) as u64, length));
        at += HEAP_OBJECT_HEAD + (length as usize).next_multiple_of(8);
    }
    Ok(objects)
}
