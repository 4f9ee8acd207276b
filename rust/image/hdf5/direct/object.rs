//! Image → every group and dataset: the walk over the objects, and their headers.
//!
//! Reads superblock versions 0 to 3, object headers 1 and 2, symbol-table and compact groups, contiguous and compact
//! datasets. Other legal HDF5 is `Unsupported`, which sends the caller to the libhdf5 engine; links that leave the
//! file and external storage are `Unsafe`.

use std::collections::{HashMap, HashSet};

use super::fields::Fields;
use super::lookup3::check_sum;
use super::message::{self, Strings, Type};
use super::pages::Pages;
use super::structure::{self, GlobalHeaps, keep_link};
use super::{UNDEFINED, malformed, unsupported};
use crate::error::{Error, Kind, Result, try_with_capacity};
use crate::image::hdf5::element::NO_VALUES;
use crate::image::hdf5::{
    Budget, Subtree, behind_user_block, check_names, check_path, cycle, refused, string_count, string_value,
    tag_bfloat16, too_deep, unpadded,
};
use crate::image::{Found, Index, Storage};
use crate::io::ReadAt;
use crate::limits;
use crate::tree::{Attribute, Value};

pub(super) fn index(image: &dyn ReadAt) -> Result<Index> {
    behind_user_block(image, |image, base| {
        let (root, pages) = structure::open(image)?;
        let mut walk = Walk::new(&pages);
        walk.object(root)?;
        walk.found.finish(base)
    })
}

/// The attributes in the object header at `address`, for an engine that cannot read them within a budget.
#[cfg(feature = "libhdf5")]
pub(in crate::image::hdf5) fn attributes(image: &dyn ReadAt, address: u64, budget: Budget) -> Result<Vec<Attribute>> {
    let pages = Pages::new(image);
    let mut walk = Walk { budget, attributes_only: true, ..Walk::new(&pages) };
    Ok(walk.header(address)?.attributes)
}

/// What the messages of one object header say.
#[derive(Default)]
#[allow(clippy::struct_excessive_bools)] // each is what one message says
struct Header {
    has_several_names: bool, // as the file says
    symbol_table: Option<(u64, u64)>,
    links: Vec<(String, u64)>,
    is_group: bool,
    shape: Option<Vec<u64>>,
    datatype: Option<Type>,
    null: bool,                              // a dataspace without elements
    storage: Option<(Option<Storage>, u64)>, // none: only the other engine reads it; and the bytes stored
    filtered: bool,
    filled: bool, // with a value of its own where nothing was written
    attributes: Vec<Attribute>,
}

struct Walk<'a> {
    pages: &'a Pages<'a>,
    found: Index,
    above: Vec<u64>,              // the groups on the way here
    known: HashMap<u64, Subtree>, // objects that are said to have several names
    heaps: GlobalHeaps,
    path: String,
    budget: Budget,
    attributes_only: bool,
}

impl<'a> Walk<'a> {
    fn new(pages: &'a Pages<'a>) -> Self {
        Self {
            pages,
            found: Index::default(),
            above: Vec::new(),
            known: HashMap::new(),
            heaps: GlobalHeaps::default(),
            path: String::new(),
            budget: Budget::new(pages.image.len()),
            attributes_only: false,
        }
    }

    /// Reads the object at `address` and everything below it; `self.path` is its path.
    fn object(&mut self, address: u64) -> Result<()> {
        if let Some(known) = self.known.get(&address) {
            let again = self.found.list_again(known, &self.path, &mut self.budget);
            return again.map_err(|e| e.with_entry(&self.path));
        }
        let before = self.found.sizes();
        let mut header = self.header(address).map_err(|e| e.with_entry(&self.path))?;
        let has_several_names = header.has_several_names;
        if header.is_group {
            self.group(address, header)?;
        } else if header.datatype.is_some() && header.shape.is_none() && header.storage.is_none() {
            return Ok(()); // a type with a name, for datasets to share
        } else {
            header.attributes.shrink_to_fit();
            let found = self.dataset(address, header).map_err(|e| e.with_entry(&self.path))?;
            self.found.add_dataset(found, &mut self.budget).map_err(|e| e.with_entry(&self.path))?;
        }
        if has_several_names {
            self.budget.spend(2 * size_of::<(u64, Subtree)>())?;
            self.known.insert(address, self.found.subtree(self.path.len(), before));
        }
        Ok(())
    }

