//! The messages of an object header (§IV.A.2), read and written: the one place that knows what is where in them.

use super::fields::{Append, Fields};
use super::{UNDEFINED, malformed, unsupported};
use crate::dtype::{Class, DType};
use crate::error::{Error, Kind, Result};
use crate::image::Storage;
use crate::image::hdf5::element::{Element, UNREADABLE};
use crate::image::hdf5::{check_link, refused};
use crate::limits;
use crate::tree::Value;

/// What the messages are.
pub(super) const DATASPACE: u16 = 0x01;
pub(super) const LINK_INFO: u16 = 0x02;
pub(super) const DATATYPE: u16 = 0x03;
pub(super) const OLD_FILL_VALUE: u16 = 0x04;
pub(super) const FILL_VALUE: u16 = 0x05;
pub(super) const LINK: u16 = 0x06;
pub(super) const EXTERNAL_FILES: u16 = 0x07;
pub(super) const LAYOUT: u16 = 0x08;
pub(super) const FILTERS: u16 = 0x0b;
pub(super) const ATTRIBUTE: u16 = 0x0c;
pub(super) const CONTINUATION: u16 = 0x10;
pub(super) const SYMBOL_TABLE: u16 = 0x11;
pub(super) const ATTRIBUTE_INFO: u16 = 0x15;
pub(super) const REFERENCE_COUNT: u16 = 0x16;
/// Known, and of no meaning for who reads values: nothing, group info, comment, times, tables of shared messages, B-tree
/// sizes, driver, free space, cache.
pub(super) const PASSED_OVER: [u16; 10] = [0x00, 0x0a, 0x0d, 0x0e, 0x0f, 0x12, 0x13, 0x14, 0x17, 0x18];

/// Starts a message of a version 1 header (§IV.A.1.a) with `size` bytes of data.
#[inline]
pub(super) fn put_head(out: &mut Vec<u8>, kind: u16, size: usize, flags: u8) -> Result<()> {
    let Ok(bytes) = u16::try_from(size) else {
        return Err(Error::new(Kind::Invalid, "an object header message is too large")
            .with_found(format_args!("at most {} bytes", limits::MAX_MESSAGE_BYTES), size));
    };
    out.u16(kind);
    out.u16(bytes);
    out.put(&[flags, 0, 0, 0]);
    Ok(())
}

// ---- dataspace (§IV.A.2.b) ----

/// The dimensions; `None` for a null dataspace.
#[inline]
pub(super) fn dataspace(data: Fields<'_>) -> Result<Option<Vec<u64>>> {
    let version = data.u8(0)?;
    if version == 2 && data.u8(3)? == 2 {
        return Ok(None);
    }
    let rank = usize::from(data.u8(1)?);
    let at = match version {
        1 => 8,
        2 => 4,
        _ => return Err(unsupported("dataspaces of this version")),
    };
    if rank > limits::MAX_RANK {
        return Err(malformed("a tensor has too many dimensions"));
    }
    (0..rank).map(|i| data.u64(at + 8 * i)).collect::<Result<_>>().map(Some)
}

/// Of a dataset, which has maximum dimensions as well, as h5py writes it.
pub(super) fn put_dataspace(out: &mut Vec<u8>, shape: &[u64]) -> Result<()> {
    put_head(out, DATASPACE, 8 + 16 * shape.len(), 0)?;
    put_dimensions(out, shape);
    Ok(())
}

fn put_dimensions(out: &mut Vec<u8>, shape: &[u64]) {
    let rank = shape.len();
    out.put(&[1, rank as u8, u8::from(rank > 0), 0, 0, 0, 0, 0]); // flag: maximum dimensions follow
    for &n in shape.iter().chain(shape) {
        out.u64(n);
    }
}

// ---- datatype (§IV.A.2.d) ----

