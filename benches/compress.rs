//! Weights → compressed chunks, and back, by as many threads as there are cores.

use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hornbeam::dtype::DType;
use hornbeam::error::Result;
use hornbeam::image::Compression;
use hornbeam::image::hdf5::libhdf5::LibHdf5;
use hornbeam::io::emit::{Progress, Sink, Tensors};
use hornbeam::io::pack::pack;
use hornbeam::load::{Choice, Weights};
use hornbeam::tree::Tree;

const TENSORS: usize = 16;
const LEN: usize = 4 << 20;

/// The same bytes for every tensor.
struct Same(Vec<u8>);

impl Tensors for Same {
    fn tensor(&mut self, _: usize) -> Result<&[u8]> {
        Ok(&self.0)
    }
}

struct Growing(Vec<u8>);

impl Sink for Growing {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let end = offset as usize + bytes.len();
        self.0.resize(self.0.len().max(end), 0);
        self.0[offset as usize..end].copy_from_slice(bytes);
        Ok(())
    }
}

/// Numbers about as large as weights are.
fn weights() -> Vec<u8> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        f32::from((state >> 48) as u16) / 65_536.0 - 0.5
    };
    let mut normal = || (0..6).map(|_| uniform()).sum::<f32>() * 0.03;
    (0..LEN / 4).flat_map(|_| normal().to_le_bytes()).collect()
}

fn run(c: &mut Criterion) {
    let mut tree = Tree::new();
    for i in 0..TENSORS {
        tree.add_dataset(&format!("layers/l{i:02}/vars/0"), DType::F32, [1024, LEN as u64 / 4096], vec![])
            .expect("paths differ");
    }
    let mut tensors = Same(weights());
    let mut group = c.benchmark_group("compress");
    group.sample_size(10).throughput(Throughput::Bytes((TENSORS * LEN) as u64));
    for level in [1, 4, 6] {
        let how = Compression::new(level, true, 1 << 20).expect("it is valid");
        let mut write = || {
            let mut image = Growing(Vec::new());
            pack(&LibHdf5, &tree, how, &mut tensors, 0, &mut image, &Progress::default()).expect("there is memory");
            image.0
        };
        group.bench_function(BenchmarkId::new("save", level), |b| b.iter_with_large_drop(&mut write));
        let image = write();
        let percent = image.len() * 100 / (TENSORS * LEN);
        let weights = Arc::new(Weights::open(Arc::new(image), Choice::LibHdf5).expect("it was just written"));
        let all: Vec<usize> = (0..TENSORS).collect();
        group.bench_function(BenchmarkId::new(format!("load of {percent} %"), level), |b| {
            b.iter_with_large_drop(|| {
                let reading = weights.fetch(&all, true, u64::MAX).expect("they are there");
                reading.complete(false, &|| Ok(())).expect("it is whole");
                reading
            });
        });
    }
    group.finish();
}

criterion_group!(benches, run);
criterion_main!(benches);
