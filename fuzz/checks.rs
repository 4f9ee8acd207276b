//! What must hold for any bytes. Run by the fuzz targets (cargo-fuzz, nightly Rust) and by `tests/soak.rs` (any Rust).

use std::sync::Arc;

use hornbeam::archive::read::Members;
use hornbeam::config::{Encoder, Limits, decode_value, encode_value};
use hornbeam::io::ReadAt;
use hornbeam::load::{Choice, Weights};

/// Tensors of more bytes are legal, where chunks are missing: zeros cost no file.
const MOST: u64 = 1 << 24;

/// As an archive: an error, or members that can be read.
pub(crate) fn archive(data: &[u8]) {
    let source: Arc<dyn ReadAt> = Arc::new(data.to_vec());
    let Ok(members) = Members::open(&*source) else { return };
    for member in members.iter().filter(|m| m.size < 1 << 20) {
        if let Ok(bytes) = member.read(&*source) {
            assert_eq!(bytes.len() as u64, member.size);
        }
    }
    if let Ok(weights) = Weights::open_member(&source, &members, Choice::Auto) {
        tensors(weights);
    }
}

/// As a weights image, by every reader: an error, or tensors that can be read.
pub(crate) fn index(data: &[u8]) {
    for choice in [Choice::Direct, Choice::LibHdf5, Choice::Safetensors] {
        if let Ok(weights) = Weights::open(Arc::new(data.to_vec()), choice) {
            tensors(weights);
        }
    }
}

/// Reads everything, at once and tensor by tensor.
fn tensors(weights: Weights) {
    let weights = Arc::new(weights);
    let datasets = &weights.index().datasets;
    let sizes = datasets.iter().map(|d| d.nbytes).fold(0, u64::saturating_add);
    assert!(datasets.iter().all(|d| d.dtype.nbytes(&d.shape) == Some(d.nbytes)));
    if sizes > MOST {
        return;
    }
    let all: Vec<usize> = (0..datasets.len()).collect();
    let Ok(reading) = weights.fetch(&all, true, u64::MAX) else { return };
    if let Err(error) = reading.complete(false, &|| Ok(())) {
        assert!(!error.to_string().contains("panicked"), "{error}");
        return;
    }
    for i in all {
        let whole = reading.take(i, &|| Ok(())).expect("it was read").expect("it was not taken");
        let part = weights.read_part(i, 0, datasets[i].nbytes, &|| Ok(())).expect("it was read before");
        assert_eq!(part.bytes(), whole.bytes(), "{}", datasets[i].path);
    }
}

/// As JSON: an error, or a value that encodes to what decodes to it again.
pub(crate) fn json(data: &[u8]) {
    let Ok(value) = decode_value(data, &Limits::FILE) else { return };
    let encode = |value| {
        let mut out = Encoder::new();
        encode_value(value, &mut out);
        out.finish()
    };
    let text = encode(&value);
    let again = decode_value(&text, &Limits::FILE).expect("what we wrote is JSON");
    assert_eq!(encode(&again), text);
}