/// The numbers of its classes.
mod class {
    pub(super) const INTEGER: u8 = 0;
    pub(super) const FLOAT: u8 = 1;
    pub(super) const STRING: u8 = 3;
    pub(super) const OPAQUE: u8 = 5;
    pub(super) const COMPOUND: u8 = 6;
    pub(super) const ENUMERATION: u8 = 8;
    pub(super) const VARIABLE: u8 = 9;
    /// The first byte in version 1.
    pub(super) const fn byte(class: u8) -> u8 {
        0x10 | class
    }
}

/// Bytes of a datatype that is a string of fixed length, or an integer, a float or a variable-length string.
const STRING_BYTES: usize = 8;
const INTEGER_BYTES: usize = 12;
const FLOAT_BYTES: usize = 20;
const VARIABLE_BYTES: usize = 20;
/// The flags of a float: its sign's place, that the first bit of the mantissa is implied, little-endian.
const IMPLIED: u8 = 2;
/// A name in a compound or an enumeration of version 1 or 2, with its NUL: a multiple of 8. Shorter ones fit one.
const NAME_BYTES: usize = 8;

/// What elements are; the error is the name of what no engine reads.
pub(super) type Type = std::result::Result<Element, &'static str>;

/// What the dtype table knows, and names for the rest.
pub(super) fn datatype(data: Fields<'_>) -> Result<Type> {
    let (version, class, bits) = (data.u8(0)? >> 4, data.u8(0)? & 15, data.u8(1)?);
    let size = data.u32(4)? as usize;
    let big_endian = bits & 1 != 0;
    if !(1..=5).contains(&version) {
        return Err(unsupported("datatypes of this version"));
    }
    let name = UNREADABLE.get(usize::from(class)).copied().unwrap_or_default();
    Ok(match class {
        class::INTEGER => {
            let whole = data.u16(8)? == 0 && usize::from(data.u16(10)?) == size * 8;
            Element::integer(size, bits & 8 != 0, big_endian).filter(|_| whole).ok_or(name)
        }
        class::FLOAT if bits & 0x40 != 0 => Err("VAX numbers"),
        class::FLOAT if usize::from(data.u8(2)?) + 1 != size * 8 || bits >> 4 & 3 != IMPLIED => Err(name),
        class::FLOAT => float(data.from(8)?, size, big_endian)?.ok_or(name),
        class::OPAQUE => match u16::try_from(size) {
            Ok(n @ 1..) => Ok(Element::native(DType::Opaque(n))),
            _ => Err(name),
        },
        class::COMPOUND => match complex(data, size) {
            Some(element) => Ok(element),
            // It may be a pair of big-endian numbers.
            None if data.u16(1)? == 2 && data.bytes(8, 2)? == *b"r\0" => {
                return Err(unsupported("this pair of numbers"));
            }
            None => Err(name),
        },
        class::ENUMERATION if size == 1 && is_boolean(data) => Ok(Element::native(DType::Bool)),
        // It may be written in another way.
        class::ENUMERATION if size == 1 && data.u16(1)? == 2 => return Err(unsupported("this enumeration")),
        class::VARIABLE if bits & 15 == 1 => Err(UNREADABLE[usize::from(class::STRING)]),
        _ if name.is_empty() => return Err(unsupported("this datatype")),
        _ => Err(name),
    })
}

/// Float properties: offset, precision, exponent and mantissa location and size, bias.
fn float(f: Fields<'_>, size: usize, big_endian: bool) -> Result<Option<Element>> {
    let precision_ok = (f.u16(0)?, usize::from(f.u16(2)?)) == (0, size * 8);
    let (exponent_at, exponent, mantissa_at, mantissa) = (f.u8(4)?, f.u8(5)?, f.u8(6)?, f.u8(7)?);
    let bias = f.u32(8)?;
    if !precision_ok || mantissa_at != 0 || exponent_at != mantissa {
        return Ok(None);
    }
    Ok(Element::float(size, exponent, mantissa, bias, big_endian))
}

