//! Damaged files by the thousand, through what the fuzz targets check, on any Rust: `make soak`.
//!
//! `HORNBEAM_SOAK` says how many of each kind (a few hundred without it), `HORNBEAM_SEED` where the numbers start. The
//! file at work is kept until it has passed, so that a crash of the C library leaves it.

#[path = "../fuzz/checks.rs"]
mod checks;
mod hostile;

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use hornbeam::archive::write::{Archive, Content};
use hornbeam::dtype::DType;
use hornbeam::error::Result;
use hornbeam::image::Engine;
use hornbeam::image::hdf5::direct::Direct;
use hornbeam::io::emit::{Progress, Sink, Tensors, emit};
use hornbeam::tree::Tree;

/// Numbers that look random and are the same every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

/// Some damage to `data`: bytes, numbers, runs that go, come, or come from another file.
fn damage(data: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..=random.below(4) {
        let (at, len) = (random.below(data.len()), 1 + random.below(64));
        let end = (at + len).min(data.len());
        match random.below(8) {
            0 if at < data.len() => data[at] ^= 1 << random.below(8),
            1 if at < data.len() => data[at] = random.of(&[0, 1, 0x7f, 0x80, 0xff]),
            2 | 3 => {
                // A number of one to eight bytes: small, huge, or a place in the file.
                let (size, near) = (data.len() as u64, random.next() % 9);
                let n = random.of(&[
                    0,
                    1,
                    near,
                    size - near.min(size),
                    size + near,
                    1 << 31,
                    1 << 62,
                    u64::MAX - near,
                    at as u64,
                ]);
                let width = random.of(&[1, 2, 4, 8]).min(data.len() - at);
                data[at..at + width].copy_from_slice(&n.to_le_bytes()[..width]);
            }
            4 => drop(data.drain(at..end)),
            5 => {
                let run: Vec<u8> = data[at..end].to_vec();
                let to = random.below(data.len());
                data.splice(to..to, run);
            }
            6 => {
                let from = random.below(other.len());
                let run = &other[from..(from + len).min(other.len())];
                let end = (at + run.len()).min(data.len());
                data[at..end].copy_from_slice(&run[..end - at]);
            }
            _ if random.below(16) == 0 => data.truncate(at),
            _ => {}
        }
    }
}

/// One test at a time: memory is counted for all threads.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs `check` on the seeds and on what is left of them.
fn soak(name: &str, seeds: &[Vec<u8>], check: fn(&[u8])) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let number = |name: &str, otherwise| std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(otherwise);
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("soak-{name}"));
    let mut random = Random(number("HORNBEAM_SEED", 1) ^ 0x9e37_79b9_7f4a_7c15);
    seeds.iter().for_each(|seed| check(seed));
    for _ in 0..number("HORNBEAM_SOAK", 300) {
        let mut data = seeds[random.below(seeds.len())].clone();
        damage(&mut data, &seeds[random.below(seeds.len())], &mut random);
        std::fs::write(&kept, &data).expect("there is room");
        check(&data);
    }
    let _ = std::fs::remove_file(kept);
}

/// Memory that grows.
struct Grow(Vec<u8>, bool);

impl Sink for Grow {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let end = offset as usize + bytes.len();
        self.0.resize(self.0.len().max(end), 0);
        self.0[offset as usize..end].copy_from_slice(bytes);
        Ok(())
    }

    fn can_patch(&self) -> bool {
        self.1
    }
}

/// A little of everything; `wide` has more members in a group than one node holds.
fn tree(wide: bool, ascii: bool) -> Tree {
    let mut tree = Tree::new();
    let text = |name: &str, value: &str| vec![(name.to_owned(), value.into())];
    tree.add_group("layers/dense/vars", text("name", "größe")).expect("new");
    for (i, dtype) in DType::named().chain([DType::Opaque(1), DType::Opaque(2)]).enumerate() {
        tree.add_dataset(&format!("types/{i}"), dtype, [2 * (i as u64 % 3)], vec![]).expect("new");
    }
    tree.add_dataset("scalar", DType::Opaque(2), [], text("dtype", "bfloat16")).expect("new");
    for i in 0..if wide { 300 } else { 3 } {
        tree.add_dataset(&format!("group/{i}"), DType::U8, [1, i % 3], vec![]).expect("new");
    }
    if !ascii {
        tree.add_dataset("größe/0", DType::F32, [3], vec![]).expect("new");
    }
    tree
}

