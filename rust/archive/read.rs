//! Archive → members: where each lies, and what it must look like. Nothing is extracted.
//!
//! What Python's `zipfile` reads without doubt is read: anything before and behind the archive, comments, padding of
//! extra fields, names in code page 437. Strict where readers could disagree, on the member, its bytes or its name:
//! there is one end record to find, local and central headers agree, names are unique, plain and the same in every
//! encoding, members do not overlap. STORED and DEFLATE only; no encryption, no archives in several parts.

use std::collections::HashMap;

use super::{CENTRAL_HEADER, END, END_64, END_64_LOCATOR, LOCAL_HEADER, UTF8, ZIP64_EXTRA, ZIP64_LIMIT, refuse_name};
use crate::error::{Error, Kind, Result, out_of_memory, try_with_capacity};
use crate::io::ReadAt;
use crate::limits;

/// How a member is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// As it is.
    Stored,
    /// Compressed (RFC 1951).
    Deflated,
}

/// A member of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Name, with `/` between its parts.
    pub name: String,
    /// Offset of its data in the file.
    pub offset: u64,
    /// Bytes it stands for.
    pub size: u64,
    /// Bytes it takes in the file.
    pub stored: u64,
    /// CRC-32 of the `size` bytes.
    pub crc: u32,
    /// How it is stored.
    pub method: Method,
}

/// The members of an archive, in the order of its directory.
#[derive(Clone, Debug, Default)]
pub struct Members {
    all: Vec<Member>,
    by_name: HashMap<String, usize>,
}

#[cold]
fn bad(what: &str) -> Error {
    Error::new(Kind::Archive, format!("not a valid archive: {what}"))
        .with_advice("The file is damaged, cut short or no archive; use another copy.")
}

fn u16_at(b: &[u8], at: usize) -> Result<u16> {
    let b = b.get(at..at + 2).ok_or_else(|| bad("a record is cut short"))?;
    Ok(u16::from_le_bytes(b.try_into().expect("two bytes")))
}

fn u32_at(b: &[u8], at: usize) -> Result<u32> {
    let b = b.get(at..at + 4).ok_or_else(|| bad("a record is cut short"))?;
    Ok(u32::from_le_bytes(b.try_into().expect("four bytes")))
}

fn u64_at(b: &[u8], at: usize) -> Result<u64> {
    let b = b.get(at..at + 8).ok_or_else(|| bad("a record is cut short"))?;
    Ok(u64::from_le_bytes(b.try_into().expect("eight bytes")))
}

fn read(file: &dyn ReadAt, at: u64, n: u64) -> Result<Vec<u8>> {
    if at.checked_add(n).is_none_or(|end| end > file.len()) {
        return Err(bad("a record lies outside the file"));
    }
    let mut out = zeros(n)?;
    file.read_at(&mut out, at)?;
    Ok(out)
}

fn zeros(n: u64) -> Result<Vec<u8>> {
    let mut out = try_with_capacity(n as usize)?;
    out.resize(n as usize, 0);
    Ok(out)
}

/// What the end records say (§4.3.14 to §4.3.16), and where the archive begins in the file.
struct Directory {
    prefix: u64,
    start: u64, // in the file
    size: u64,
    count: u64,
}

/// Bytes of an end record without its comment.
const RECORD: usize = 22;

/// Where the end record is in the last bytes of a file. `zipfile` takes the last signature there is, others the last
/// one whose comment reaches to the end: they must be the same.
fn end_record(bytes: &[u8]) -> Result<usize> {
    let last = bytes.len().checked_sub(RECORD).ok_or_else(|| bad("it has no end record"))?;
    let signature = END.to_le_bytes();
    let mut candidates = (0..=bytes.len() - 4).rev().filter(|&at| bytes[at..].starts_with(&signature)).peekable();
    let exact =
        |&at: &usize| at <= last && u16_at(bytes, at + 20).is_ok_and(|n| at + RECORD + usize::from(n) == bytes.len());
    let first = *candidates.peek().ok_or_else(|| bad("it has no end record"))?;
    let other = candidates.find(exact);
    if first > last || other.is_some_and(|at| at != first) {
        return Err(bad("readers could disagree on its end record"));
    }
    Ok(first)
}

