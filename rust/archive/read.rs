//! Archive → members: where each lies, and what it must look like. Nothing is extracted.
//!
//! What Python's `zipfile` reads is read. Where readers could disagree (which member, which bytes, which name) the
//! archive is refused: local and central headers must agree, names must be unique, members must not overlap. STORED and
//! DEFLATE only; no encryption, no archives in several parts.

use std::collections::HashMap;

use super::end::directory;
use super::fields::{bad, read, u16_at, u32_at, u64_at};
use super::name;
use super::{
    CENTRAL_HEADER, ENCRYPTED_FLAGS, LOCAL_HEADER, STREAMED_FLAG, UNICODE_NAME_EXTRA, UTF8_FLAG, ZIP64_EXTRA,
    ZIP64_LIMIT,
};
use crate::error::{Error, Kind, Result, out_of_memory, try_with_capacity};
use crate::io::ReadAt;
use crate::io::fetch::{Interrupt, Patience};
use crate::limits;

/// Bytes that are read or checked before the caller is asked again whether to go on.
const STEP: usize = 1 << 20;

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
            let (member, at, used) = central(rest)?;
            rest = &rest[used..];
            let Some(header) = at.offset.checked_add(directory.prefix) else {
                return Err(bad("a member is not where the directory says").with_member(&member.name));
            };
            if by_name.insert(member.name.clone(), members.len()).is_some() {
                return Err(bad("it has two members of the same name").with_member(&member.name));
            }
            let member = local(file, member, &Header { offset: header, ..at }, directory.start)?;
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

/// What the directory says of a member's local header.
struct Header<'a> {
    offset: u64,
    name: &'a [u8],
    flags: u16,
}

/// One central directory header (§4.3.12): the member without its offset, its local header, bytes used.
fn central(b: &[u8]) -> Result<(Member, Header<'_>, usize)> {
    if u32_at(b, 0)? != CENTRAL_HEADER {
        return Err(bad("a directory record has the wrong signature"));
    }
    let (flags, method) = (u16_at(b, 8)?, u16_at(b, 10)?);
    let lengths = [u16_at(b, 28)?, u16_at(b, 30)?, u16_at(b, 32)?].map(usize::from);
    let used = 46 + lengths.iter().sum::<usize>();
    let variable = b.get(46..used).ok_or_else(|| bad("a record is cut short"))?;
    let (raw, extra) = (&variable[..lengths[0]], &variable[lengths[0]..lengths[0] + lengths[1]]);
    let name = name::decode(raw, flags)?;
    let error = |e: Error| e.with_member(&name);
    if flags & ENCRYPTED_FLAGS != 0 {
        return Err(error(Error::new(Kind::Unsupported, "the archive is encrypted")));
    }
    let mut large = [u32_at(b, 24)?, u32_at(b, 20)?, u32_at(b, 42)?].map(u64::from); // size, stored, offset
    zip64(extra, &mut large).map_err(error)?;
    // Readers that know this field take the name in it where it is meant for this one (§4.6.9).
    if let Some([1, a, b, c, d, other @ ..]) = extra_field(extra, UNICODE_NAME_EXTRA).map_err(error)?
        && crc32fast::hash(raw) == u32::from_le_bytes([*a, *b, *c, *d])
        && other != name.as_bytes()
    {
        return Err(error(bad("a member has two names")));
    }
    let [size, stored, offset] = large;
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
    let header = Header { offset, name: raw, flags };
    Ok((Member { name, offset: 0, size, stored, crc: u32_at(b, 16)?, method }, header, used))
}

/// The data of the extra field `id` (§4.5). Up to three bytes behind the last field are padding.
fn extra_field(mut extra: &[u8], id: u16) -> Result<Option<&[u8]>> {
    let mut found = None;
    while extra.len() >= 4 {
        let n = usize::from(u16_at(extra, 2)?);
        let data = extra.get(4..4 + n).ok_or_else(|| bad("an extra field is cut short"))?;
        if u16_at(extra, 0)? == id && found.replace(data).is_some() {
            return Err(bad("two extra fields have one number"));
        }
        extra = &extra[4 + n..];
    }
    Ok(found)
}