fn image(engine: &dyn Engine, tree: &Tree) -> Vec<u8> {
    let layout = engine.lay_out(tree).expect("it is valid");
    let mut sink = Grow(Vec::new(), true);
    emit(&layout, tree.datasets(), &mut Same(tree, Vec::new()), 0, &mut sink, &Progress::default()).expect("it fits");
    sink.0
}

/// Tensors of the right size.
struct Same<'a>(&'a Tree, Vec<u8>);

impl Tensors for Same<'_> {
    fn tensor(&mut self, i: usize) -> Result<&[u8]> {
        self.1 = (0..self.0.datasets()[i].nbytes).map(|at| (at / 5) as u8).collect();
        Ok(&self.1)
    }
}

fn images() -> Vec<Vec<u8>> {
    let mut all = vec![image(&Direct, &tree(false, true)), image(&Direct, &tree(true, true))];
    all.push(hostile::pyramid(all[0].clone(), hostile::GROUPS, 3, false));
    #[cfg(feature = "libhdf5")]
    {
        use hornbeam::image::{Compression, hdf5::libhdf5::LibHdf5};
        use hornbeam::io::pack::pack;

        all.extend([tree(false, true), tree(true, true), tree(false, false)].map(|tree| image(&LibHdf5, &tree)));
        let mut chunked = Tree::new();
        chunked.add_dataset("a", DType::F32, [2, 3000], vec![]).expect("new");
        chunked.add_dataset("b", DType::U8, [20_000], vec![]).expect("new");
        for (level, shuffle) in [(4, true), (0, false)] {
            let how = Compression::new(level, shuffle, 1024).expect("it is valid");
            let mut sink = Grow(Vec::new(), true);
            let mut tensors = Same(&chunked, Vec::new());
            pack(&LibHdf5, &chunked, how, &mut tensors, 0, &mut sink, &Progress::default()).expect("it fits");
            all.push(sink.0);
        }
    }
    all
}

#[test]
fn weights() {
    let mut seeds = images();
    let header = r#"{"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    seeds.push([&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[7; 8]].concat());
    soak("weights", &seeds, checks::index);
}

/// Small files that ask for much: whoever opens one has an error, or an index, in memory that goes with its size.
#[test]
#[allow(clippy::print_stdout)] // which one it is, when it fails
fn bombs() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for (what, data) in hostile::bombs().into_iter().chain(hostile::headers()) {
        println!("{what}: {} bytes", data.len());
        checks::index(&data);
    }
}

#[test]
fn archives() {
    let archive = |patchable: bool| {
        let mut sink = Grow(Vec::new(), patchable);
        let weights = image(&Direct, &tree(false, true));
        let mut archive = Archive::new(0, &sink);
        let payload = archive.open_weights(weights.len() as u64, &mut sink).expect("it fits");
        sink.write_at(&weights, payload).expect("it fits");
        archive.close_weights(crc32fast::hash(&weights), &mut sink).expect("it fits");
        for (name, text) in [("metadata.json", "{}"), ("config.json", "{\"a\": [1, 2]}"), ("assets/größe/x", "ß")] {
            archive.add(name, &Content::Bytes(text.into()), &mut sink).expect("it fits");
        }
        archive.finish(&mut sink).expect("it fits");
        sink.0
    };
    soak("archives", &[archive(true), archive(false)], checks::archive);
}

#[test]
fn texts() {
    let config = r#"{"module": "keras", "class_name": "Dense", "config": {"units": 12, "rate": 1e-07, "a": [null, true,
        -0.0, NaN, -Infinity, 123456789012345678901234567890, 1.5e300], "n\u00f6\ud83d\ude00\ud800": "\"\\ \n"}}"#;
    let deep = format!("{}1{}", "[".repeat(900), "]".repeat(900));
    soak("texts", &[config.into(), deep.into(), b"[[], {}, \"\xc3\xb6\"]".to_vec()], checks::json);
}