    fn group(&mut self, address: u64, header: Header) -> Result<()> {
        if self.above.contains(&address) {
            return Err(cycle().with_entry(&self.path));
        }
        if self.above.len() > limits::MAX_DEPTH {
            return Err(too_deep(&self.path));
        }
        if self.path.is_empty() {
            self.found.attributes = header.attributes;
        } else {
            let added = self.found.add_group(self.path.clone(), header.attributes, &mut self.budget);
            added.map_err(|e| e.with_entry(&self.path))?;
        }
        let mut links = header.links;
        match header.symbol_table {
            Some(table) => {
                let listed = structure::symbols(self.pages, &mut self.budget, table, &mut links);
                listed.map_err(|e| e.with_entry(&self.path))?;
            }
            None => links.sort_unstable(), // these come in order of creation
        }
        check_names(links.iter().map(|l| l.0.as_bytes())).map_err(|e| e.with_entry(&self.path))?;
        self.above.push(address);
        for (name, address) in links {
            let length = self.path.len();
            if !self.path.is_empty() {
                self.path.push('/');
            }
            self.path.push_str(&name);
            self.pages.spend(self.path.len() / 16)?; // a long one is in the file once, and here for all below it
            check_path(&self.path).map_err(|e| e.with_entry(&self.path[..length]))?;
            self.object(address)?;
            self.path.truncate(length);
        }
        self.above.pop();
        Ok(())
    }

    fn dataset(&self, object: u64, header: Header) -> Result<Found> {
        let (Some(shape), Some(datatype), Some((storage, stored))) = (header.shape, header.datatype, header.storage)
        else {
            return Err(malformed("a dataset lacks its shape, type or layout"));
        };
        let path = self.path.clone();
        let mut attributes = header.attributes;
        let element = match datatype {
            _ if header.null => Err(NO_VALUES),
            other => other,
        };
        let element = match element {
            Ok(element) => element,
            Err(reason) => return Ok(Found::unreadable(path, shape, reason.into(), attributes, object)),
        };
        let storage = storage.ok_or_else(|| unsupported("chunked datasets"))?;
        if header.filtered {
            return Err(unsupported("filtered datasets"));
        }
        if element.swap > 1 {
            return Err(unsupported("big-endian numbers"));
        }
        let dtype = element.dtype;
        let nbytes = dtype.nbytes(&shape).ok_or_else(|| malformed("a dataset's size overflows"))?;
        limits::check_dataset(nbytes, stored)?;
        let storage = match storage {
            _ if nbytes == 0 => Storage::Empty,
            Storage::Contiguous(UNDEFINED) if header.filled => return Err(unsupported("fill values")),
            Storage::Contiguous(UNDEFINED) => Storage::Empty,
            Storage::Contiguous(offset) => {
                let end = offset.checked_add(nbytes).filter(|&end| end <= self.pages.image.len());
                if end.is_none() || stored < nbytes {
                    return Err(malformed("a dataset lies outside the file")
                        .with_found(format_args!("{nbytes} bytes"), format_args!("{stored} stored at {offset}")));
                }
                Storage::Contiguous(offset)
            }
            Storage::Compact(bytes) if bytes.len() as u64 == nbytes => Storage::Compact(bytes),
            _ => return Err(malformed("a compact dataset's size does not match its shape")),
        };
        if element.bfloat16 {
            tag_bfloat16(&mut attributes);
        }
        Ok(Found { path, dtype, shape, nbytes, storage, attributes, object })
    }

    /// All messages of the object header at `address` (§IV.A.1).
    fn header(&mut self, address: u64) -> Result<Header> {
        let pages = self.pages;
        let prefix = pages.get(address, 16)?;
        let f = Fields(&prefix);
        let v2 = prefix.starts_with(b"OHDR");
        let mut message_head = 8; // bytes before a message's data
        let mut header = Header::default();
        let first = if v2 {
            let flags = f.u8(5)?;
            message_head = if flags & 4 == 0 { 4 } else { 6 };
            let optional = if flags & 0x20 == 0 { 0 } else { 16 } + if flags & 0x10 == 0 { 0 } else { 4 };
            let (at, width) = (6 + optional, 1 << (flags & 3));
            let size = Fields(&self.pages.get(address, at + width)?).uint(at, width)?;
            let start = (at + width) as u64;
            let whole = size.checked_add(start + 4).filter(|&n| n <= limits::MAX_HEADER_BYTES);
            let whole = whole.ok_or_else(|| malformed("an object header is too large"))?;
            check_sum(&self.pages.get(address, whole as usize)?, "object header")?;
            (address.saturating_add(start), size)
        } else {
            if f.u8(0)? != 1 {
                return Err(malformed("an object header is of an unknown version"));
            }
            header.has_several_names = f.u32(4)? > 1;
            (address.saturating_add(16), u64::from(f.u32(8)?))
        };
        let mut chunks = vec![first];
        let mut seen = HashSet::new();
        let mut next = 0;
        let mut total = 0;
        while let Some(&(start, size)) = chunks.get(next) {
            next += 1;
            total += size.min(limits::MAX_HEADER_BYTES);
            if chunks.len() > limits::MAX_CONTINUATIONS || total > limits::MAX_HEADER_BYTES {
                return Err(Error::new(Kind::Limit, "an object header is too large"));
            }
            // Most headers are one chunk, which costs no memory here.
            if chunks.len() > 1 && !seen.insert((start, size)) {
                return Err(malformed("an object header continues into itself"));
            }
            let chunk = pages.get(start, size as usize)?;
            let mut at = 0;
            while at + message_head <= chunk.len() {
                let f = Fields(&chunk[at..]);
                let (kind, size, flags) = if v2 {
                    (u16::from(f.u8(0)?), usize::from(f.u16(1)?), f.u8(3)?)
                } else {
                    (f.u16(0)?, usize::from(f.u16(2)?), f.u8(4)?)
                };
                let data = Fields(f.bytes(message_head, size)?);
                at += message_head + size;
                if kind == message::CONTINUATION {
                    chunks.push(self.continuation(data, v2)?);
                } else {
                    self.message(kind, flags, data, &mut header)?;
                }
            }
        }
        Ok(header)
    }