/// h5py's `{r, i}` compound of two equal little-endian floats.
fn complex(data: Fields<'_>, size: usize) -> Option<Element> {
    let version = data.u8(0).ok()? >> 4;
    if data.u16(1).ok()? != 2 {
        return None;
    }
    let mut at = 8;
    let mut parts = Vec::new();
    for (name, position) in [(b'r', 0), (b'i', size / 2)] {
        if data.bytes(at, 2).ok()? != [name, 0] {
            return None;
        }
        at += if version < 3 { NAME_BYTES } else { 2 };
        // Version 3 packs the member's offset into as few bytes as its size needs.
        let width = if version < 3 { 4 } else { 1 };
        if data.uint(at, width).ok()? != position as u64 {
            return None;
        }
        at += width + if version == 1 { NO_DIMENSIONS.len() } else { 0 };
        let member = data.from(at).ok()?;
        match datatype(Fields(member.bytes(0, FLOAT_BYTES).ok()?)).ok()? {
            Ok(part) if part.swap == 1 && !part.bfloat16 && matches!(part.dtype.class(), Class::Float(..)) => {
                parts.push(part);
            }
            _ => return None,
        }
        at += FLOAT_BYTES;
    }
    if parts[0] == parts[1] { Element::complex(parts[0], size) } else { None }
}

/// What version 1 says of a member's dimensions.
const NO_DIMENSIONS: [u8; 28] = [0; 28];

/// h5py's boolean: the members of an enumeration over one byte, in versions up to 2 and later.
const BOOLEAN: &[u8] = b"FALSE\0\0\0TRUE\0\0\0\0\x00\x01";
const BOOLEAN_3: &[u8] = b"FALSE\0TRUE\0\x00\x01";

fn is_boolean(data: Fields<'_>) -> bool {
    let version = data.u8(0).unwrap_or(0) >> 4;
    let members = if version < 3 { BOOLEAN } else { BOOLEAN_3 };
    let at = 8 + INTEGER_BYTES;
    data.u16(1).is_ok_and(|n| n == 2) && data.bytes(at, members.len()).is_ok_and(|b| b == members)
}

/// As HDF5 encodes h5py's types; the whole is padded to 8 bytes.
pub(super) fn put_datatype(out: &mut Vec<u8>, dtype: DType) -> Result<()> {
    let class = dtype.class();
    let data = match class {
        Class::Integer { .. } => INTEGER_BYTES,
        Class::Float(..) => FLOAT_BYTES,
        Class::Boolean => 8 + INTEGER_BYTES + BOOLEAN.len(),
        Class::Complex(_) => 8 + 2 * (NAME_BYTES + 4 + NO_DIMENSIONS.len() + FLOAT_BYTES),
        Class::Opaque => 8,
    };
    put_head(out, DATATYPE, data.next_multiple_of(8), 1)?;
    let size = dtype.size();
    match class {
        Class::Integer { signed } => {
            put_integer(out, size, signed);
            out.u32(0);
        }
        Class::Float(exponent, mantissa, bias) => {
            put_float(out, size, exponent, mantissa, bias);
            out.u32(0);
        }
        Class::Boolean => {
            out.put(&[class::byte(class::ENUMERATION), 2, 0, 0, 1, 0, 0, 0]); // of two members, over …
            put_integer(out, 1, true);
            out.put(BOOLEAN);
            out.put(&[0; 2]);
        }
        Class::Complex(part) => {
            out.put(&[class::byte(class::COMPOUND), 2, 0, 0]); // of two members
            out.u32(size as u32);
            let Class::Float(exponent, mantissa, bias) = part.class() else { unreachable!("parts are floats") };
            for (name, offset) in [(b'r', 0), (b'i', part.size())] {
                out.put(&[name, 0, 0, 0, 0, 0, 0, 0]);
                out.u32(offset as u32);
                out.put(&NO_DIMENSIONS);
                put_float(out, part.size(), exponent, mantissa, bias);
            }
        }
        Class::Opaque => {
            out.put(&[class::byte(class::OPAQUE), 0, 0, 0]); // no tag
            out.u32(size as u32);
        }
    }
    Ok(())
}