/// Replaces the values that did not fit 32 bits by those of the zip64 extra field (§4.5.3).
fn zip64(extra: &[u8], values: &mut [u64]) -> Result<()> {
    let Some(data) = extra_field(extra, ZIP64_EXTRA)? else { return Ok(()) };
    for (i, value) in values.iter_mut().filter(|v| **v == ZIP64_LIMIT).enumerate() {
        *value = u64_at(data, 8 * i)?;
    }
    Ok(())
}

/// Checks the local header (§4.3.7) against the directory, and finds the data behind it.
fn local(file: &dyn ReadAt, mut member: Member, header: &Header<'_>, end: u64) -> Result<Member> {
    let error = |e: Error| e.with_member(&member.name);
    let fixed = read(file, header.offset, 30).map_err(error)?;
    if u32_at(&fixed, 0)? != LOCAL_HEADER {
        return Err(error(bad("a member is not where the directory says")));
    }
    let flags = u16_at(&fixed, 6)?;
    let (name_length, extra_length) = (u16_at(&fixed, 26)?, u16_at(&fixed, 28)?);
    let variable = read(file, header.offset + 30, u64::from(name_length) + u64::from(extra_length)).map_err(error)?;
    let (name, extra) = variable.split_at(usize::from(name_length));
    let method = if member.method == Method::Stored { 0 } else { 8 };
    let other_name = name != header.name || !name.is_ascii() && (flags ^ header.flags) & UTF8_FLAG != 0;
    if other_name || flags & ENCRYPTED_FLAGS != 0 || u16_at(&fixed, 8)? != method {
        return Err(error(bad("a member's header disagrees with the directory")));
    }
    let mut sizes = [u32_at(&fixed, 22)?, u32_at(&fixed, 18)?].map(u64::from);
    if sizes.contains(&ZIP64_LIMIT) {
        zip64(extra, &mut sizes).map_err(error)?; // whatever else stands there, nobody reads
    }
    let found = [sizes[0], sizes[1], u64::from(u32_at(&fixed, 14)?)];
    let wanted = [member.size, member.stored, u64::from(member.crc)];
    let streamed = flags & STREAMED_FLAG != 0; // they stand behind the data, and here zeros
    if found.iter().zip(wanted).any(|(&found, wanted)| found != wanted && !(streamed && found == 0)) {
        return Err(error(bad("a member's header disagrees with the directory")));
    }
    member.offset = header.offset + 30 + variable.len() as u64;
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
    /// `Crc` when they do not match, `Archive` for a broken stream, `Io`, or what `interrupt` returns.
    pub fn read(&self, file: &dyn ReadAt, interrupt: Interrupt<'_>) -> Result<Vec<u8>> {
        let mut patience = Patience::new(interrupt);
        let mut bytes = try_with_capacity(self.stored as usize).map_err(|e| e.with_member(&self.name))?;
        self.each_step(file, &mut patience, |part| bytes.extend_from_slice(part))?;
        if self.method == Method::Deflated {
            bytes = self.inflate(&bytes, &mut patience)?;
        }
        let mut crc = crc32fast::Hasher::new();
        for part in bytes.chunks(STEP) {
            patience.ask()?;
            crc.update(part);
        }
        self.check_crc(crc.finalize())?;
        Ok(bytes)
    }

    /// Compares the checksum of a stored member's bytes, in little memory.
    ///
    /// # Errors
    /// `Crc` when they do not match, `Io`, or what `interrupt` returns.
    pub fn check(&self, file: &dyn ReadAt, interrupt: Interrupt<'_>) -> Result<()> {
        let mut crc = crc32fast::Hasher::new();
        self.each_step(file, &mut Patience::new(interrupt), |part| crc.update(part))?;
        self.check_crc(crc.finalize())
    }

    /// Reads what is stored, step by step.
    fn each_step(&self, file: &dyn ReadAt, patience: &mut Patience<'_>, mut each: impl FnMut(&[u8])) -> Result<()> {
        let mut step = vec![0; self.stored.min(STEP as u64) as usize];
        let mut at = 0;
        while at < self.stored {
            patience.ask()?;
            let n = (self.stored - at).min(STEP as u64) as usize;
            file.read_at(&mut step[..n], self.offset + at).map_err(|e| e.with_member(&self.name))?;
            each(&step[..n]);
            at += n as u64;
        }
        Ok(())
    }

    /// Memory grows with what the stream really holds, never with what the header claims.
    fn inflate(&self, stored: &[u8], patience: &mut Patience<'_>) -> Result<Vec<u8>> {
        const INPUT: usize = 16 << 10; // of which deflate makes 16 MiB at most
        let mut out: Vec<u8> = Vec::new();
        let mut stream = flate2::Decompress::new(false);
        let error = |what: &str| bad(what).with_member(&self.name);
        loop {
            patience.ask()?;
            if out.len() as u64 > self.size {
                return Err(error("a compressed member is larger than the directory says"));
            }
            if out.len() == out.capacity() {
                let more = (64 << 10).max(out.len() / 2);
                out.try_reserve(more).map_err(|_| out_of_memory(out.len() + more).with_member(&self.name))?;
            }
            let rest = &stored[stream.total_in() as usize..];
            let before = (stream.total_in(), out.len());
            let input = &rest[..rest.len().min(INPUT)];
            match stream.decompress_vec(input, &mut out, flate2::FlushDecompress::None) {
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// A member with `size` bytes at the start of a file, and the file.
    fn member(size: usize, method: Method) -> (Member, Vec<u8>) {
        let bytes: Vec<u8> = (0..size).map(|i| (i / 1000) as u8).collect();
        let mut file = bytes.clone();
        if method == Method::Deflated {
            file = Vec::with_capacity(size + 1024);
            let mut zlib = flate2::Compress::new(flate2::Compression::fast(), false);
            zlib.compress_vec(&bytes, &mut file, flate2::FlushCompress::Finish).unwrap();
        }
        let (stored, crc) = (file.len() as u64, crc32fast::hash(&bytes));
        (Member { name: "m".into(), offset: 0, size: size as u64, stored, crc, method }, file)
    }

    #[test]
    fn whoever_reads_a_large_member_is_asked_all_the_way_whether_to_go_on() {
        const SIZE: usize = 64 << 20;
        for method in [Method::Stored, Method::Deflated] {
            let (member, file) = member(SIZE, method);
            for checks in [false, true] {
                if checks && method == Method::Deflated {
                    continue; // only what is stored is checked without being read
                }
                let pass = |interrupt: Interrupt<'_>| {
                    if checks { member.check(&file, interrupt) } else { member.read(&file, interrupt).map(drop) }
                };
                let asked = Cell::new(0);
                let stop_at = |n: usize| {
                    asked.set(0);
                    pass(&|| {
                        asked.set(asked.get() + 1);
                        if asked.get() < n { Ok(()) } else { Err(Error::new(Kind::Cancelled, "interrupted")) }
                    })
                };
                stop_at(usize::MAX).unwrap();
                let all = asked.get();
                // Reading, inflating and checking: each in steps of 16 MiB at most.
                assert!(all >= if method == Method::Stored { SIZE / STEP } else { SIZE / STEP + 4 }, "{all}");
                for n in [1, 2, all / 2, all] {
                    let error = stop_at(n).unwrap_err();
                    assert!(matches!(error.kind(), Kind::Cancelled), "{error}");
                    assert_eq!(asked.get(), n, "it went on after it was told to stop");
                }
            }
        }
    }

    #[test]
    fn a_member_is_read_whole_or_refused() {
        for size in [0, 1, 1000, (64 << 10) - 1, 64 << 10, (64 << 10) + 1, 5_000_000] {
            for method in [Method::Stored, Method::Deflated] {
                let (member, file) = member(size, method);
                let go_on: Interrupt<'_> = &|| Ok(());
                assert_eq!(member.read(&file, go_on).unwrap().len(), size);
                let other = Member { crc: !member.crc, ..member.clone() };
                assert!(matches!(other.read(&file, go_on).unwrap_err().kind(), Kind::Crc));
                if method == Method::Deflated {
                    for other in [
                        Member { size: member.size + 1, ..member.clone() },
                        Member { stored: member.stored - 1, ..member.clone() },
                    ] {
                        assert!(matches!(other.read(&file, go_on).unwrap_err().kind(), Kind::Archive));
                    }
                }
            }
        }
    }
}