fn directory(file: &dyn ReadAt) -> Result<Directory> {
    let tail = file.len().min(RECORD as u64 + u64::from(u16::MAX));
    let bytes = read(file, file.len() - tail, tail)?;
    let at = end_record(&bytes)?;
    let record = &bytes[at..];
    if (u16_at(record, 4)?, u16_at(record, 6)?) != (0, 0) {
        return Err(bad("it is one of several parts"));
    }
    let (mut count, mut size) = (u64::from(u16_at(record, 10)?), u64::from(u32_at(record, 12)?));
    let mut start = u64::from(u32_at(record, 16)?);
    let mut end = file.len() - tail + at as u64;
    let mut located = None;
    if end >= 20 {
        let locator = read(file, end - 20, 20)?;
        if locator.starts_with(&END_64_LOCATOR.to_le_bytes()) {
            let at = end.checked_sub(20 + 56).ok_or_else(|| bad("a record lies outside the file"))?;
            let record = read(file, at, 56)?;
            if !record.starts_with(&END_64.to_le_bytes()) {
                return Err(bad("the zip64 end record is not where its locator says"));
            }
            let large = [u64_at(&record, 32)?, u64_at(&record, 40)?, u64_at(&record, 48)?];
            let small = [(count, 0xffff), (size, ZIP64_LIMIT), (start, ZIP64_LIMIT)];
            if large.iter().zip(small).any(|(&large, (small, marker))| small != marker && small != large) {
                return Err(bad("its two end records disagree"));
            }
            [count, size, start] = large;
            located = Some(u64_at(&locator, 8)?);
            end = at;
        }
    }
    // What stands before the archive moves all of it: offsets count from the archive's start.
    let length = start.checked_add(size).filter(|&n| n <= end);
    let prefix = end - length.ok_or_else(|| bad("its directory is not where the end record says"))?;
    if located.is_some_and(|at| at.checked_add(prefix) != Some(end)) {
        return Err(bad("the zip64 end record is not where its locator says"));
    }
    if prefix > 0 && read(file, 0, 4)? == LOCAL_HEADER.to_le_bytes() {
        return Err(bad(
            "its directory is not where the end record says: another archive stands before it, or bytes are missing",
        ));
    }
    if count > limits::MAX_MEMBERS || size > limits::MAX_DIRECTORY_BYTES {
        return Err(Error::new(Kind::Limit, "the archive has too many members")
            .with_found(format_args!("at most {}", limits::MAX_MEMBERS), count));
    }
    Ok(Directory { prefix, start: prefix + start, size, count })
}

impl Members {
    /// Reads the directory of the archive that is all of `file`, and checks every member's header against it.
    ///
    /// # Errors
    /// `Archive` for malformed archives, `Unsupported` for encryption and other methods, `Limit`.
    pub fn open(file: &dyn ReadAt) -> Result<Self> {
        let directory = directory(file)?;
        let bytes = read(file, directory.start, directory.size)?;
        let mut members = Vec::new();
        let mut by_name = HashMap::new();
        let mut extents = Vec::new();
        let mut rest = &bytes[..];
        for _ in 0..directory.count {
            let record = central(rest)?;
            rest = &rest[record.used..];
            let header = record.header.checked_add(directory.prefix);
            let header = header.ok_or_else(|| bad("a record lies outside the file"))?;
            let member = local(file, record, header, directory.start)?;
            if by_name.insert(member.name.clone(), members.len()).is_some() {
                return Err(bad("it has two members of the same name").with_member(&member.name));
            }
            extents.push((header, member.offset + member.stored));
            members.push(member);
        }
        if !rest.is_empty() {
            return Err(bad("its directory has more records than the end record says"));
        }
        extents.sort_unstable();
        if extents.windows(2).any(|pair| pair[0].1 > pair[1].0) {
            return Err(bad("two members share bytes"));
        }
        Ok(Self { all: members, by_name })
    }

    /// All members.
    pub fn iter(&self) -> impl Iterator<Item = &Member> {
        self.all.iter()
    }

    /// Refuses members that stand for far more bytes, together, than they store.
    ///
    /// # Errors
    /// `Limit`.
    pub fn check_expansion(&self, floor: u64, max_expansion: u64) -> Result<()> {
        let sum = |of: fn(&Member) -> u64| self.iter().map(of).fold(0, u64::saturating_add);
        limits::check_expansion(sum(|m| m.size), sum(|m| m.stored), floor, max_expansion)
    }

    /// The member called `name`.
    pub fn get(&self, name: &str) -> Option<&Member> {
        self.by_name.get(name).map(|&i| &self.all[i])
    }
}

/// One central directory header (§4.3.12).
struct Central<'a> {
    member: Member, // without its offset
    raw_name: &'a [u8],
    flags: u16,
    header: u64, // offset of the local header in the archive
    used: usize,
}