/// A little-endian integer.
fn put_integer(out: &mut Vec<u8>, size: usize, signed: bool) {
    out.put(&[class::byte(class::INTEGER), if signed { 8 } else { 0 }, 0, 0]);
    out.u32(size as u32);
    out.u16(0);
    out.u16(size as u16 * 8);
}

/// A little-endian IEEE float.
fn put_float(out: &mut Vec<u8>, size: usize, exponent: u8, mantissa: u8, bias: u32) {
    out.put(&[class::byte(class::FLOAT), IMPLIED << 4, size as u8 * 8 - 1, 0]);
    out.u32(size as u32);
    out.u16(0);
    out.u16(size as u16 * 8);
    out.put(&[mantissa, exponent, 0, mantissa]);
    out.u32(bias);
}

// ---- data layout (§IV.A.2.i) and fill value (§IV.A.2.f) ----

/// Where the values are, unless in chunks, and how many bytes are stored.
pub(super) fn layout(data: Fields<'_>) -> Result<(Option<Storage>, u64)> {
    match (data.u8(0)?, data.u8(1)?) {
        (3 | 4, 0) => {
            let n = usize::from(data.u16(2)?);
            Ok((Some(Storage::Compact(data.bytes(4, n)?.to_vec())), n as u64))
        }
        (3 | 4, 1) => {
            let offset = data.u64(2)?;
            Ok((Some(Storage::Contiguous(offset)), if offset == UNDEFINED { 0 } else { data.u64(10)? }))
        }
        (4, 3) => Err(refused("virtual Dataset")),
        (3..=5, _) => Ok((None, 0)),
        _ => Err(unsupported("layouts of this version")),
    }
}

/// Contiguous, `nbytes` from `offset`; where in `out` the offset is.
pub(super) fn put_layout(out: &mut Vec<u8>, offset: Option<u64>, nbytes: u64) -> Result<usize> {
    put_head(out, LAYOUT, 24, 0)?;
    out.put(&[3, 1]); // version 3, contiguous
    let at = out.len();
    out.u64(offset.unwrap_or(UNDEFINED));
    out.u64(nbytes);
    out.put(&[0; 6]);
    Ok(at)
}

/// Whether there is a fill value that is not the default.
pub(super) fn fill_value(data: Fields<'_>) -> Result<bool> {
    match data.u8(0)? {
        1 | 2 => Ok(data.u8(3)? != 0 && data.u32(4)? > 0),
        3 => Ok(data.u8(1)? & 0x20 != 0 && data.u32(2)? > 0),
        _ => Err(unsupported("fill values of this version")),
    }
}

/// The same of the older message.
pub(super) fn old_fill_value(data: Fields<'_>) -> Result<bool> {
    Ok(data.u32(0)? > 0)
}

/// The default one.
pub(super) fn put_fill_value(out: &mut Vec<u8>) -> Result<()> {
    put_head(out, FILL_VALUE, 8, 1)?;
    out.put(&[2, 2, 2, 1, 0, 0, 0, 0]); // version 2, late allocation, written if set, default value
    Ok(())
}

// ---- links (§IV.A.2.c, g, r) ----

/// A hard link's name and target.
pub(super) fn link(data: Fields<'_>) -> Result<(&[u8], u64)> {
    let flags = data.u8(1)?;
    let mut at = 2;
    if flags & 8 != 0 {
        check_link(data.u8(at)?.into())?;
        at += 1;
    }
    at += if flags & 4 == 0 { 0 } else { 8 } + usize::from(flags & 16 != 0);
    let width = 1 << (flags & 3);
    let n = data.uint(at, width)? as usize;
    at += width;
    Ok((data.bytes(at, n)?, data.u64(at.saturating_add(n))?))
}