    fn continuation(&self, data: Fields<'_>, v2: bool) -> Result<(u64, u64)> {
        let (start, size) = message::continuation(data)?;
        if !v2 {
            return Ok((start, size));
        }
        if !(8..=limits::MAX_HEADER_BYTES).contains(&size) {
            return Err(malformed("an object header continuation has an impossible size"));
        }
        let chunk = self.pages.get(start, size as usize)?;
        Fields(&chunk).signature(0, *b"OCHK")?;
        check_sum(&chunk, "object header continuation")?;
        Ok((start + 4, size - 8))
    }

    /// Takes what a message of the header says; `flags` are its own (§IV.A.1.b).
    fn message(&mut self, kind: u16, flags: u8, data: Fields<'_>, header: &mut Header) -> Result<()> {
        if self.attributes_only && !matches!(kind, message::ATTRIBUTE | message::ATTRIBUTE_INFO) {
            return Ok(());
        }
        let shared = flags & 2 != 0; // then the data says where the message is
        if shared && !message::PASSED_OVER.contains(&kind) {
            return Err(unsupported("shared header messages"));
        }
        let repeated = match kind {
            message::DATASPACE => header.shape.is_some(),
            message::DATATYPE => header.datatype.is_some(),
            message::LAYOUT => header.storage.is_some(),
            message::SYMBOL_TABLE => header.symbol_table.is_some(),
            _ => false,
        };
        if repeated {
            return Err(malformed("an object has two shapes, types, layouts or symbol tables"));
        }
        match kind {
            message::DATASPACE => {
                let shape = message::dataspace(data)?;
                header.null = shape.is_none();
                header.shape = Some(shape.unwrap_or_default());
            }
            message::DATATYPE => header.datatype = Some(message::datatype(data)?),
            message::LAYOUT => header.storage = Some(message::layout(data)?),
            message::OLD_FILL_VALUE => header.filled |= message::old_fill_value(data)?,
            message::FILL_VALUE => header.filled |= message::fill_value(data)?,
            message::FILTERS => header.filtered = true,
            message::EXTERNAL_FILES => return Err(refused("external Dataset")),
            message::LINK_INFO => {
                header.is_group = true;
                message::check_link_info(data)?;
            }
            message::LINK => {
                header.is_group = true;
                let (name, address) = message::link(data)?;
                keep_link(&mut self.budget, name, address, &mut header.links)?;
            }
            message::SYMBOL_TABLE => {
                header.is_group = true;
                header.symbol_table = Some(message::symbol_table(data)?);
            }
            message::ATTRIBUTE => header.attributes.extend(self.attribute(data)?),
            message::ATTRIBUTE_INFO => message::check_attribute_info(data)?,
            message::REFERENCE_COUNT => header.has_several_names = message::reference_count(data)? > 1,
            _ if flags & 0x80 != 0 && !message::PASSED_OVER.contains(&kind) => {
                return Err(unsupported("a header message that must be understood"));
            }
            _ => {}
        }
        Ok(())
    }

    /// An attribute of strings; others are of no interest.
    fn attribute(&mut self, data: Fields<'_>) -> Result<Option<Attribute>> {
        let Some(found) = message::attribute(data)? else {
            return if self.attributes_only { Ok(None) } else { Err(unsupported("attributes of a shared type")) };
        };
        let Some(shape) = found.shape()? else { return Ok(None) };
        self.budget.spend_attribute(found.name.len())?;
        let Some(count) = string_count(&shape) else { return Ok(None) };
        if count == 0 {
            return Ok(Some((found.name, Value::List(Vec::new()))));
        }
        let Some((all, utf8)) = found.strings(count)? else { return Ok(None) };
        let mut strings;
        let length = match all {
            Strings::Variable(references) => {
                strings = try_with_capacity(count)?;
                for reference in references {
                    strings.push(self.string(reference)?);
                }
                None
            }
            Strings::Fixed(all, size, spaces) => {
                self.budget.spend_value(count, all.len())?;
                strings = try_with_capacity(count)?;
                strings.extend(all.chunks(size).map(|s| unpadded(s, spaces)));
                Some(size)
            }
        };
        Ok(Some((found.name, string_value(strings, !shape.is_empty(), utf8, length))))
    }

    /// The string that a reference leads to.
    fn string(&mut self, reference: &[u8]) -> Result<Vec<u8>> {
        let (n, object) = message::string_reference(reference)?;
        self.budget.spend_value(1, n)?;
        let bytes = if n == 0 { Vec::new() } else { self.heaps.object(self.pages, &mut self.budget, object, n)? };
        Ok(unpadded(&bytes, false)) // C ends it at a NUL
    }
}