fn central(b: &[u8]) -> Result<Central<'_>> {
    if u32_at(b, 0)? != CENTRAL_HEADER {
        return Err(bad("a directory record has the wrong signature"));
    }
    let (flags, method) = (u16_at(b, 8)?, u16_at(b, 10)?);
    let lengths = [u16_at(b, 28)?, u16_at(b, 30)?, u16_at(b, 32)?].map(usize::from);
    let used = 46 + lengths.iter().sum::<usize>();
    let variable = b.get(46..used).ok_or_else(|| bad("a record is cut short"))?;
    let (raw_name, extra) = (&variable[..lengths[0]], &variable[lengths[0]..lengths[0] + lengths[1]]);
    let name = decode_name(raw_name, flags)?;
    let error = |e: Error| e.with_member(&name);
    if flags & 1 != 0 {
        return Err(error(Error::new(Kind::Unsupported, "the archive is encrypted")));
    }
    if let Some(why) = refuse_name(&name) {
        return Err(error(bad(why)));
    }
    let mut large = [u32_at(b, 24)?, u32_at(b, 20)?, u32_at(b, 42)?].map(u64::from); // size, stored, offset
    for field in fields(extra) {
        let (id, data) = field.map_err(error)?;
        match id {
            ZIP64_EXTRA => zip64(data, &mut large).map_err(error)?,
            // Another name, if the first byte is 1 and the checksum that of the name; not every reader looks.
            UNICODE_PATH
                if data.first() == Some(&1)
                    && data.get(1..5).is_some_and(|crc| crc == crc32fast::hash(raw_name).to_le_bytes())
                    && &data[5..] != name.as_bytes() =>
            {
                return Err(error(bad("it has two names")));
            }
            _ => {}
        }
    }
    let [size, stored, header] = large;
    let method = match method {
        0 if size == stored => Method::Stored,
        0 => return Err(error(bad("a stored member has two sizes"))),
        8 => Method::Deflated,
        n => {
            return Err(error(
                Error::new(Kind::Unsupported, "a compression method that cannot be read")
                    .with_found("0 (stored) or 8 (deflate)", n),
            ));
        }
    };
    let member = Member { name, offset: 0, size, stored, crc: u32_at(b, 16)?, method };
    Ok(Central { member, raw_name, flags, header, used })
}

/// The upper half of code page 437.
const UPPER: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

/// UTF-8 if the flag says so, else code page 437 (appendix D). Without the flag some readers try UTF-8 all the same: a
/// name that could be both is refused.
fn decode_name(raw: &[u8], flags: u16) -> Result<String> {
    if raw.is_ascii() || flags & UTF8 != 0 {
        return Ok(std::str::from_utf8(raw).map_err(|_| bad("a name is not UTF-8"))?.to_owned());
    }
    if let Ok(text) = std::str::from_utf8(raw) {
        return Err(bad("a name is UTF-8 without saying so: some readers find another one").with_member(text));
    }
    let table: Vec<char> = UPPER.chars().collect();
    Ok(raw.iter().map(|&b| if b.is_ascii() { char::from(b) } else { table[usize::from(b) - 128] }).collect())
}

/// Id of the extra field with a name in UTF-8 (§4.6.9).
const UNICODE_PATH: u16 = 0x7075;

/// The records of an extra field: id and data. Up to three bytes behind the last are padding.
fn fields(mut extra: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8])>> {
    std::iter::from_fn(move || {
        if extra.len() < 4 {
            return None;
        }
        let (id, n) = (u16::from_le_bytes([extra[0], extra[1]]), u16::from_le_bytes([extra[2], extra[3]]));
        let Some(data) = extra.get(4..4 + usize::from(n)) else {
            extra = &[];
            return Some(Err(bad("an extra field is cut short")));
        };
        extra = &extra[4 + usize::from(n)..];
        Some(Ok((id, data)))
    })
}

/// Replaces the values that did not fit 32 bits by those of the zip64 extra field (§4.5.3).
fn zip64(data: &[u8], values: &mut [u64]) -> Result<()> {
    let mut at = 0;
    for v in values.iter_mut().filter(|v| **v == ZIP64_LIMIT) {
        *v = u64_at(data, at)?;
        at += 8;
    }
    Ok(())
}

