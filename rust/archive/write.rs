//! Weights, JSON and assets → the archive around them.

use std::collections::HashSet;
use std::io::Read;
use std::path::PathBuf;

use super::{
    CENTRAL_HEADER, DATA_DESCRIPTOR, END, END_64, END_64_LOCATOR, LOCAL_HEADER, UTF8_FLAG, WEIGHTS, ZIP64_EXTRA,
    ZIP64_LIMIT, name as names,
};
use crate::error::{Context, Error, Kind, Result};
use crate::image::ALIGNMENT;
use crate::io::emit::{Sink, WRITE_BYTES};
use crate::limits;

/// Extra field of the padding that aligns the weights; the id is Android zipalign's.
const PADDING_EXTRA: u16 = 0xd935;
/// 1980-01-01, what zipfile gives members without a date.
const DOS_DATE: u16 = 0x21;
/// Offset of the CRC in a local header.
const CRC_AT: u64 = 14;
/// Offset of the two sizes.
const SIZES_AT: u64 = 18;
/// Flag bit 3: CRC and sizes follow the data (§4.4.4).
const STREAMED: u16 = 1 << 3;

/// What a member holds.
#[derive(Debug)]
pub enum Content {
    /// These bytes.
    Bytes(Vec<u8>),
    /// The content of a file that nobody changes meanwhile.
    File(PathBuf),
}

/// An archive that is being written to a sink, member after member.
#[derive(Debug, Default)]
pub struct Archive {
    base: u64,
    end: u64,
    streamed: bool,
    directory: Vec<u8>,
    count: u64,
    names: HashSet<String>,
    weights: Option<(u64, bool)>, // bytes as far as known, and whether the header has room for 64 bits
}

struct Member<'a> {
    name: &'a str,
    crc: u32,
    size: u64,
    offset: u64,
    flags: u16,
    mode: u32,
}

impl Archive {
    /// An archive that begins at offset `base` of its sink; offsets inside count from the sink's start, as zipfile's.
    pub fn new(base: u64, sink: &dyn Sink) -> Self {
        Self { base, end: base, streamed: !sink.can_patch(), ..Self::default() }
    }

    /// Writes the header of the weights; their payload of `size` bytes goes to the offset returned.
    ///
    /// # Errors
    /// Those of the sink.
    pub fn open_weights(&mut self, size: u64, sink: &mut dyn Sink) -> Result<u64> {
        let offset = self.end;
        let flags = if self.streamed { STREAMED } else { 0 };
        let mut extra = if size >= ZIP64_LIMIT { zip64_extra(&[size, size]) } else { Vec::new() };
        let used = offset + (30 + WEIGHTS.len() + extra.len() + 4) as u64;
        let payload = payload_offset(used);
        extra.extend(PADDING_EXTRA.to_le_bytes());
        extra.extend(((payload - used) as u16).to_le_bytes());
        extra.resize(extra.len() + (payload - used) as usize, 0);
        let member = Member { name: WEIGHTS, crc: 0, size, offset, flags, mode: 0o600 };
        sink.write_at(&local_header(&member, &extra), offset)?;
        self.weights = Some((size, size >= ZIP64_LIMIT));
        self.end = payload;
        Ok(payload)
    }

    /// Says how long the weights became, after `open_weights` with a size they do not exceed.
    ///
    /// # Errors
    /// Those of the sink; `Invalid` when they exceed it.
    ///
    /// # Panics
    /// When [`Archive::open_weights`] was not called before.
    pub fn resize_weights(&mut self, size: u64, sink: &mut dyn Sink) -> Result<()> {
        let (most, zip64) = self.weights.expect("the weights were opened");
        if size > most {
            return Err(Error::new(Kind::Internal, "the weights are longer than they can be").with_found(most, size));
        }
        self.weights = Some((size, zip64));
        if zip64 {
            let sizes = [size.to_le_bytes(), size.to_le_bytes()].concat();
            sink.write_at(&sizes, self.base + (30 + WEIGHTS.len() + 4) as u64)
        } else {
            sink.write_at(&[(size as u32).to_le_bytes(); 2].concat(), self.base + SIZES_AT)
        }
    }