/// Leaves a group whose links are in a heap of their own, instead of its header, to the other engine.
pub(super) fn check_link_info(data: Fields<'_>) -> Result<()> {
    let at = if data.u8(1)? & 1 == 0 { 2 } else { 10 };
    if data.u64(at)? == UNDEFINED { Ok(()) } else { Err(unsupported("dense groups")) }
}

/// Where a group's B-tree and local heap are.
pub(super) fn symbol_table(data: Fields<'_>) -> Result<(u64, u64)> {
    Ok((data.u64(0)?, data.u64(8)?))
}

pub(super) fn put_symbol_table(out: &mut Vec<u8>, btree: u64, heap: u64) -> Result<()> {
    put_head(out, SYMBOL_TABLE, 16, 0)?;
    out.u64(btree);
    out.u64(heap);
    Ok(())
}

// ---- attributes (§IV.A.2.m, v) ----

/// An attribute, its parts still as they are in the message.
pub(super) struct AttributeMessage<'a> {
    pub(super) name: String,
    datatype: Fields<'a>,
    dataspace: Fields<'a>,
    value: Fields<'a>,
}

/// The strings of an attribute.
pub(super) enum Strings<'a> {
    /// References of 16 bytes to strings in global heaps.
    Variable(std::slice::Chunks<'a, u8>),
    /// Of so many bytes each, padded with spaces or not.
    Fixed(&'a [u8], usize, bool),
}

/// `None` where the type or the dataspace is elsewhere.
pub(super) fn attribute(data: Fields<'_>) -> Result<Option<AttributeMessage<'_>>> {
    let version = data.u8(0)?;
    let (at, pad) = match version {
        1 => (8, 8),
        2 => (8, 1),
        3 => (9, 1),
        _ => return Err(unsupported("attributes of this version")),
    };
    let shared = version > 1 && data.u8(1)? & 3 != 0;
    let size = |at: usize| Ok::<_, Error>(usize::from(data.u16(at)?));
    let (name_size, type_size, space_size) = (size(2)?, size(4)?, size(6)?);
    let name = data.bytes(at, name_size)?;
    if shared {
        return Ok(None);
    }
    let name = String::from_utf8_lossy(name.strip_suffix(b"\0").unwrap_or(name)).into_owned();
    let type_at = at + name_size.next_multiple_of(pad);
    let space_at = type_at + type_size.next_multiple_of(pad);
    let (datatype, dataspace) = (Fields(data.bytes(type_at, type_size)?), Fields(data.bytes(space_at, space_size)?));
    let value = data.from(space_at + space_size.next_multiple_of(pad))?;
    Ok(Some(AttributeMessage { name, datatype, dataspace, value }))
}

impl<'a> AttributeMessage<'a> {
    pub(super) fn shape(&self) -> Result<Option<Vec<u64>>> {
        dataspace(self.dataspace)
    }

    /// Its `count` strings, if it has any; and whether they are UTF-8.
    pub(super) fn strings(&self, count: usize) -> Result<Option<(Strings<'a>, bool)>> {
        let (class, bits) = (self.datatype.u8(0)? & 15, self.datatype.u8(1)?);
        Ok(match (class, bits & 15) {
            (class::VARIABLE, 1) => {
                let all = self.value.bytes(0, count.saturating_mul(REFERENCE_BYTES))?; // before anything is allocated
                Some((Strings::Variable(all.chunks(REFERENCE_BYTES)), self.datatype.u8(2)? & 15 == 1))
            }
            (class::STRING, padding) => {
                let size = self.datatype.u32(4)? as usize;
                let all = self.value.bytes(0, count.saturating_mul(size))?;
                if size == 0 {
                    return Err(malformed("an attribute has strings of no length"));
                }
                Some((Strings::Fixed(all, size, padding == 2), bits >> 4 == 1))
            }
            _ => None,
        })
    }
}

/// Bytes of a reference to a string in a global heap.
const REFERENCE_BYTES: usize = 16;

/// What a reference says: bytes, and collection and object of the global heap.
pub(super) fn string_reference(reference: &[u8]) -> Result<(usize, (u64, u32))> {
    let f = Fields(reference);
    Ok((f.u32(0)? as usize, (f.u64(4)?, f.u32(12)?)))
}

/// Where in `out` the address of the collection, still to come, is.
pub(super) fn put_string_reference(out: &mut Vec<u8>, bytes: usize, object: u16) -> usize {
    out.u32(bytes as u32);
    let at = out.len();
    out.u64(0);
    out.u32(u32::from(object));
    at
}

/// An attribute as h5py writes it; `put_string` puts a reference to a variable-length string.
pub(super) fn put_attribute(
    out: &mut Vec<u8>,
    name: &str,
    value: &Value,
    mut put_string: impl FnMut(&mut Vec<u8>, &[u8]),
) -> Result<()> {
    let (type_size, shape): (usize, _) = match value {
        Value::Text(_) | Value::Bytes(_) => (VARIABLE_BYTES, None),
        Value::List(all) => (VARIABLE_BYTES, Some([all.len() as u64])),
        Value::Fixed(_, all) => (STRING_BYTES, Some([all.len() as u64])),
    };
    let shape = shape.as_ref().map_or(&[][..], |row| &row[..]);
    let padded = (name.len() + 1).next_multiple_of(8);
    let size = value.message_bytes(name);
    put_head(out, ATTRIBUTE, size, 0)?;
    let end = out.len() + size;
    out.put(&[1, 0]);
    out.u16(name.len() as u16 + 1);
    out.u16(type_size as u16);
    out.u16(8 + 16 * shape.len() as u16);
    let at = out.len();
    out.put(name.as_bytes());
    out.resize(at + padded, 0);
    match value {
        Value::List(all) if all.is_empty() => {
            put_float(out, 8, 11, 52, 1023); // NumPy's type of nothing
            out.u32(0);
        }
        Value::Fixed(length, _) => {
            out.put(&[class::byte(class::STRING), 1, 0, 0]); // padded with NUL, ASCII
            out.u32(*length as u32);
        }
        _ => {
            let utf8 = u8::from(matches!(value, Value::Text(_)));
            out.put(&[class::byte(class::VARIABLE), 1, utf8, 0, 16, 0, 0, 0]); // string, null terminated, of …
            put_integer(out, 1, false); // … bytes
            out.u32(0);
        }
    }
    put_dimensions(out, shape);
    match value {
        Value::Text(text) => put_string(out, text.as_bytes()),
        Value::Bytes(bytes) => put_string(out, bytes),
        Value::List(all) => all.iter().for_each(|s| put_string(out, s)),
        Value::Fixed(length, all) => {
            for s in all {
                let end = out.len() + length;
                out.put(s);
                out.resize(end, 0);
            }
        }
    }
    out.resize(end, 0);
    Ok(())
}

/// The same for attributes.
pub(super) fn check_attribute_info(data: Fields<'_>) -> Result<()> {
    let at = if data.u8(1)? & 1 == 0 { 2 } else { 4 };
    if data.u64(at)? == UNDEFINED { Ok(()) } else { Err(unsupported("dense attributes")) }
}

// ---- of the header itself ----

/// Where a header goes on (§IV.A.2.q), and how many bytes of it are there.
pub(super) fn continuation(data: Fields<'_>) -> Result<(u64, u64)> {
    Ok((data.u64(0)?, data.u64(8)?))
}

/// How many names lead to the object (§IV.A.2.w).
pub(super) fn reference_count(data: Fields<'_>) -> Result<u32> {
    data.u32(1)
}
