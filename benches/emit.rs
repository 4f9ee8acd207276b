//! Layout and tensors → bytes: gathering, CRC and write, of few large and of many small tensors.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hornbeam::dtype::DType;
use hornbeam::error::Result;
use hornbeam::image::{Engine, hdf5::direct::Direct};
use hornbeam::io::emit::{Progress, Sink, Tensors, emit};
use hornbeam::tree::Tree;

/// Every tensor is the same memory.
struct Same(Vec<u8>);

impl Tensors for Same {
    fn tensor(&mut self, _: usize) -> Result<&[u8]> {
        Ok(&self.0)
    }
}

fn run(c: &mut Criterion) {
    let mut group = c.benchmark_group("emit");
    group.sample_size(10);
    for (count, bytes) in [(4, 64 << 20), (25_000, 10 << 10)] {
        let mut tree = Tree::new();
        for i in 0..count {
            tree.add_dataset(&format!("layers/{i}/vars/0"), DType::U8, [bytes], vec![]).expect("new");
        }
        let layout = Direct.lay_out(&tree).expect("it is valid");
        let mut tensors = Same(vec![1; bytes as usize]);
        group.throughput(Throughput::Bytes(layout.len));
        group.bench_function(BenchmarkId::from_parameter(format!("{count} x {bytes}")), |b| {
            b.iter_with_large_drop(|| {
                let file = tempfile::tempfile().expect("there is room");
                let mut sink = &file;
                sink.reserve(layout.len).expect("there is room");
                emit(&layout, tree.datasets(), &mut tensors, 0, &mut sink, &Progress::default()).expect("it fits");
                file
            });
        });
    }
    group.finish();
}

criterion_group!(benches, run);
criterion_main!(benches);