    /// Completes the weights with the CRC-32 of their payload.
    ///
    /// # Errors
    /// Those of the sink.
    ///
    /// # Panics
    /// When [`Archive::open_weights`] was not called before.
    pub fn close_weights(&mut self, crc: u32, sink: &mut dyn Sink) -> Result<()> {
        let (size, _) = self.weights.take().expect("the weights were opened");
        let offset = self.base; // they come first
        self.end += size;
        let mut flags = 0;
        if self.streamed {
            flags = STREAMED;
            let mut descriptor = DATA_DESCRIPTOR.to_le_bytes().to_vec();
            descriptor.extend(crc.to_le_bytes());
            for _ in 0..2 {
                match u32::try_from(size) {
                    Ok(n) if size < ZIP64_LIMIT => descriptor.extend(n.to_le_bytes()),
                    _ => descriptor.extend(size.to_le_bytes()),
                }
            }
            sink.write_at(&descriptor, self.end)?;
            self.end += descriptor.len() as u64;
        } else {
            sink.write_at(&crc.to_le_bytes(), offset + CRC_AT)?;
        }
        self.list(&Member { name: WEIGHTS, crc, size, offset, flags, mode: 0o600 });
        Ok(())
    }

    /// Writes a whole member.
    ///
    /// # Errors
    /// `Invalid` for a name or file the format cannot hold, `Io`, those of the sink.
    pub fn add(&mut self, name: &str, content: &Content, sink: &mut dyn Sink) -> Result<()> {
        let taken = (name == WEIGHTS || self.names.contains(name)).then_some("two members would have it");
        if let Some(why) = names::refuse(name).or(taken) {
            let what = format!("this name cannot stand in a zip archive: {why}");
            return Err(Error::new(Kind::Invalid, what).with_member(name));
        }
        let full = self.count >= limits::MAX_MEMBERS
            || (self.directory.len() + name.len()) as u64 + 100 > limits::MAX_DIRECTORY_BYTES;
        if full {
            return Err(Error::new(Kind::Invalid, "an archive holds no more members").with_found(
                format_args!("at most {}, and {} bytes of directory", limits::MAX_MEMBERS, limits::MAX_DIRECTORY_BYTES),
                self.count,
            ));
        }
        let mut crc = crc32fast::Hasher::new();
        let mut size = 0;
        let mut measure = |block: &[u8], _: u64| {
            crc.update(block);
            size += block.len() as u64;
            Ok(())
        };
        let mode = match content {
            Content::Bytes(bytes) => {
                measure(bytes, 0)?;
                0o600
            }
            Content::File(_) => {
                blocks(content, &mut measure).map_err(|e| e.with_member(name))?;
                0o100_644
            }
        };
        let flags = if name.is_ascii() { 0 } else { UTF8_FLAG };
        let member = Member { name, crc: crc.finalize(), size, offset: self.end, flags, mode };
        let extra = if size >= ZIP64_LIMIT { zip64_extra(&[size, size]) } else { Vec::new() };
        let header = local_header(&member, &extra);
        sink.write_at(&header, self.end)?;
        let start = self.end + header.len() as u64;
        let mut written = 0;
        blocks(content, &mut |block, at| {
            written = at + block.len() as u64;
            sink.write_at(block, start + at)
        })
        .map_err(|e| e.with_member(name))?;
        if written != size {
            return Err(Error::new(Kind::Changed, "an asset changed while it was saved").with_member(name));
        }
        self.end = start + size;
        self.names.insert(name.to_owned());
        self.list(&member);
        Ok(())
    }

    /// Writes the central directory; the offset behind the archive's last byte.
    ///
    /// # Errors
    /// Those of the sink.
    pub fn finish(self, sink: &mut dyn Sink) -> Result<u64> {
        let (start, size) = (self.end, self.directory.len() as u64);
        let mut out = self.directory;
        let zip64 = start >= ZIP64_LIMIT || size >= ZIP64_LIMIT || self.count >= 0xffff;
        if zip64 {
            let at = start + size;
            put(&mut out, &[END_64, 44, 0]); // size of what follows, 64 bits
            out.extend([45, 3, 45, 0]); // made by (Unix, 4.5), needs 4.5
            put(&mut out, &[0, 0]); // disks
            for n in [self.count, self.count, size, start] {
                out.extend(n.to_le_bytes());
            }
            put(&mut out, &[END_64_LOCATOR, 0]);
            out.extend(at.to_le_bytes());
            put(&mut out, &[1]);
        }
        put(&mut out, &[END, 0]);
        let count = if zip64 { 0xffff } else { self.count as u16 };
        out.extend(count.to_le_bytes());
        out.extend(count.to_le_bytes());
        for n in [size, start] {
            out.extend(if zip64 { u32::MAX } else { n as u32 }.to_le_bytes());
        }
        out.extend([0, 0]); // no comment
        sink.write_at(&out, start)?;
        Ok(start + out.len() as u64)
    }

