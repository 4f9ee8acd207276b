//! The name of a member (§4.4.17, appendix D): UTF-8 where its flag says so, else code page 437, as in `zipfile`.

use super::UTF8_FLAG;
use super::fields::bad;
use crate::error::Result;

/// The characters of code page 437 from 128 on; the first half is ASCII.
const CP437: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

/// Says why a name cannot be written, if so: readers would look for it elsewhere, or nowhere.
pub(super) fn refuse(name: &str) -> Option<&'static str> {
    let drive = name.as_bytes().get(1) == Some(&b':') && name.as_bytes()[0].is_ascii_alphabetic();
    if name.is_empty() || name.contains('\0') {
        Some("it is empty or holds a NUL")
    } else if name.len() > usize::from(u16::MAX) {
        Some("it has more than 65,535 bytes")
    } else if drive || name.starts_with('/') || name.split('/').any(|part| part == "..") {
        Some("it leads out of the archive")
    } else {
        None
    }
}

/// The name that all readers give a member.
///
/// # Errors
/// `Archive` for names that readers disagree on: no UTF-8 in spite of the flag, UTF-8 without it, a NUL, none at all.
pub(super) fn decode(bytes: &[u8], flags: u16) -> Result<String> {
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(bad("a name is empty or holds a NUL"));
    }
    match std::str::from_utf8(bytes) {
        Ok(name) if bytes.is_ascii() || flags & UTF8_FLAG != 0 => Ok(name.to_owned()),
        Ok(_) => Err(bad("a name is UTF-8, but its flag says that it is not")),
        Err(_) if flags & UTF8_FLAG != 0 => Err(bad("a name is not UTF-8, but its flag says that it is")),
        Err(_) => Ok(bytes.iter().map(|&b| cp437(b)).collect()),
    }
}

fn cp437(byte: u8) -> char {
    let upper = byte.checked_sub(128).and_then(|i| CP437.chars().nth(i.into()));
    upper.unwrap_or(byte.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_code_page_437_has_a_character() {
        assert_eq!(CP437.chars().count(), 128);
        assert_eq!(decode(b"a/\x82\xe1\xff", 0).unwrap(), "a/éß\u{a0}");
    }

    #[test]
    fn a_name_that_readers_disagree_on_is_refused() {
        assert_eq!(decode("é".as_bytes(), UTF8_FLAG).unwrap(), "é");
        for (bytes, flags) in [("é".as_bytes(), 0), (b"\x82", UTF8_FLAG), (b"", 0), (b"a\0b", 0)] {
            assert!(decode(bytes, flags).is_err(), "{bytes:?}");
        }
    }
}
