//! The byte transposition that makes numbers compress: first the first byte of every element, then the second, …
#![forbid(unsafe_code)]

/// Transposes elements of `n` bytes from `data` to `out`, which is as long; what fills no element stays as it is.
///
/// # Panics
/// When the lengths differ.
pub fn shuffle(data: &[u8], n: usize, out: &mut [u8]) {
    assert_eq!(data.len(), out.len());
    match n {
        0 | 1 => out.copy_from_slice(data),
        2 => planes::<2>(data, out),
        4 => planes::<4>(data, out),
        8 => planes::<8>(data, out),
        16 => planes::<16>(data, out),
        _ => {
            let count = data.len() / n;
            let (body, rest) = out.split_at_mut(count * n);
            for (i, plane) in body.chunks_exact_mut(count.max(1)).enumerate() {
                plane.iter_mut().zip(data[i..].iter().step_by(n)).for_each(|(to, &byte)| *to = byte);
            }
            rest.copy_from_slice(&data[count * n..]);
        }
    }
}

/// Undoes [`shuffle`].
///
/// # Panics
/// When the lengths differ.
pub fn unshuffle(data: &[u8], n: usize, out: &mut [u8]) {
    assert_eq!(data.len(), out.len());
    match n {
        0 | 1 => out.copy_from_slice(data),
        2 => elements::<2>(data, out),
        4 => elements::<4>(data, out),
        8 => elements::<8>(data, out),
        16 => elements::<16>(data, out),
        _ => {
            let count = data.len() / n;
            let (body, rest) = data.split_at(count * n);
            for (i, plane) in body.chunks_exact(count.max(1)).enumerate() {
                out[i..].iter_mut().step_by(n).zip(plane).for_each(|(to, &byte)| *to = byte);
            }
            out[count * n..].copy_from_slice(rest);
        }
    }
}

/// Elements transposed at a time: enough for the compiler to use vectors.
const LANES: usize = 32;

fn planes<const N: usize>(data: &[u8], out: &mut [u8]) {
    let (elements, rest) = data.as_chunks::<N>();
    let count = elements.len();
    let (blocks, tail) = elements.as_chunks::<LANES>();
    for (b, block) in blocks.iter().enumerate() {
        for i in 0..N {
            let to = &mut out[i * count + b * LANES..][..LANES];
            for j in 0..LANES {
                to[j] = block[j][i];
            }
        }
    }
    for (j, element) in tail.iter().enumerate() {
        for (i, &byte) in element.iter().enumerate() {
            out[i * count + blocks.len() * LANES + j] = byte;
        }
    }
    out[count * N..].copy_from_slice(rest);
}

fn elements<const N: usize>(data: &[u8], out: &mut [u8]) {
    let (elements, rest) = out.as_chunks_mut::<N>();
    let count = elements.len();
    let (blocks, tail) = elements.as_chunks_mut::<LANES>();
    let done = blocks.len() * LANES;
    for (b, block) in blocks.iter_mut().enumerate() {
        let from: [&[u8; LANES]; N] =
            std::array::from_fn(|i| data[i * count + b * LANES..].first_chunk().expect("a plane has `count` bytes"));
        for j in 0..LANES {
            for i in 0..N {
                block[j][i] = from[i][j];
            }
        }
    }
    for (j, element) in tail.iter_mut().enumerate() {
        for (i, byte) in element.iter_mut().enumerate() {
            *byte = data[i * count + done + j];
        }
    }
    rest.copy_from_slice(&data[count * N..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_transposed_and_back() {
        for n in [0, 1, 2, 3, 4, 5, 8, 12, 16, 24] {
            for len in [0, 1, 7, 31, 32, 33, 64, 1000, 4099] {
                let data: Vec<u8> = (0..len).map(|i| (i * 7 + i / 256) as u8).collect();
                let (mut there, mut back) = (vec![0; len], vec![0; len]);
                shuffle(&data, n, &mut there);
                let (n, count) = (n.max(1), len / n.max(1));
                let want = |at: usize| if at < count * n { data[at % count * n + at / count] } else { data[at] };
                assert!(there.iter().enumerate().all(|(at, &byte)| byte == want(at)), "{len} bytes, {n} an element");
                unshuffle(&there, n, &mut back);
                assert_eq!(back, data);
            }
        }
    }
}
