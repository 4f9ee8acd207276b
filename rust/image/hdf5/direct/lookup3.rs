//! The checksum of newer structures: Bob Jenkins' lookup3.

use super::malformed;
use crate::error::Result;

/// The last four bytes of `bytes` are the lookup3 hash of the rest (§"Checksum").
pub(super) fn check_sum(bytes: &[u8], what: &str) -> Result<()> {
    let (body, sum) = bytes.split_at(bytes.len().saturating_sub(4));
    if sum == lookup3(body).to_le_bytes() {
        return Ok(());
    }
    Err(malformed(&format!("the checksum of the {what} is wrong")))
}

/// Bob Jenkins' public-domain `hashlittle` of lookup3.c with initial value 0.
fn lookup3(data: &[u8]) -> u32 {
    let [mut a, mut b, mut c] = [0xdead_beef_u32.wrapping_add(data.len() as u32); 3];
    let word = |d: &[u8], at: usize| {
        let mut w = [0; 4];
        let d = d.get(at..).unwrap_or_default();
        let n = d.len().min(4);
        w[..n].copy_from_slice(&d[..n]);
        u32::from_le_bytes(w)
    };
    let mut rest = data;
    loop {
        if rest.is_empty() {
            return c;
        }
        a = a.wrapping_add(word(rest, 0));
        b = b.wrapping_add(word(rest, 4));
        c = c.wrapping_add(word(rest, 8));
        if rest.len() <= 12 {
            break;
        }
        for (shift, turn) in [(4, 0), (6, 1), (8, 2), (16, 0), (19, 1), (4, 2)] {
            let (x, y, z) = match turn {
                0 => (&mut a, &mut b, &mut c),
                1 => (&mut b, &mut c, &mut a),
                _ => (&mut c, &mut a, &mut b),
            };
            *x = x.wrapping_sub(*z) ^ z.rotate_left(shift);
            *z = z.wrapping_add(*y);
        }
        rest = &rest[12..];
    }
    for (shift, turn) in [(14, 0), (11, 1), (25, 2), (16, 0), (4, 1), (14, 2), (24, 0)] {
        let (x, y) = match turn {
            0 => (&mut c, b),
            1 => (&mut a, c),
            _ => (&mut b, a),
        };
        *x = (*x ^ y).wrapping_sub(y.rotate_left(shift));
    }
    c
}

#[cfg(test)]
mod tests {
    use super::lookup3;

    #[test]
    fn lookup3_matches_published_values() {
        // lookup3.c, driver5: hashlittle("", 0) and hashlittle("Four score and seven years ago", 0)
        assert_eq!(lookup3(b""), 0xdead_beef);
        assert_eq!(lookup3(b"Four score and seven years ago"), 0x1777_0551);
    }
}