    /// Adds a central directory header (§4.3.12).
    fn list(&mut self, m: &Member<'_>) {
        let (big, far) = (m.size >= ZIP64_LIMIT, m.offset >= ZIP64_LIMIT);
        let mut large = Vec::new();
        if big {
            large.extend([m.size, m.size]);
        }
        if far {
            large.push(m.offset);
        }
        let extra = if large.is_empty() { Vec::new() } else { zip64_extra(&large) };
        let version: u16 = if extra.is_empty() { 20 } else { 45 };
        let size = if big { u32::MAX } else { m.size as u32 };
        let out = &mut self.directory;
        put(out, &[CENTRAL_HEADER]);
        for n in [version | 3 << 8, version, m.flags, 0, 0, DOS_DATE] {
            out.extend(n.to_le_bytes());
        }
        put(out, &[m.crc, size, size]);
        for n in [m.name.len() as u16, extra.len() as u16, 0, 0, 0] {
            out.extend(n.to_le_bytes());
        }
        put(out, &[m.mode << 16, if far { u32::MAX } else { m.offset as u32 }]);
        out.extend(m.name.as_bytes());
        out.extend(extra);
        self.count += 1;
    }
}

/// The first multiple of 64 from `used` on that HDF5 tools do not probe for a signature: 0, 512, 1024, 2048, …
/// There `h5py.File(archive, "a")` would find the image and cut off everything behind it.
pub fn payload_offset(used: u64) -> u64 {
    let at = used.next_multiple_of(ALIGNMENT);
    if at == 0 || (at >= 512 && at.is_power_of_two()) { at + ALIGNMENT } else { at }
}

/// Bytes of everything around a weights payload of `size` bytes that starts the sink.
pub fn lead_in(size: u64) -> u64 {
    payload_offset((30 + WEIGHTS.len() + 4) as u64 + if size >= ZIP64_LIMIT { 20 } else { 0 })
}

fn zip64_extra(values: &[u64]) -> Vec<u8> {
    let mut out = ZIP64_EXTRA.to_le_bytes().to_vec();
    out.extend((8 * values.len() as u16).to_le_bytes());
    values.iter().for_each(|v| out.extend(v.to_le_bytes()));
    out
}

/// Local file header (§4.3.7).
fn local_header(m: &Member<'_>, extra: &[u8]) -> Vec<u8> {
    let big = m.size >= ZIP64_LIMIT;
    let size = if big { u32::MAX } else { m.size as u32 };
    let mut out = Vec::with_capacity(30 + m.name.len() + extra.len());
    put(&mut out, &[LOCAL_HEADER]);
    for n in [if big { 45 } else { 20 }, m.flags, 0, 0, DOS_DATE] {
        out.extend(n.to_le_bytes());
    }
    put(&mut out, &[m.crc, size, size]);
    out.extend((m.name.len() as u16).to_le_bytes());
    out.extend((extra.len() as u16).to_le_bytes());
    out.extend(m.name.as_bytes());
    out.extend(extra);
    out
}

fn put(out: &mut Vec<u8>, values: &[u32]) {
    values.iter().for_each(|v| out.extend(v.to_le_bytes()));
}

/// Calls `each` with every block of `content` and its offset.
fn blocks(content: &Content, each: &mut dyn FnMut(&[u8], u64) -> Result<()>) -> Result<()> {
    match content {
        Content::Bytes(bytes) => each(bytes, 0),
        Content::File(path) => {
            let mut file =
                crate::io::open_regular(path).during("cannot open an asset").map_err(|e| e.with_path(path))?;
            let mut block = vec![0; WRITE_BYTES];
            let mut at = 0;
            loop {
                match file.read(&mut block).during("cannot read an asset").map_err(|e| e.with_path(path))? {
                    0 => return Ok(()),
                    n => {
                        each(&block[..n], at)?;
                        at += n as u64;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_is_aligned_and_never_where_hdf5_probes() {
        for used in 0..9000 {
            let at = payload_offset(used);
            assert!(at >= used && at.is_multiple_of(ALIGNMENT) && at - used < 2 * ALIGNMENT, "{used}");
            assert!(!(0..40).any(|k| at == 0 || at == 512 << k), "{used} gives {at}");
        }
        assert_eq!((lead_in(100), lead_in(5 << 30)), (64, 128));
    }
}