/// Checks the local header (§4.3.7) against the directory, and finds the data behind it.
fn local(file: &dyn ReadAt, record: Central<'_>, header: u64, end: u64) -> Result<Member> {
    let Central { mut member, raw_name, flags, .. } = record;
    let error = |e: Error| e.with_member(&member.name);
    let fixed = read(file, header, 30).map_err(error)?;
    if u32_at(&fixed, 0)? != LOCAL_HEADER {
        return Err(error(bad("a member is not where the directory says")));
    }
    let (name_length, extra_length) = (u16_at(&fixed, 26)?, u16_at(&fixed, 28)?);
    let variable = read(file, header + 30, u64::from(name_length) + u64::from(extra_length)).map_err(error)?;
    let (name, extra) = variable.split_at(usize::from(name_length));
    let method = if member.method == Method::Stored { 0 } else { 8 };
    let local_flags = u16_at(&fixed, 6)?;
    let same_encoding = name.is_ascii() || (local_flags ^ flags) & UTF8 == 0;
    if name != raw_name || !same_encoding || u16_at(&fixed, 8)? != method || local_flags & 1 != 0 {
        return Err(error(bad("a member's header disagrees with the directory")));
    }
    let mut sizes = [u32_at(&fixed, 22)?, u32_at(&fixed, 18)?].map(u64::from);
    // Whoever does not need the sizes does not look here: what cannot be read is padding.
    for (id, data) in fields(extra).map_while(Result::ok) {
        if id == ZIP64_EXTRA {
            zip64(data, &mut sizes).map_err(error)?;
        }
    }
    let found = [sizes[0], sizes[1], u64::from(u32_at(&fixed, 14)?)];
    let streamed = local_flags & 8 != 0; // they stand behind the data; here are zeros
    let wanted = [member.size, member.stored, u64::from(member.crc)];
    if found.iter().zip(wanted).any(|(&found, wanted)| found != wanted && !(streamed && found == 0)) {
        return Err(error(bad("a member's header disagrees with the directory")));
    }
    member.offset = header + 30 + variable.len() as u64;
    if member.offset.checked_add(member.stored).is_none_or(|stop| stop > end) {
        return Err(bad("a member reaches past the end of the data").with_member(&member.name));
    }
    Ok(member)
}

impl Member {
    /// Refuses members that stand for far more bytes than they store; Keras' rule and its limits.
    ///
    /// # Errors
    /// `Limit`.
    pub fn check_expansion(&self, floor: u64, max_expansion: u64) -> Result<()> {
        limits::check_expansion(self.size, self.stored, floor, max_expansion).map_err(|e| e.with_member(&self.name))
    }

    /// All bytes of the member, inflated and checked.
    ///
    /// # Errors
    /// `Crc` when they do not match, `Archive` for a broken stream, `Memory`, `Io`.
    pub fn read(&self, file: &dyn ReadAt) -> Result<Vec<u8>> {
        let mut stored = zeros(self.stored).map_err(|e| e.with_member(&self.name))?;
        file.read_at(&mut stored, self.offset).map_err(|e| e.with_member(&self.name))?;
        let bytes = match self.method {
            Method::Stored => stored,
            Method::Deflated => self.inflate(&stored)?,
        };
        self.check_crc(crc32fast::hash(&bytes))?;
        Ok(bytes)
    }

    /// Compares the checksum of a stored member's bytes, in little memory.
    ///
    /// # Errors
    /// `Crc` when they do not match, `Io`.
    pub fn check(&self, file: &dyn ReadAt) -> Result<()> {
        let mut crc = crc32fast::Hasher::new();
        let mut block = vec![0; self.stored.min(1 << 20) as usize];
        let mut at = 0;
        while at < self.stored {
            let n = (self.stored - at).min(block.len() as u64);
            file.read_at(&mut block[..n as usize], self.offset + at).map_err(|e| e.with_member(&self.name))?;
            crc.update(&block[..n as usize]);
            at += n;
        }
        self.check_crc(crc.finalize())
    }

    /// Memory grows with what the stream really holds, never with what the header claims.
    fn inflate(&self, stored: &[u8]) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let mut stream = flate2::Decompress::new(false);
        let error = |what: &str| bad(what).with_member(&self.name);
        loop {
            if out.len() as u64 > self.size {
                return Err(error("a compressed member is larger than the directory says"));
            }
            let more = (64 << 10).max(out.len() / 2);
            out.try_reserve(more).map_err(|_| out_of_memory(out.len() + more).with_member(&self.name))?;
            let input = &stored[stream.total_in() as usize..];
            let before = (stream.total_in(), out.len());
            let status = stream.decompress_vec(input, &mut out, flate2::FlushDecompress::Finish);
            match status {
                Ok(flate2::Status::StreamEnd) => break,
                Ok(_) if (stream.total_in(), out.len()) != before => {}
                _ => return Err(error("a compressed member is damaged")),
            }
        }
        if out.len() as u64 != self.size || stream.total_in() != self.stored {
            return Err(error("a compressed member has not the size the directory says"));
        }
        Ok(out)
    }

    /// Compares the CRC-32 of the member's bytes with the directory's.
    ///
    /// # Errors
    /// `Crc`.
    pub fn check_crc(&self, found: u32) -> Result<()> {
        if found == self.crc {
            return Ok(());
        }
        Err(Error::new(Kind::Crc, format!("Bad CRC-32 for file '{}'", self.name))
            .with_found(format_args!("{:08x}", self.crc), format_args!("{found:08x}"))
            .with_member(&self.name)
            .with_advice("Its bytes changed after it was written; use another copy."))
    }
}
